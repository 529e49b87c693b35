"""The system's errors on a user's files become one line that names the file."""

from pathlib import Path

import pytest
import torch

from utils.config.errors import ConfigError, MissingFileError, UserError, file_errors, memory_reason


def test_the_line_names_file_action_reason_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(ConfigError) as caught, file_errors(ConfigError, path, "read", "make it first"):
        path.read_text()
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory; make it first"
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_the_line_names_the_file_in_a_folder(tmp_path: Path) -> None:
    match = f"^{tmp_path}/a/b: cannot be written: No such file"
    with pytest.raises(UserError, match=match), file_errors(UserError, tmp_path, "written"):
        (tmp_path / "a" / "b").write_text("")


@pytest.mark.parametrize(("error", "reason"), [(OSError(), "OSError"), (OSError("two\nlines"), "two lines")])
def test_errors_without_a_number(error: OSError, reason: str) -> None:
    with pytest.raises(UserError) as caught, file_errors(UserError, "x", "read"):
        raise error
    assert str(caught.value) == f"x: cannot be read: {reason}"


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff")
    with (
        pytest.raises(UserError, match=r"x: cannot be read: .*can't decode"),
        file_errors(UserError, tmp_path / "x", "read"),
    ):
        (tmp_path / "x").read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [UserError("x"), MissingFileError("x"), ValueError("x"), KeyError("x")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, file_errors(ConfigError, "file", "read"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("size", [2**40, 2**62])
def test_memory_that_torch_cannot_get(size: int) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(size)
    reason = memory_reason(caught.value)
    assert reason
    assert "\n" not in reason
    assert len(reason) <= 200


def test_memory_errors_and_others() -> None:
    assert memory_reason(MemoryError()) == "MemoryError"
    assert (
        memory_reason(MemoryError("Caught MemoryError in worker\n  Traceback\nMemoryError: no room\n"))
        == "MemoryError: no room"
    )
    assert memory_reason(RuntimeError("CUDA error: out of memory\nCompile with ...")) is not None
    assert memory_reason(RuntimeError("a defect")) is None
