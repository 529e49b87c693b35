import numpy as np
import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from downstream.segmentation.data.transforms import (
    EvalTransform,
    TrainTransform,
    distort_colors,
    normalize,
    resize_image,
)


def test_resizing_does_not_blur() -> None:
    """Without antialiasing, a pixel of an image at a third of its size is the central one of nine."""
    image = np.random.default_rng(0).integers(0, 256, (30, 42, 3), dtype=np.uint8)
    assert np.array_equal(resize_image(image, (10, 14)), image[1::3, 1::3])


def test_resizing_is_bilinear() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(x, size=(23, 12), mode="bilinear", align_corners=False)[0]
    difference = resize_image(image, (23, 12)).astype(float) - expected.permute(1, 2, 0).numpy()
    assert np.abs(difference).max() < 1


def test_normalize() -> None:
    image = np.array([[[0, 128, 255]]], dtype=np.uint8)
    expected = (np.array([0, 128, 255]) / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    np.testing.assert_allclose(normalize(image)[:, 0, 0], expected, atol=1e-6)


def labeled_image(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red value says the class of the pixel, 20 x class; classes are quarters of the width."""
    mask = np.broadcast_to(np.arange(width) * 4 // width, (height, width)).astype(np.uint8)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = mask * 20
    return image, mask


def test_image_and_mask_are_cut_and_flipped_together() -> None:
    transform = TrainTransform((96, 64), (0.5, 2.0), 32, colors=False)
    found = set()
    for seed in range(30):
        image, labels = transform(*labeled_image(64, 96), np.random.default_rng(seed))
        assert image.shape == (3, 32, 32)
        assert labels.shape == (32, 32)
        assert labels.dtype == torch.int64
        red = (image[0] * IMAGENET_DEFAULT_STD[0] + IMAGENET_DEFAULT_MEAN[0]) * 255 / 20
        inside = labels != 255
        # But for columns where two classes mix.
        assert ((red - labels).abs() < 0.01)[inside].float().mean() > 0.85
        assert (image[:, ~inside] == 0).all()
        found |= set(labels.unique().tolist())
        first, last = labels[0, 0].item(), labels[0, inside[0].sum() - 1].item()
        found.add("flipped" if first > last else "as it is" if first < last else "one class")
    assert {0, 1, 2, 3, "flipped", "as it is"} <= found


def test_small_images_are_padded_at_the_right_and_the_bottom() -> None:
    transform = TrainTransform((40, 20), (1.0, 1.0), 48, hflip=0.0, colors=False)
    image, labels = transform(*labeled_image(20, 40), np.random.default_rng(0))
    assert (labels[:20, :40] != 255).all()
    assert (labels[20:] == 255).all()
    assert (labels[:, 40:] == 255).all()
    assert (image[:, 20:] == 0).all()
    assert (image[:, :, 40:] == 0).all()


def test_a_crop_that_one_class_covers_is_drawn_anew() -> None:
    """Class 1 is in the left tenth only: of crops of a quarter of the image's width most do not see it."""
    mask = np.zeros((32, 128), dtype=np.uint8)
    mask[:, :13] = 1
    shares = {}
    for limit in (0.75, 1.0):
        transform = TrainTransform((128, 32), (1.0, 1.0), 32, max_category_share=limit)
        crops = [transform.draw_crop(mask, np.random.default_rng(seed)) for seed in range(200)]
        shares[limit] = np.mean([(mask[crop] == 0).mean() < 0.75 for crop in crops])
    # A crop begins at one of 97 columns, and at 0 to 4 it has less than 75% of class 0: 5% of single draws.
    assert shares[1.0] < 0.15
    assert shares[0.75] == pytest.approx(1 - (92 / 97) ** 11, abs=0.1)


def test_ignored_pixels_are_no_class_of_a_crop() -> None:
    """Most of it is ignored, but of the labeled pixels no class has three quarters: the first draw is taken."""
    mask = np.full((40, 40), 255, dtype=np.uint8)
    mask[16], mask[17] = 0, 1  # in every crop
    first, second = np.random.default_rng(0).integers(9, size=2)
    crop = TrainTransform((40, 40), (1.0, 1.0), 32).draw_crop(mask, np.random.default_rng(0))
    assert crop == (slice(first, first + 32), slice(second, second + 32))


def test_colors_change_but_gray_keeps_its_hue() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    results = [distort_colors(image, np.random.default_rng(seed)) for seed in range(40)]
    assert all(x.dtype == np.uint8 and x.shape == image.shape for x in results)
    changed = np.mean([not np.array_equal(x, image) for x in results])
    assert 0.8 < changed <= 1  # 1 - 0.5^4 in the mean
    gray = np.full((4, 4, 3), 100, dtype=np.uint8)
    for seed in range(20):
        x = distort_colors(gray, np.random.default_rng(seed))
        assert (x == x[..., :1]).all()
        assert 34 <= x.max() <= 198  # (100 - 32) / 2 and (100 + 32) x 1.5


def test_eval_transform_gives_each_scale() -> None:
    image = np.zeros((50, 100, 3), dtype=np.uint8)
    sizes = [tuple(x.shape) for x in EvalTransform((128, 64), (0.5, 1.0, 1.75))(image)]
    assert sizes == [(3, 32, 64), (3, 64, 128), (3, 112, 224)]
