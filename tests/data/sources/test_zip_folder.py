"""Reading and caching the official archives; data/make_zip.py makes them for these tests."""

import multiprocessing
import os
import pickle
import shutil
import tracemalloc
import zipfile
from multiprocessing import Queue
from pathlib import Path

import pytest
import torch

from data import make_zip
from data.errors import BrokenImageError, DataError
from data.samplers import EvalSampler, TrainSampler
from data.sources import zip_folder
from data.sources.image_folder import ImageFolder
from data.sources.zip_folder import ZipFolder, cache_archives
from tests.helpers import make_image_folder
from utils.config.errors import MissingFileError


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


def test_archives_hold_the_images_and_labels_of_folders(archives: tuple[Path, Path]) -> None:
    images, zips = archives
    for split in ("train", "val"):
        folder, archive = ImageFolder(str(images), split), ZipFolder(str(zips), split)
        assert archive.classes == folder.classes == ["cat", "dog"]
        assert archive.labels.tolist() == folder.labels.tolist()
        assert [archive.read(i) for i in range(len(archive))] == [folder.read(i) for i in range(len(folder))]
        assert archive.name(0).endswith(f"{split}.zip: cat/0.jpg")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_worker_opens_the_archive(archives: tuple[Path, Path], method: str) -> None:
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
def test_cached_images_are_read_from_the_archive_once(
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
    """The official val_map.txt has bare file names; the class names come from train_map.txt."""
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
    with pytest.raises(BrokenImageError, match="its size or checksum differs"):
        source.read(1)
    with pytest.raises(BrokenImageError, match="not in the archive, though the map names it"):
        source.read(2)


def test_members_of_other_sizes_than_listed(tmp_path: Path) -> None:
    """A member that unfolds beyond its listed size takes no memory, and an impossible size is refused at once."""
    write(tmp_path, {"cat/a.jpg": bytes(10_000_000)}, ["cat/a.jpg\t0"], zipfile.ZIP_DEFLATED)
    content = (tmp_path / "val.zip").read_bytes()
    listed = content.rindex((10_000_000).to_bytes(4, "little"))  # in the directory, which is at the end

    def with_size(size: int) -> ZipFolder:
        (tmp_path / "val.zip").write_bytes(content[:listed] + size.to_bytes(4, "little") + content[listed + 4 :])
        return ZipFolder(str(tmp_path), "val")

    source = with_size(1000)
    source.use_cache(0, 1)
    tracemalloc.start()
    with pytest.raises(BrokenImageError, match="its size or checksum differs from the listed one"):
        source.read(0)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    with pytest.raises(DataError, match=r"cat/a\.jpg has an impossible size, 4294967294 bytes"):
        with_size(2**32 - 2)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([f"cat/a.jpg\t{'9' * 5000}"], "line 1"),
        (["cat/a.jpg 0"], "line 1: 'cat/a.jpg 0' is not `class/image.jpg<TAB>label`"),
        (["cat/a.jpg\t0", "cat/a.jpg\tcat"], "line 2"),
        ([], "it names no images"),
        (["dog/1.jpg\t0"], "none of the images that val_map.txt names is in it, such as dog/1.jpg"),
    ],
)
def test_invalid_maps(tmp_path: Path, lines: list[str], reason: str) -> None:
    write(tmp_path, {"cat/a.jpg": b"a"}, lines)
    with pytest.raises(DataError, match=reason):
        ZipFolder(str(tmp_path), "val")


def test_a_byte_order_mark_and_blank_lines_in_a_map(archives: tuple[Path, Path], tmp_path: Path) -> None:
    for path in archives[1].iterdir():
        shutil.copy(path, tmp_path)
    content = (tmp_path / "val_map.txt").read_text()
    (tmp_path / "val_map.txt").write_text(f"\ufeff{content}\n\n".replace("\n", "\r\n"))
    assert ZipFolder(str(tmp_path), "val").read(0) == ZipFolder(str(archives[1]), "val").read(0)
    (tmp_path / "val_map.txt").write_text(f"{content}cat/9.jpg\t1099511627776\n")
    with pytest.raises(DataError, match=r"val_map\.txt, line 7: label 1099511627776 is not the number of a class"):
        ZipFolder(str(tmp_path), "val")


