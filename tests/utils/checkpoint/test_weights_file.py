"""Files of every format, and files that are not weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from utils.checkpoint.weights_file import CheckpointError, load_checkpoint

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(WEIGHTS, path)
    content = load_checkpoint(path)
    assert list(content) == ["model"]
    assert all(content["model"][name].equal(value) for name, value in WEIGHTS.items())
    save_file(WEIGHTS, path, {"classes": '["cat", "dog"]', "config": "SEED: 1\n", "format": "pt"})
    content = load_checkpoint(path)
    assert (content["classes"], content["config"]) == (["cat", "dog"], "SEED: 1\n")


def test_the_format_is_recognized_by_content(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.pth")
    torch.save(WEIGHTS, tmp_path / "w.safetensors")
    torch.save(WEIGHTS, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "w.pth")["model"]["a"].equal(WEIGHTS["a"])
    assert load_checkpoint(tmp_path / "w.safetensors")["a"].equal(WEIGHTS["a"])
    assert load_checkpoint(tmp_path / "legacy")["a"].equal(WEIGHTS["a"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "damaged, or not its format"),
        (b"", "damaged, or not its format"),
        (b"<!DOCTYPE html><html>", "is a web page, saved in place of the file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "is a Git LFS pointer"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{" + b" " * 15, "cannot be read as a safetensors file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_other_content(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        load_checkpoint(tmp_path / ("a" * 300))
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        load_checkpoint(tmp_path / "tensor.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(9999)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for length in (1, 10, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged, or not its format"):
            load_checkpoint(path)
