from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from downstream.segmentation.data.dataset import DataError, MaskedImages
from downstream.segmentation.data.samplers import (
    Draw,
    EndlessBatches,
    EvalSamples,
    TrainSamples,
    batches_or_data_error,
)
from downstream.segmentation.data.transforms import EvalTransform, TrainTransform
from downstream.workers import set_up_worker


def make(**options: int) -> EndlessBatches:
    defaults = {"batch_size": 4, "batches_per_epoch": 3, "rank": 0, "num_processes": 1, "seed": 5}
    return EndlessBatches(10, **(defaults | options))


def draws_of(batches: EndlessBatches, epochs: int, *, start: int = 0) -> list[list[Draw]]:
    found = []
    for epoch in range(epochs):
        batches.set_epoch(epoch, start if epoch == 0 else 0)
        assert len(batches) == batches.batches_per_epoch - (start if epoch == 0 else 0)
        found += list(batches)
    return found


def test_permutation_follows_permutation() -> None:
    draws = [draw for batch in draws_of(make(), 5) for draw in batch]
    assert len(draws) == 60
    turns = [draws[i : i + 10] for i in range(0, 60, 10)]
    for turn, group in enumerate(turns):
        assert {draw.turn for draw in group} == {turn}
        assert sorted(draw.image for draw in group) == list(range(10))
    assert len({tuple(draw.image for draw in group) for group in turns}) == 6
    assert draws != [draw for batch in draws_of(make(seed=6), 5) for draw in batch]


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_any_point_can_be_the_start(start: int) -> None:
    assert draws_of(make(), 3, start=start) == draws_of(make(), 3)[start:]


@pytest.mark.parametrize(("num_processes", "batch_size"), [(2, 2), (4, 1)])
def test_a_step_has_the_same_images_for_any_number_of_processes(num_processes: int, batch_size: int) -> None:
    shares = [
        draws_of(make(rank=rank, num_processes=num_processes, batch_size=batch_size), 4)
        for rank in range(num_processes)
    ]
    for step, whole in enumerate(draws_of(make(), 4)):
        assert sorted(draw for share in shares for draw in share[step]) == sorted(whole)


def test_a_start_beyond_the_epoch() -> None:
    with pytest.raises(ValueError, match="start_batch 4: an epoch has 3 for this process"):
        make().set_epoch(0, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("masked")
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            (root / kind / split).mkdir(parents=True)
    for split in ("train", "val"):
        for i in range(6):
            size = rng.integers(30, 60, size=2)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / f"images/{split}/{i}.png")
            Image.fromarray(rng.integers(0, 3, size, dtype=np.uint8)).save(root / f"masks/{split}/{i}.png")
    (root / "classes.txt").write_text("a\nb\nc\n")
    return root


def train_loader(root: Path, num_workers: int, start: int = 0) -> DataLoader[Any]:
    images = MaskedImages(str(root), "train", layout="folder", reduce_zero_label=False)
    batches = EndlessBatches(6, batch_size=2, batches_per_epoch=5, rank=0, num_processes=1, seed=1)
    batches.set_epoch(1, start)
    samples = TrainSamples(images, TrainTransform((64, 32), (0.5, 2.0), 32), seed=1)
    return DataLoader(samples, batch_sampler=batches, num_workers=num_workers, worker_init_fn=set_up_worker)


def test_augmentation_belongs_to_the_draw(folder: Path) -> None:
    """Not to the reader: not to workers, nor to where a run began. The same image in another turn looks different."""
    expected = list(train_loader(folder, 0))
    for loader, first in ((train_loader(folder, 2), 0), (train_loader(folder, 0, start=2), 2)):
        found = list(loader)
        assert len(found) == 5 - first
        for (images, labels), (own_images, own_labels) in zip(found, expected[first:], strict=True):
            assert torch.equal(images, own_images)
            assert torch.equal(labels, own_labels)
    samples = train_loader(folder, 0).dataset
    assert not torch.equal(samples[Draw(0, 3)][0], samples[Draw(1, 3)][0])


def test_eval_samples_are_the_images_as_they_are(folder: Path) -> None:
    images = MaskedImages(str(folder), "val", layout="folder", reduce_zero_label=False)
    loader = DataLoader(EvalSamples(images, EvalTransform((64, 32), (1.0, 2.0))), batch_size=None)
    for number, sample in enumerate(loader):
        assert sample.number == number
        assert np.array_equal(sample.labels.numpy(), images.read(number)[1])
        assert [min(x.shape[1:]) for x in sample.inputs] == [32, 64]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_file_is_one_line_from_workers_too(tmp_path: Path, num_workers: int) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "images/train/x.png")
    Image.new("L", (40, 40), 9).save(tmp_path / "masks/train/x.png")
    (tmp_path / "classes.txt").write_text("a\n")
    images = MaskedImages(str(tmp_path), "train", layout="folder", reduce_zero_label=False)
    loader = DataLoader(EvalSamples(images, EvalTransform((32, 32))), batch_size=None, num_workers=num_workers)
    with pytest.raises(DataError, match=r"^[^\n]*x\.png: the mask holds 9; [^\n]*$"):
        list(islice(batches_or_data_error(loader), 1))
