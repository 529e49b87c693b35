"""Files of every format, and files that are not weights."""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from utils.checkpoint.weights_file import CHECKSUM_KEY, CheckpointError, load_checkpoint, write_safetensors

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
    with pytest.raises(CheckpointError, match=r"no such checkpoint file$"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"^mllat: no such .*; did you mean mlla-t, the released weights\?$"):
        load_checkpoint("mllat")
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
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)


def flip(path: Path, whole: bytes, position: int) -> None:
    content = bytearray(whole)
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_turned_bit_is_noticed(tmp_path: Path, kind: str) -> None:
    """Wherever it is, except in the padding of a .pth file, which nobody reads, and in the name of the checksum."""
    path = tmp_path / f"w.{kind}"
    weights = {"a": torch.arange(300.0), "b": torch.tensor(7), "c": torch.ones(3, 5, dtype=torch.bfloat16)}
    if kind == "pth":
        torch.save({"model": weights}, path)
    else:
        write_safetensors(path, weights, {"classes": ["cat", "dog"], "config": "SEED: 1\n"})
    whole = path.read_bytes()
    name = whole.find(CHECKSUM_KEY.encode()) if kind == "safetensors" else len(whole)  # its place in the file varies
    missed = 0
    for position in {*range(0, len(whole), 29)} - {*range(name, name + len(CHECKSUM_KEY))}:
        flip(path, whole, position)
        try:
            content = load_checkpoint(path)["model"]
        except CheckpointError:
            continue
        missed += 1
        assert all(content[name].equal(weights[name]) for name in weights)
    assert missed < (0.5 if kind == "pth" else 0.01) * len(whole) / 29
    flip(path, whole, whole.index(torch.arange(300.0).numpy().tobytes()) + 99)
    with pytest.raises(CheckpointError, match=r"w\.\w+: is damaged: .* not have its checksum"):
        load_checkpoint(path)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        assert archive.testzip() is not None
    assert load_checkpoint(tmp_path / "w.pth")["a"].equal(WEIGHTS["a"])


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    """A megabyte of them could fill gigabytes of memory."""
    torch.save(WEIGHTS, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as source,
        zipfile.ZipFile(tmp_path / "v.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="is compressed, as torch"):
        load_checkpoint(tmp_path / "v.pth")


def test_metadata_of_any_depth(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.safetensors", {"classes": "[" * 100_000})
    with pytest.raises(CheckpointError, match="cannot be read as a safetensors file"):
        load_checkpoint(tmp_path / "w.safetensors")


def test_reasons_are_true(tmp_path: Path) -> None:
    """A file of the older format may hold a name that no program wrote."""
    torch.save({"config": {"path": Path("a")}}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "w.pth").read_bytes()
    assert whole.count(b"PosixPath") == 1
    (tmp_path / "w.pth").write_bytes(whole.replace(b"PosixPath", b"PosixPats"))
    with pytest.raises(CheckpointError, match=r"PosixPats, and such objects could run code, or the file is damaged"):
        load_checkpoint(tmp_path / "w.pth")
