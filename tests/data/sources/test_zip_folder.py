"""Reading the official archives; data/make_zip.py makes them for these tests."""

import multiprocessing
import os
import pickle
import zipfile
from pathlib import Path

import pytest

from data import make_zip
from data.decoding import BrokenImageError
from data.sources.image_folder import ImageFolder
from data.sources.zip_folder import ZipFolder
from tests.helpers import make_image_folder


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The image folder and the folder of its archives: 5 + 5 images for training, 3 + 3 to validate."""
    root = tmp_path_factory.mktemp("zip")
    make_image_folder(root / "images", train=5, val=3)
    assert make_zip.main([str(root / "images"), str(root / "zips")]) == 0
    return root / "images", root / "zips"


def read_in_worker(source: ZipFolder, index: int, expected: bytes) -> None:
    assert source.read(index) == expected
    assert source.owner == os.getpid()  # it opened the archive for itself


def test_it_reads_what_the_folder_holds(archives: tuple[Path, Path]) -> None:
    images, zips = archives
    for split in ("train", "val"):
        folder, archive = ImageFolder(str(images), split), ZipFolder(str(zips), split)
        assert archive.classes == folder.classes == ["cat", "dog"]
        assert archive.labels.tolist() == folder.labels.tolist()
        assert [archive.read(i) for i in range(len(archive))] == [folder.read(i) for i in range(len(folder))]
        assert archive.name(0).endswith(f"{split}.zip: cat/0.jpg")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_open_the_archive_for_themselves(archives: tuple[Path, Path], method: str) -> None:
    source = ZipFolder(str(archives[1]), "train")
    source.use_cache(0, 1)
    expected = source.read(0)
    other = ImageFolder(str(archives[0]), "train").read(7)
    process = multiprocessing.get_context(method).Process(target=read_in_worker, args=(source, 7, other))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert source.cache is not None
    assert source.cache.get(7) == other  # the worker's reading serves all
    assert source.read(0) == expected
    assert pickle.loads(pickle.dumps(source)).descriptor == -1


@pytest.mark.parametrize(("first", "step"), [(0, 1), (0, 3), (2, 3), (1, 10), (9, 10)])
def test_cached_images_need_the_archive_once(
    archives: tuple[Path, Path], tmp_path: Path, first: int, step: int
) -> None:
    for name in ("train.zip", "train_map.txt"):
        (tmp_path / name).write_bytes((archives[1] / name).read_bytes())
    source = ZipFolder(str(tmp_path), "train")
    cache = source.use_cache(first, step)
    expected = [source.read(index) for index in range(10)]
    assert source.bytes_of(first, step) == sum(len(data) for data in expected[first::step])
    assert cache.num_slots == len(expected[first::step])
    (tmp_path / "train.zip").write_bytes(bytes(1000))  # what is read now comes from memory or not at all
    for index, data in enumerate(expected):
        if index % step == first:
            assert source.read(index) == data
        else:
            with pytest.raises(BrokenImageError):
                source.read(index)


def write(folder: Path, names: dict[str, bytes], lines: list[str], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(folder / "val.zip", "w", method) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    (folder / "val_map.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_official_maps_without_class_folders(tmp_path: Path) -> None:
    """As the official val_map.txt: bare file names; the classes' names are those of train_map.txt."""
    write(tmp_path, {"a.JPEG": b"a", "b.JPEG": b"bb"}, ["a.JPEG\t1", "b.JPEG\t0"])
    source = ZipFolder(str(tmp_path), "val")
    assert (source.classes, source.labels.tolist(), source.read(1)) == (["0", "1"], [1, 0], b"bb")
    (tmp_path / "train_map.txt").write_text("n01440764/x.JPEG\t0\nn01443537/y.JPEG\t1\nn01484850/z.JPEG\t2\n")
    assert ZipFolder(str(tmp_path), "val").classes == ["n01440764", "n01443537", "n01484850"]


def test_deflated_archives_of_a_whole_folder(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    write(tmp_path, {"val/cat/größe.jpg": data}, ["cat/größe.jpg\t0"], zipfile.ZIP_DEFLATED)
    assert ZipFolder(str(tmp_path), "val").read(0) == data


def test_missing_and_damaged_members(tmp_path: Path) -> None:
    write(
        tmp_path, {"cat/a.jpg": b"a" * 100, "cat/b.jpg": b"b" * 100}, ["cat/a.jpg\t0", "cat/b.jpg\t0", "cat/c.jpg\t0"]
    )
    content = (tmp_path / "val.zip").read_bytes()
    (tmp_path / "val.zip").write_bytes(content.replace(b"b" * 100, b"b" * 99 + b"?"))
    source = ZipFolder(str(tmp_path), "val")
    assert source.read(0) == b"a" * 100
    with pytest.raises(BrokenImageError, match="its checksum differs"):
        source.read(1)
    with pytest.raises(BrokenImageError, match="not in the archive, though the map names it"):
        source.read(2)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["cat/a.jpg 0"], "line 1: 'cat/a.jpg 0' is not `class/image.jpg<TAB>label`"),
        (["cat/a.jpg\t0", "cat/a.jpg\tcat"], "line 2"),
        ([], "it names no images"),
        (["dog/1.jpg\t0"], "none of the images that val_map.txt names is in it, such as dog/1.jpg"),
    ],
)
def test_maps_that_cannot_be_understood(tmp_path: Path, lines: list[str], reason: str) -> None:
    write(tmp_path, {"cat/a.jpg": b"a"}, lines)
    with pytest.raises(ValueError, match=reason):
        ZipFolder(str(tmp_path), "val")


def test_missing_and_torn_archives(tmp_path: Path) -> None:
    for root in ("", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"no val\.zip in it; --zip reads .* data\.make_zip makes"):
            ZipFolder(root, "val")
    write(tmp_path, {"cat/a.jpg": b"a" * 500}, ["cat/a.jpg\t0"])
    (tmp_path / "val.zip").write_bytes((tmp_path / "val.zip").read_bytes()[:-30])
    with pytest.raises(ValueError, match="not a whole zip archive"):
        ZipFolder(str(tmp_path), "val")
