import zipfile
from pathlib import Path

import pytest

from data import make_zip
from data.errors import BrokenImageError, DataError
from data.sources.image_folder import ImageFolder
from data.sources.zip_folder import ZipFolder
from tests.helpers import exit_code, make_image_folder

FILES = ("train.zip", "train_map.txt", "val.zip", "val_map.txt")


def pack(images: Path, zips: Path) -> int:
    return exit_code(make_zip.main, [images, zips])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "images", train=6, val=2)


def test_four_files_stored_and_mapped(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(images, tmp_path / "zips") == 0
    assert sorted(path.name for path in (tmp_path / "zips").iterdir()) == sorted(FILES)
    assert (tmp_path / "zips" / "val_map.txt").read_text() == "cat/0.jpg\t0\ncat/1.jpg\t0\ndog/0.jpg\t1\ndog/1.jpg\t1\n"
    with zipfile.ZipFile(tmp_path / "zips" / "train.zip") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist() == [f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(6)]
    assert "12 images" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 1, 29, 400, 2000, 10_000, 25_000])
def test_it_resumes_from_a_truncated_archive(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    assert pack(images, tmp_path / "whole") == 0
    truncated, whole = tmp_path / "truncated", (tmp_path / "whole" / "train.zip").read_bytes()
    truncated.mkdir()
    (truncated / "train.zip.partial").write_bytes(whole[:keep])
    read, packed = ImageFolder.read, make_zip.pack
    numbers = []

    def recorded(self: ImageFolder, index: int) -> bytes:
        numbers.append(index)
        return read(self, index)

    def pack_recorded(*arguments: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ImageFolder, "read", recorded)
            packed(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(make_zip, "pack", pack_recorded)
    assert pack(images, truncated) == 0
    assert all((truncated / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in FILES)
    assert (numbers[0] > 0) == (keep > 6000)  # images that were written whole are not written again


def test_a_damaged_or_foreign_beginning_is_overwritten(images: Path, tmp_path: Path) -> None:
    assert pack(images, tmp_path / "whole") == 0
    whole = bytearray((tmp_path / "whole" / "train.zip").read_bytes())
    for number, start in enumerate((b"something else" * 50, bytes(whole[:300] + b"\0\0\0\0" + whole[304:9000]))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "train.zip.partial").write_bytes(start)
        assert pack(images, folder) == 0
        assert (folder / "train.zip").read_bytes() == whole


def test_an_interrupted_call_resumes(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ImageFolder.read

    def interrupted(self: ImageFolder, index: int) -> bytes:
        if index == 7:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "read", interrupted)
        assert pack(images, tmp_path / "zips") == 130
    assert not (tmp_path / "zips" / "train.zip").exists()
    assert pack(images, tmp_path / "zips") == 0
    source, folder = ZipFolder(str(tmp_path / "zips"), "train"), ImageFolder(str(images), "train")
    assert [source.read(i) for i in range(12)] == [folder.read(i) for i in range(12)]


def test_nothing_is_replaced_and_a_second_call_changes_nothing(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zips = tmp_path / "zips"
    assert pack(images, zips) == 0
    before = {name: (zips / name).stat().st_mtime_ns for name in FILES if name.endswith("zip")}
    assert pack(images, zips) == 0
    assert before == {name: (zips / name).stat().st_mtime_ns for name in before}
    (images / "train" / "cat" / "0.jpg").rename(images / "train" / "cat" / "00.jpg")
    capsys.readouterr()
    assert pack(images, zips) == 2
    assert "train.zip exists with other images" in capsys.readouterr().err


def test_the_archive_is_compared_with_the_files(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ZipFolder, "read", lambda *_: b"other")
    assert pack(images, tmp_path / "zips") == 2
    assert not (tmp_path / "zips" / "train.zip").exists()


def test_user_errors(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pack(tmp_path / "none", tmp_path / "zips") == 2
    assert "no folder" in capsys.readouterr().err
    (images / "val" / "dog").rename(images / "val" / "emu")
    assert pack(images, tmp_path / "zips") == 2
    assert "differ in classes, such as dog" in capsys.readouterr().err

    (images / "val" / "emu" / "0.jpg").rename(images / "val" / "emu" / "caf\udce9.jpg")
    (images / "val" / "emu").rename(images / "val" / "dog")
    with pytest.raises(DataError, match="a name that is not UTF-8, which archives need"):
        make_zip.make_zip(ImageFolder(str(images), "val"), "val", tmp_path)
    (images / "val" / "dog" / "caf\udce9.jpg").rename(images / "val" / "dog" / "0.jpg")

    def unreadable(*_: object) -> bytes:
        raise BrokenImageError("cannot be read: Permission denied")

    monkeypatch.setattr(ImageFolder, "read", unreadable)
    assert pack(images, tmp_path / "zips") == 2
    assert f"{images}/train/cat/0.jpg: cannot be read: Permission denied" in capsys.readouterr().err


def test_an_unwritable_output_folder_and_a_damaged_archive(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert pack(images, tmp_path / "file") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/file: cannot be written: File exists\n"
    (tmp_path / "zips").mkdir()
    (tmp_path / "zips" / "train.zip").write_bytes(b"no archive")
    assert pack(images, tmp_path / "zips") == 2
    assert "train.zip: not a complete zip archive" in capsys.readouterr().err