def test_missing_and_truncated_archives(tmp_path: Path) -> None:
    for root in ("", str(tmp_path)):
        with pytest.raises(MissingFileError, match=r"no val\.zip in it; --zip reads .* data\.make_zip makes"):
            ZipFolder(root, "val")
    write(tmp_path, {"cat/a.jpg": b"a" * 500}, ["cat/a.jpg\t0"])
    (tmp_path / "val.zip").write_bytes((tmp_path / "val.zip").read_bytes()[:-30])
    with pytest.raises(DataError, match="not a complete zip archive"):
        ZipFolder(str(tmp_path), "val")


def test_64_processes_cache_disjoint_complete_and_balanced_shards(tmp_path: Path) -> None:
    """Each process keeps in memory exactly the images that it reads in training and evaluation."""
    num_images = 1000
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for index in range(num_images):
            archive.writestr(f"class{index % 10}/{index}.jpg", b"%d" % index)
    lines = [f"class{index % 10}/{index}.jpg\t{index % 10}\n" for index in range(num_images)]
    (tmp_path / "train_map.txt").write_text("".join(lines))
    cached: list[int] = []
    for rank in range(64):
        source = ZipFolder(str(tmp_path), "train")
        cache_archives([source], "part", rank, 64)
        sampler = TrainSampler(num_images, rank=rank, num_processes=64, seed=0, keeps_shard=True)
        for keys in (sampler, EvalSampler(num_images, rank=rank, num_processes=64)):
            assert all(key.position % source.step == source.first for key in keys)
        for image in sampler.order(0):
            source.read(int(image))
        assert source.cache is not None
        assert source.cache.num_slots in (15, 16)
        held = [source.cache.get(slot) for slot in range(source.cache.num_slots)]
        cached += [int(data) for data in held if data is not None]
    assert sorted(cached) == list(range(num_images))


def test_a_cache_larger_than_memory_is_refused(archives: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(ZipFolder(str(archives[1]), split).bytes_of(0, 1) for split in ("train", "val"))

    def cache_with(mode: str, available: int) -> None:
        monkeypatch.setattr(zip_folder, "available_bytes", lambda: available)
        cache_archives([ZipFolder(str(archives[1]), split) for split in ("train", "val")], mode, 0, 1)

    with pytest.raises(DataError, match=r"CACHE_MODE 'full': .* GiB are available; set --cache-mode part, or no$"):
        cache_with("full", needed - 1)
    with pytest.raises(DataError, match=r"CACHE_MODE 'part': .* GiB are available; set --cache-mode no$"):
        cache_with("part", needed - 1)
    for mode, available in (("part", needed), ("full", needed)):
        cache_with(mode, available)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # processes on this machine, each with a share of its own
    cache_with("full", needed)
    with pytest.raises(DataError, match="CACHE_MODE 'part'"):
        cache_with("part", 8 * needed - 1)


def share(rank: int, folder: Path, results: Queue) -> None:
    """A process of two: the first reads all images, then the second reads them without the archive."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    source = ZipFolder(str(folder), "train")
    cache_archives([source], "full", rank, 2)
    if rank == 0:
        for index in range(len(source)):
            source.read(index)
    torch.distributed.barrier()
    if rank == 1:
        source.archive = folder / "gone.zip"
        results.put([source.read(index) for index in range(len(source))])
    torch.distributed.barrier()  # the memory lives as long as the first process
    torch.distributed.destroy_process_group()


def test_processes_of_a_machine_share_one_full_cache(archives: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("train.zip", "train_map.txt"):
        shutil.copy(archives[1] / name, tmp_path)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=share, args=(rank, tmp_path, results)) for rank in range(2)]
    for process in processes:
        process.start()
    read = results.get(timeout=60)
    for process in processes:
        process.join()
    source = ZipFolder(str(tmp_path), "train")
    assert read == [source.read(index) for index in range(len(source))]
