import numpy as np
import pytest
import torch

from downstream.detection.data.dataset import Item, collate, target_of
from downstream.detection.data.transforms import (
    Sample,
    TrainTransform,
    flipped,
    frame_of,
    normalize,
    padded_size,
    resized,
    stack_images,
)
from downstream.detection.model.structures import Frame

RECIPE = TrainTransform(
    short_sides=list(range(480, 801, 32)),
    long_side=1333,
    flip=0.5,
    crop=0.5,
    crop_short_sides=[400, 500, 600],
    crop_size=[384, 600],
)


def sample(height: int = 48, width: int = 64) -> Sample:
    """Two filled boxes, red and green, whose masks are their pixels."""
    boxes = np.array([[8, 8, 24, 40], [32, 16, 56, 32]], dtype=np.float32)
    image, masks = np.zeros((height, width, 3), dtype=np.uint8), []
    for channel, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        image[y1:y2, x1:x2, channel] = 255
        masks.append((image[..., channel] > 0).astype(np.uint8))
    return Sample(image, boxes, np.array([3, 5]), masks)


def check_together(one: Sample, tolerance: float) -> None:
    """Boxes, masks and colors still say the same."""
    for box, label, mask in zip(one.boxes, one.labels, one.masks, strict=True):
        channel = {3: 0, 5: 1}[int(label)]
        assert mask.shape == one.image.shape[:2]
        assert ((one.image[..., channel] > 127) != mask).mean() < 0.02
        if mask.any():
            rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
            tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(box - tight).max() <= tolerance


def test_flip() -> None:
    one = flipped(sample())
    assert one.boxes.tolist() == [[40, 8, 56, 40], [8, 16, 32, 32]]
    check_together(one, 0)
    twice = flipped(one)
    assert (twice.image == sample().image).all()


def test_resize() -> None:
    one = resized(sample(), short=96, long=1333)
    assert one.image.shape == (96, 128, 3)
    assert one.boxes.tolist() == [[16, 16, 48, 80], [64, 32, 112, 64]]
    check_together(one, 1)


@pytest.mark.parametrize("seed", range(25))
def test_recipe(seed: int) -> None:
    """Sizes are within what the recipe allows, objects stay where they are on the image."""
    one = RECIPE(sample(240, 320), np.random.default_rng(seed))
    height, width = one.image.shape[:2]
    assert max(height, width) <= 1333
    assert min(height, width) in RECIPE.short_sides or max(height, width) == 1333
    assert (one.boxes[:, 2:] > one.boxes[:, :2]).all()
    assert (one.boxes <= np.array([width, height, width, height])).all()
    check_together(one, 8)  # a pixel of 240 is up to 7 after two resizes


def test_all_of_the_recipe_is_drawn() -> None:
    rng = np.random.default_rng(0)
    outcomes = [RECIPE(sample(300, 400), rng) for _ in range(150)]
    ratios = [one.image.shape[1] / one.image.shape[0] for one in outcomes]
    whole = np.isclose(ratios, 4 / 3, atol=0.01)
    assert 0.3 < whole.mean() < 0.7
    shorts = {min(one.image.shape[:2]) for one, is_whole in zip(outcomes, whole, strict=True) if is_whole}
    assert shorts == set(RECIPE.short_sides)
    assert any(len(one.boxes) < 2 for one in outcomes)
    is_red_first = [one.boxes[0, 0] < one.boxes[1, 0] for one in outcomes if len(one.boxes) == 2]
    assert 0.3 < np.mean(is_red_first) < 0.7  # flipped or not


def test_what_is_drawn_follows_the_generator() -> None:
    one, other = (RECIPE(sample(), np.random.default_rng((0, 1, 2))) for _ in range(2))
    assert (one.image == other.image).all()
    assert (one.boxes == other.boxes).all()


def test_padding() -> None:
    assert padded_size((800, 1333)) == (800, 1344)
    assert padded_size((1, 32)) == (32, 32)
    assert frame_of((800, 1333), (480, 800)) == Frame((800, 1333), (800, 1344), (480, 800))
    images = [np.full((40, 60, 3), 7, dtype=np.uint8), np.full((64, 33, 3), 9, dtype=np.uint8)]
    batch = stack_images(images)
    assert batch.shape == (2, 3, 64, 64)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert (batch[0, :, :40, :60] == 7).all()
    assert batch.sum() == 7 * 40 * 60 * 3 + 9 * 64 * 33 * 3


def test_normalizing_leaves_padding_at_zero() -> None:
    images = [np.full((40, 60, 3), 124, dtype=np.uint8), np.full((64, 33, 3), 9, dtype=np.uint8)]
    frames = [frame_of(image.shape[:2], image.shape[:2]) for image in images]
    batch = normalize(stack_images(images), frames)
    assert batch[0, 0, 5, 5].item() == pytest.approx((124 - 123.675) / 58.395, abs=1e-5)
    assert batch[1, 2, 63, 32].item() == pytest.approx((9 - 103.53) / 57.375, abs=1e-5)
    assert not batch[0, :, 40:].any()
    assert not batch[0, :, :, 60:].any()
    assert not batch[1, :, :, 33:].any()


def test_targets_are_on_the_images_own_padded_size() -> None:
    one = sample()
    frame = frame_of((48, 64), (48, 64))
    target = target_of(one, frame)
    assert target.masks.shape == (2, 64, 64)
    assert target.masks[0].sum() == 16 * 32
    assert not target.masks[:, 48:].any()
    batch = collate([Item(one.image, frame, 7, target), Item(one.image, frame, 8, target)])
    assert batch.images.shape == (2, 3, 64, 64)
    assert (batch.image_ids, len(batch.targets)) == ([7, 8], 2)
