from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.errors import DataError
from data.workers import RestartingDataLoader
from downstream.build import set_up_worker
from downstream.segmentation.data.dataset import EvalImages, TrainImages
from downstream.segmentation.data.masked_images import MaskedImages
from downstream.segmentation.data.samplers import Draw, EndlessBatches
from downstream.segmentation.data.transforms import EvalTransform, TrainTransform


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
    samples = TrainImages(images, TrainTransform((64, 32), (0.5, 2.0), 32), seed=1)
    return DataLoader(samples, batch_sampler=batches, num_workers=num_workers, worker_init_fn=set_up_worker)


def test_augmentation_follows_from_the_draw_alone(folder: Path) -> None:
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


def test_eval_items_keep_the_labels_of_the_files(folder: Path) -> None:
    images = MaskedImages(str(folder), "val", layout="folder", reduce_zero_label=False)
    loader = DataLoader(EvalImages(images, EvalTransform((64, 32), (1.0, 2.0))), batch_size=None)
    for index, sample in enumerate(loader):
        assert sample.position == index
        assert np.array_equal(sample.labels.numpy(), images.read(index)[1])
        assert [min(x.shape[1:]) for x in sample.inputs] == [32, 64]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_errors_are_one_line_from_workers_too(tmp_path: Path, num_workers: int) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "images/train/x.png")
    Image.new("L", (40, 40), 9).save(tmp_path / "masks/train/x.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    images = MaskedImages(str(tmp_path), "train", layout="folder", reduce_zero_label=False)
    loader = RestartingDataLoader(EvalImages(images, EvalTransform((32, 32))), batch_size=None, num_workers=num_workers)
    with pytest.raises(DataError, match=r"^[^\n]*x\.png: the mask holds 9; [^\n]*$"):
        list(islice(loader, 1))
