"""The file with the verdicts of the self-test."""

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from models.kernels import verdicts
from models.kernels.verdicts import Case
from tests.helpers import ROOT

GPU = torch.device("cuda", 0)
FLOAT, HALF = torch.float32, torch.float16
MIXER, MLP = ("mixer", 64, 32, 17), ("mlp", 64, 32, 17)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A machine with a GPU, of which a test may change the driver."""
    machine = {"driver": "12080", "name": "NVIDIA H200"}
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: machine["name"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(verdicts, "driver_version", lambda: machine["driver"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    (tmp_path / ".triton" / "cache").mkdir(parents=True)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    verdicts.describe.cache_clear()
    return machine


def load(device: torch.device = GPU, dtype: torch.dtype = FLOAT) -> dict[Case, str]:
    """Load as a new process does."""
    verdicts.describe.cache_clear()
    return verdicts.load(device, dtype)


def test_verdicts_are_found_again(tmp_path: Path) -> None:
    assert load() == {}
    verdicts.save(GPU, FLOAT, {MIXER: "", MLP: "it is wrong"})
    verdicts.save(GPU, HALF, {MLP: ""})
    assert load() == {MIXER: ""}
    assert load(dtype=HALF) == {MLP: ""}
    assert load(torch.device("cpu")) == {}
    assert [path.name for path in (tmp_path / "mlla").iterdir()] == ["self_test.json"]


def test_a_launch_of_several_processes_shares_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert verdicts.current_launch()
    verdicts.save(GPU, FLOAT, {MIXER: "", MLP: "it is wrong"})
    assert load() == {MIXER: "", MLP: "it is wrong"}
    monkeypatch.setattr(verdicts, "current_launch", lambda: "another parent")
    assert load() == {MIXER: ""}
    verdicts.save(GPU, FLOAT, {MLP: "it fails"})
    assert load() == {MIXER: "", MLP: "it fails"}
    verdicts.save(GPU, FLOAT, {MLP: ""})
    assert load() == {MIXER: "", MLP: ""}


@pytest.mark.parametrize("part", ["driver", "name", "triton", "torch", "source"])
def test_another_environment_tests_again(
    machine: dict[str, str], monkeypatch: pytest.MonkeyPatch, part: str, tmp_path: Path
) -> None:
    verdicts.save(GPU, FLOAT, {MIXER: ""})
    assert load() == {MIXER: ""}
    if part in machine:
        machine[part] = "another"
    elif part == "source":
        changed = tmp_path / "ops.py"
        changed.write_text("changed")
        files = [changed if path.name == "ops.py" else path for path in verdicts.source_files()]
        monkeypatch.setattr(verdicts, "source_files", lambda: files)
    else:
        monkeypatch.setattr(f"{part}.__version__", "0.1")
    assert load() == {}
    verdicts.save(GPU, FLOAT, {MLP: ""})
    assert load() == {MLP: ""}
    monkeypatch.undo()
    assert len(json.loads((tmp_path / "mlla" / "self_test.json").read_text())) == 2


def test_few_environments_are_kept(machine: dict[str, str]) -> None:
    for i in range(verdicts.MOST_KEYS + 2):
        machine["driver"] = str(i)
        verdicts.describe.cache_clear()
        verdicts.save(GPU, FLOAT, {MIXER: ""})
    table = json.loads(verdicts.cache_file().read_text())
    assert len(table) == verdicts.MOST_KEYS
    assert "driver 2," in next(iter(table))


@pytest.mark.parametrize("content", ["", "[1]", "{", "\x00", '{"KEY": 5}', '{"KEY": [5]}', '{"KEY": [[]]}'])
def test_a_damaged_file_is_ignored(content: str) -> None:
    verdicts.save(GPU, FLOAT, {MIXER: ""})
    verdicts.cache_file().write_text(content.replace("KEY", verdicts.describe(GPU)))
    assert load() == {}
    verdicts.save(GPU, FLOAT, {MLP: ""})
    assert load() == {MLP: ""}


def test_a_file_that_cannot_be_written_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert verdicts.can_save(GPU)
    assert not verdicts.can_save(torch.device("cpu"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    verdicts.save(GPU, FLOAT, {MIXER: ""})
    assert load() == {}
    assert not verdicts.can_save(GPU)


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert verdicts.cache_file() == Path("/home/somebody/.cache/mlla/self_test.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert verdicts.cache_file() == Path("/cache/mlla/self_test.json")


def test_verdicts_hold_for_the_cache_with_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verdicts.save(GPU, FLOAT, {MIXER: ""})
    cache = tmp_path / ".triton" / "cache"
    cache.rmdir()
    assert load() == {}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert load() == {}
    monkeypatch.delenv("TRITON_CACHE_DIR")
    with monkeypatch.context() as patch:
        patch.setattr(verdicts.os, "access", lambda *_: False)
        verdicts.fix_triton_cache_dir()
        assert "TRITON_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")  # and so again after the test
    verdicts.fix_triton_cache_dir()
    assert os.environ["TRITON_CACHE_DIR"] == str(cache)
    assert load() == {MIXER: ""}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    verdicts.fix_triton_cache_dir()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)


def test_triton_knows_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.delenv("TRITON_HOME")
    assert str(verdicts.triton_cache_dir()) == knobs.cache.dir


def test_driver_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    text = "NVRM version: NVIDIA UNIX  570.1\nGCC version"
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert verdicts.driver_version() == "12080 NVRM version: NVIDIA UNIX 570.1"


def test_the_source_is_all_that_the_problems_import() -> None:
    def imported(path: Path) -> set[Path]:
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        paths = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("models.")}
        return {path for path in paths if path.exists()}

    found: set[Path] = set()
    todo: list[Any] = [ROOT / "models" / "kernels" / "problems.py"]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += imported(path)
    assert ROOT / "models" / "kernels" / "triton" / "norm.py" in found
    assert found <= set(verdicts.source_files())
