import multiprocessing
import shutil
import zipfile
from multiprocessing import Queue
from pathlib import Path

import pytest
import torch

from data import make_zip
from data.samplers import EvalSampler, TrainSampler
from data.sources import archive_cache
from data.sources.archive_cache import cache_archives
from data.sources.zip_folder import ZipFolder
from tests.helpers import make_image_folder


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    make_image_folder(folder / "images", train=4, val=2)
    assert make_zip.main([str(folder / "images"), str(folder)]) == 0
    return folder


def test_64_processes_cache_disjoint_complete_and_balanced_shards(tmp_path: Path) -> None:
    """What each reads in training and evaluation is what it keeps in memory."""
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


def test_a_cache_larger_than_memory_is_refused(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(ZipFolder(str(archives), split).bytes_of(0, 1) for split in ("train", "val"))

    def cache_with(mode: str, available: int) -> None:
        monkeypatch.setattr(archive_cache, "available_bytes", lambda: available)
        cache_archives([ZipFolder(str(archives), split) for split in ("train", "val")], mode, 0, 1)

    with pytest.raises(OSError, match=r"CACHE_MODE 'full': .* GiB are available; set --cache-mode part, or no$"):
        cache_with("full", needed - 1)
    with pytest.raises(OSError, match=r"CACHE_MODE 'part': .* GiB are available; set --cache-mode no$"):
        cache_with("part", needed - 1)
    for mode, available in (("part", needed), ("full", needed)):
        cache_with(mode, available)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # processes on this machine, each with a share of its own
    cache_with("full", needed)
    with pytest.raises(OSError, match="CACHE_MODE 'part'"):
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


def test_processes_of_a_machine_share_one_full_cache(archives: Path, tmp_path: Path) -> None:
    for name in ("train.zip", "train_map.txt"):
        shutil.copy(archives / name, tmp_path)
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
