"""Transforms of an image (H, W, 3) and its mask (H, W), both uint8, for training and for evaluation."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from downstream.segmentation.model.losses import IGNORED
from downstream.transforms import fitting_size

CROP_TRIES = 10
BRIGHTNESS = 32  # largest change, of 255
FACTORS = (0.5, 1.5)  # range of factors of contrast and saturation
HUE = 18  # largest change, of OpenCV's 180


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H, W, 3) uint8 to (*size, 3), bilinear without antialiasing, as for the published results."""
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def normalize(image: np.ndarray) -> Tensor:
    """Return an image (H, W, 3) uint8 as (3, H, W) float32, normalized by ImageNet's mean and standard deviation."""
    mean, deviation = np.array(IMAGENET_DEFAULT_MEAN) * 255, np.array(IMAGENET_DEFAULT_STD) * 255
    scaled = (image.astype(np.float32) - mean.astype(np.float32)) * (1 / deviation).astype(np.float32)
    return torch.from_numpy(scaled).permute(2, 0, 1)  # (3, H, W)


@dataclass(frozen=True)
class TrainTransform:
    """Augmentation of the published recipe: resize, crop, flip, colors, pad.

    Attributes:
        scale: (long, short) side that the image is fitted into, pixels, before the random ratio.
        ratio: smallest and largest factor of `scale`.
        crop_size: side of the crop, pixels; smaller images are padded at the right and bottom, with ignored labels.
        max_category_share: a crop is redrawn, up to ten times, if one class covers at least this share; 1: never.
        hflip: probability of a horizontal flip.
        colors: randomly change brightness, contrast, saturation and hue.
    """

    scale: tuple[int, int]
    ratio: tuple[float, float]
    crop_size: int
    max_category_share: float = 0.75
    hflip: float = 0.5
    colors: bool = True

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return a normalized image (3, crop_size, crop_size) and labels (crop_size, crop_size), int64."""
        ratio = rng.uniform(*self.ratio)
        long, short = (int(side * ratio) for side in self.scale)
        size = fitting_size(mask.shape[:2], short=short, long=long)
        image, mask = resize_image(image, size), cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
        rows, columns = self.draw_crop(mask, rng)
        image, mask = image[rows, columns], mask[rows, columns]
        if rng.random() < self.hflip:
            image, mask = image[:, ::-1], mask[:, ::-1]
        if self.colors:
            image = distort_colors(image, rng)
        height, width = mask.shape
        images = torch.zeros(3, self.crop_size, self.crop_size)
        images[:, :height, :width] = normalize(image)
        labels = torch.full((self.crop_size, self.crop_size), IGNORED)
        labels[:height, :width] = torch.from_numpy(mask.astype(np.int64))
        return images, labels

    def draw_crop(self, mask: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice]:
        """Return rows and columns of a crop in which no class covers too much, or of the last crop drawn."""
        for _ in range(CROP_TRIES + 1 if self.max_category_share < 1 else 1):
            top, left = (int(rng.integers(max(side - self.crop_size, 0) + 1)) for side in mask.shape)
            crop = slice(top, top + self.crop_size), slice(left, left + self.crop_size)
            counts = np.bincount(mask[crop].ravel(), minlength=256)[:IGNORED]
            if np.count_nonzero(counts) > 1 and counts.max() < self.max_category_share * counts.sum():
                break
        return crop


def distort_colors(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast (before or after the other two), saturation and hue, each with probability 1/2."""
    if rng.random() < 0.5:
        image = stretched(image, 1.0, rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_is_first = rng.random() < 0.5
    if contrast_is_first and rng.random() < 0.5:
        image = stretched(image, rng.uniform(*FACTORS))
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
        hsv[..., 1] = stretched(hsv[..., 1], rng.uniform(*FACTORS))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + rng.integers(-HUE, HUE + 1)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_is_first and rng.random() < 0.5:
        image = stretched(image, rng.uniform(*FACTORS))
    return image


def stretched(values: np.ndarray, factor: float, offset: float = 0.0) -> np.ndarray:
    """Return values * factor + offset, uint8, clipped to 0 and 255."""
    return (values.astype(np.float32) * factor + offset).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class EvalTransform:
    """Resize without crop or padding, once for each factor.

    Attributes:
        scale: (long, short) side that the image is fitted into, pixels, times each factor.
        factors: factors of `scale`; several for multi-scale testing.
    """

    scale: tuple[int, int]
    factors: tuple[float, ...] = (1.0,)

    def __call__(self, image: np.ndarray) -> list[Tensor]:
        """Return normalized images (3, h, w), one for each factor."""
        scales = [[int(side * factor) for side in self.scale] for factor in self.factors]
        sizes = [fitting_size(image.shape[:2], short=short, long=long) for long, short in scales]
        return [normalize(resize_image(image, size)) for size in sizes]
