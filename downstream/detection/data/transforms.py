"""Augmentation of the published recipe, and batches of images as the detector takes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from downstream.detection.model.structures import Frame, Size, constant
from downstream.transforms import fitting_size

MULTIPLE = 32  # sides of padded images are multiples of this


@dataclass
class Sample:
    """An image (H, W, 3) uint8 with boxes (G, 4), labels (G,) and G masks, each (H, W) uint8."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: list[np.ndarray]


@dataclass(frozen=True)
class TrainTransform:
    """Random flip, then a resize, before which an image may be resized and cropped.

    Attributes:
        short_sides: short sides to choose from for the resize, pixels.
        long_side: largest long side after a resize, pixels.
        flip: probability of a horizontal flip.
        crop: probability of a crop.
        crop_short_sides: short sides to choose from for the resize before a crop, pixels.
        crop_size: smallest and largest side of a crop, pixels; height and width are drawn separately.
    """

    short_sides: Sequence[int]
    long_side: int
    flip: float
    crop: float
    crop_short_sides: Sequence[int]
    crop_size: Sequence[int]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() < self.flip:
            sample = flipped(sample)
        if rng.random() < self.crop:
            sample = resized(sample, short=int(rng.choice(self.crop_short_sides)), long=self.long_side)
            sample = self.cropped(sample, rng)
        return resized(sample, short=int(rng.choice(self.short_sides)), long=self.long_side)

    def cropped(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return a crop of random size and position, without the objects that lie outside."""
        low, high = self.crop_size
        sides = sample.image.shape[:2]
        height, width = (int(rng.integers(min(side, low), min(side, high) + 1)) for side in sides)
        top, left = (int(rng.integers(side - part + 1)) for side, part in zip(sides, (height, width), strict=True))
        boxes = sample.boxes - np.array([left, top, left, top], dtype=np.float32)
        boxes = boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))
        kept = ((boxes[:, 2:] > boxes[:, :2]).all(axis=1)).nonzero()[0]
        area = slice(top, top + height), slice(left, left + width)
        masks = [sample.masks[i][area] for i in kept]
        return Sample(sample.image[area], boxes[kept], sample.labels[kept], masks)


def flipped(sample: Sample) -> Sample:
    """Return the mirror image."""
    width = sample.image.shape[1]
    boxes = sample.boxes.copy()
    boxes[:, [0, 2]] = width - sample.boxes[:, [2, 0]]
    masks = [np.ascontiguousarray(mask[:, ::-1]) for mask in sample.masks]
    return Sample(np.ascontiguousarray(sample.image[:, ::-1]), boxes, sample.labels, masks)


def resized(sample: Sample, *, short: int, long: int) -> Sample:
    """Return the sample at `fitting_size`: bilinear for the image, nearest pixel for masks; boxes are clipped to it."""
    height, width = sample.image.shape[:2]
    new_height, new_width = fitting_size((height, width), short=short, long=long)
    scale = np.array([new_width / width, new_height / height] * 2, dtype=np.float32)
    limits = np.array([new_width, new_height] * 2, dtype=np.float32)
    size = new_width, new_height
    return Sample(
        cv2.resize(sample.image, size, interpolation=cv2.INTER_LINEAR),
        (sample.boxes * scale).clip(0, limits),
        sample.labels,
        [cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) for mask in sample.masks],
    )


def padded_size(size: Size) -> Size:
    """Return both sides rounded up to a multiple of 32."""
    return -(-size[0] // MULTIPLE) * MULTIPLE, -(-size[1] // MULTIPLE) * MULTIPLE


def frame_of(size: Size, original: Size) -> Frame:
    return Frame(size, padded_size(size), original)


def stack_images(images: Sequence[np.ndarray]) -> Tensor:
    """Return a batch (B, 3, H', W') uint8 of images (H, W, 3) uint8, each in the top left corner."""
    height, width = (max(sides) for sides in zip(*(padded_size(image.shape[:2]) for image in images), strict=True))
    batch = torch.zeros(len(images), height, width, 3, dtype=torch.uint8)
    for padded, image in zip(batch, images, strict=True):
        padded[: image.shape[0], : image.shape[1]] = torch.from_numpy(image)
    return batch.permute(0, 3, 1, 2)  # (B, 3, H', W'), in channels_last memory


def normalize(batch: Tensor, frames: Sequence[Frame]) -> Tensor:
    """Return a batch (B, 3, H, W) uint8 normalized by ImageNet's mean and deviation, float32; 0 outside the images."""
    mean, std = (
        255 * constant(values, batch.device)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    normalized = (batch - mean) / std
    for image, frame in zip(normalized, frames, strict=True):
        height, width = frame.size
        image[:, height:] = 0
        image[:, :, width:] = 0
    return normalized
