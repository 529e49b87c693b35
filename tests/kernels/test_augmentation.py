"""Kernels of the augmentation policies against the PyTorch operations, and those against Pillow in tests/data."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from data import augmentation_kernels
from data.augmentation_kernels import augment_with_kernels
from data.batch_augmentation import IDENTITY, Kind, Operation, RecordedPolicy, augment, rotation
from tests.data.test_batch_augmentation import HPARAMS, to_batch, to_rows
from tests.helpers import photo

SIZE = 23, 17
IMAGES = [photo(*SIZE), photo(*SIZE, seed=1).point(lambda value: 90 + value // 4), Image.new("RGB", SIZE, (7, 7, 9))]

AFFINE = [(1.0, 0.3, 0.0, 0.0, 1.0, 0.0), (1.0, 0.0, -7.5, 0.0, 1.0, 0.0), rotation(17.3, *SIZE), IDENTITY]
LEVELS = {
    Kind.POSTERIZE: (0, 3, 8),
    Kind.SOLARIZE: (0, 77, 256),
    Kind.SOLARIZE_ADD: (0, 60, 110),
    **dict.fromkeys((Kind.BRIGHTNESS, Kind.CONTRAST, Kind.COLOR, Kind.SHARPNESS), (0.1, 0.95, 1.9)),
}


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut these small images into blocks too, the last of which is not full."""
    monkeypatch.setattr(augmentation_kernels, "STATISTICS_BLOCK", 128)


@pytest.mark.parametrize("kind", Kind)
def test_each_operation_gives_the_same_bits(kind: Kind, device: torch.device) -> None:
    """On photographs with and without a full range of values, and one color."""
    if kind >= Kind.BILINEAR:
        operations = [Operation(kind, 0.0, *matrix) for matrix in AFFINE]
    else:
        operations = [Operation(kind, level, *IDENTITY) for level in LEVELS.get(kind, (0.0,))]
    images = to_batch(IMAGES * len(operations))
    rows = to_rows([[operation] for operation in operations for _ in IMAGES])
    result = augment_with_kernels(images.to(device), rows)
    assert result.cpu().equal(augment(images.clone(), rows))


def test_sequences_of_operations_and_images_without_any(device: torch.device) -> None:
    policy = RecordedPolicy([rand_augment_transform("rand-m9-n3-mstd0.5-inc1", dict(HPARAMS))])
    random.seed(0)
    np.random.seed(0)
    photos: list[Image.Image] = [IMAGES[i % 2] for i in range(10)]
    operations = [policy(*image.size) for image in photos]
    operations[3] = []
    assert {len(ops) for ops in operations} >= {0, 1, 2}
    images = to_batch(photos).to(device)
    before = images.clone()
    result = augment_with_kernels(images, to_rows(operations))
    assert result.cpu().equal(augment(to_batch(photos), to_rows(operations)))
    assert images.equal(before)
