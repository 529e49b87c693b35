"""The faster operations against Pillow's, and the faster policy against timm's at the same random draws."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp, rand_augment_transform

from data.augmentation import FAST_OPS, fast_policy, posterize
from tests.helpers import photo

FILL = (124, 116, 104)
MOVES = ["ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"]


def test_posterize_by_hand() -> None:
    image = Image.new("RGB", (2, 2), (0b10110111, 255, 1))
    assert posterize(image, 8).getpixel((0, 0)) == (0b10110111, 255, 1)
    assert posterize(image, 2).getpixel((0, 0)) == (0b10000000, 0b11000000, 0)
    assert posterize(image, 0).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("filter_", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("amount", [0.0, 0.3, -0.3, 0.11, -0.0473, 0.45, -0.45])
def test_shears_and_translations_match_pillow_to_one_level(name: str, filter_: Image.Resampling, amount: float) -> None:
    image = photo(63, 50)
    amount = amount * 100 if name in ("TranslateX", "TranslateY") else amount
    ours = np.asarray(FAST_OPS[name](image, amount, fillcolor=FILL, resample=filter_)).astype(int)
    theirs = np.asarray(auto_augment.NAME_TO_OP[name](image, amount, fillcolor=FILL, resample=filter_)).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 0.08


def test_translations_beyond_the_image_leave_only_the_fill_color() -> None:
    for name in ("TranslateX", "TranslateY"):
        moved = FAST_OPS[name](photo(20, 20), 500.0, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
        assert (np.asarray(moved) == FILL).all()


def timm_policy() -> auto_augment.RandAugment:
    return rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": FILL, "interpolation": Image.BICUBIC})


def test_rand_augment_matches_timm_at_the_same_draws() -> None:
    ours: Callable[[torch.Tensor], torch.Tensor] = fast_policy([timm_policy()])
    theirs = timm_policy()
    for op in theirs.ops:
        op.aug_fn = posterize if op.name.startswith("Posterize") else op.aug_fn  # timm's fails with new Pillow
    image = photo(48, 48)
    pixels = torch.from_numpy(np.array(image))
    unchanged = 0
    for seed in range(300):
        random.seed(seed)
        np.random.seed(seed)
        expected = np.asarray(theirs(image)).astype(int)
        state = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr, index]
        random.seed(seed)
        np.random.seed(seed)
        result = ours(pixels)
        assert (random.getstate(), np.random.get_state()[1].tolist()) == state  # type: ignore[union-attr, index]
        unchanged += result is pixels
        # A second operation may enlarge the one level (contrast, equalize), but seldom.
        assert (np.abs(result.numpy().astype(int) - expected) > 2).mean() < 0.05
    assert 50 < unchanged < 100  # a quarter
    assert np.array_equal(pixels.numpy(), np.asarray(image))


def test_operations_keep_their_probability() -> None:
    policy = timm_policy()
    ours = fast_policy([policy])
    for _ in range(20):
        ours(torch.zeros(16, 16, 3, dtype=torch.uint8))
    assert {op.prob for op in policy.ops if isinstance(op, AugmentOp)} == {0.5}
