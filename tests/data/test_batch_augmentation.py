"""Augmentation of whole batches against Pillow's operations, and recorded policies against timm's at the same draws."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, auto_augment_transform, rand_augment_transform
from torch import Tensor
from torchvision.transforms import ColorJitter

from data.augmentation import posterize
from data.batch_augmentation import (
    FILL,
    RECORDERS,
    Operation,
    OperationRecorder,
    RecordedPolicy,
    augment,
    unsupported_reason,
)
from tests.helpers import photo

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
HPARAMS = {"img_mean": tuple(FILL), "interpolation": (BILINEAR, BICUBIC)}
FACTORS = (0.1, 0.95, 1.0, 1.9)
LEVELS: dict[str, Sequence[float]] = {
    "Rotate": (0, 17.3, -30, 45),
    "Posterize": (0, 1, 3, 8),
    "Solarize": (0, 77, 256),
    "SolarizeAdd": (0, 60, 110),
    "Desaturate": (0.0, 0.7, 1.0),
    "ShearX": (0.3, -0.0473),
    "ShearY": (0.3, -0.0473),
    "TranslateX": (7.5, -60, 500),
    "TranslateY": (7.5, -60, 500),
    "TranslateXRel": (0.45, -0.11),
    "TranslateYRel": (0.45, -0.11),
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), FACTORS),
}
AFFINE = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")
IMAGES = [
    photo(61, 50),
    photo(61, 50, seed=1).point(lambda value: 90 + value // 4),
    Image.new("RGB", (61, 50), (7, 7, 9)),
]


def to_batch(images: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.array(image) for image in images]))


def to_rows(operations: Sequence[Sequence[Operation]]) -> Tensor:
    rows = [(i, place, *op) for i, ops in enumerate(operations) for place, op in enumerate(ops)]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 10)


def pillow(name: str, image: Image.Image, *args: float, **settings: Any) -> Image.Image:
    """Apply timm's operation; its posterizing fails with new versions of Pillow."""
    function = posterize if name.startswith("Posterize") else NAME_TO_OP[name]
    return function(image, *args, **settings)


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("name", sorted(RECORDERS))
def test_operations_match_pillow(name: str, resample: Image.Resampling) -> None:
    """Equal, and to one level where positions are computed; images with and without a full range of values."""
    stem = name.removesuffix("Increasing").removesuffix("Original")
    for args in [[level] for level in LEVELS[stem]] if stem in LEVELS else [[]]:
        settings = {"fillcolor": tuple(FILL), "resample": resample}
        expected = to_batch([pillow(name, image, *args, **settings) for image in IMAGES]).int()
        operations = [RECORDERS[name](OperationRecorder(*image.size), *args, **settings).operations for image in IMAGES]
        difference = (augment(to_batch(IMAGES), to_rows(operations)).int() - expected).abs()
        assert difference.max() <= (name in AFFINE)
        assert (difference > 0).float().mean() < 0.02


def make_policy(name: str) -> Any:
    make = auto_augment_transform if name in ("original", "v0") else rand_augment_transform
    return make(name, dict(HPARAMS))


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "rand-m9-n3-tweights", "original", "v0"])
def test_policies_make_timms_draws(name: str) -> None:
    theirs, ours = make_policy(name), RecordedPolicy([make_policy(name)])
    assert not unsupported_reason(ours.transforms)
    for policy in getattr(theirs, "policy", None) or [theirs.ops]:
        for op in policy:
            op.aug_fn = posterize if op.name.startswith("Posterize") else op.aug_fn
    images = [photo(40, 40, seed) for seed in range(60)]
    expected, operations = [], []
    for seed, image in enumerate(images):
        states = []
        for policy, results, args in ((theirs, expected, [image]), (ours, operations, image.size)):
            random.seed(seed)
            np.random.seed(seed)
            results.append(policy(*args))
            states.append((random.getstate(), np.random.get_state()[1].tolist()))  # type: ignore[union-attr, index]
        assert states[0] == states[1]
    assert len({len(ops) for ops in operations}) > 1
    batch = to_batch(images)
    result = augment(batch, to_rows(operations))
    assert result is batch
    difference = (result.int() - to_batch(expected).int()).abs()
    assert (difference > 1).float().mean() < 1e-3  # a second operation may enlarge the one level


def test_a_batch_has_the_same_pixels_as_its_parts() -> None:
    policy, images = RecordedPolicy([make_policy("rand-m9-mstd0.5-inc1")]), [photo(24, 24, seed) for seed in range(16)]
    operations = [policy(24, 24) for _ in images]
    together = augment(to_batch(images), to_rows(operations))
    for image, ops, expected in zip(images, operations, together, strict=True):
        assert torch.equal(augment(to_batch([image]), to_rows([ops]))[0], expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_rounds_alike() -> None:
    policy, images = (
        RecordedPolicy([make_policy("rand-m9-n3-mstd0.5-inc1")]),
        [photo(64, 64, seed) for seed in range(64)],
    )
    rows = to_rows([policy(64, 64) for _ in images])
    results = [augment(to_batch(images).cuda(), rows) for _ in range(2)]
    assert torch.equal(*results)
    difference = (results[0].cpu().int() - augment(to_batch(images), rows).int()).abs()
    assert (difference > 1).float().mean() < 1e-3


def test_unsupported_policies_are_named() -> None:
    assert unsupported_reason([make_policy("rand-m9-t3a")]) == "GaussianBlur is not supported"
    assert unsupported_reason([ColorJitter(0.4)]) == "ColorJitter is not supported"
