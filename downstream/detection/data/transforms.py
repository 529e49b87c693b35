"""From an image with its objects to what the detector takes: the published recipe's augmentation, and evaluation's."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from downstream.detection.model.structures import Frame, Size
from downstream.transforms import fitting_size

MULTIPLE = 32  # of the sides of padded images


@dataclass
class Sample:
    """An image (H, W, 3) uint8 with boxes (G, 4), labels (G,) and bitmaps, each (H, W) uint8."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    bitmaps: list[np.ndarray]


@dataclass(frozen=True)
class TrainTransform:
    """Flip; then either a resize, or a resize, a random crop and another resize.

    Attributes:
        short_sides: one of them is drawn for a resize, in pixels.
        long_side: no image's long side gets longer.
        flip: probability of a horizontal flip.
        crop: probability of a crop.
        crop_short_sides: as short_sides, for the resize before a crop.
        crop_size: smallest and largest side of a crop; height and width are drawn each.
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
        """A part of random size and place; objects of which nothing is left are gone."""
        low, high = self.crop_size
        sides = sample.image.shape[:2]
        height, width = (int(rng.integers(min(side, low), min(side, high) + 1)) for side in sides)
        top, left = (int(rng.integers(side - part + 1)) for side, part in zip(sides, (height, width), strict=True))
        boxes = sample.boxes - np.array([left, top, left, top], dtype=np.float32)
        boxes = boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))
        kept = ((boxes[:, 2:] > boxes[:, :2]).all(axis=1)).nonzero()[0]
        area = slice(top, top + height), slice(left, left + width)
        bitmaps = [sample.bitmaps[i][area] for i in kept]
        return Sample(sample.image[area], boxes[kept], sample.labels[kept], bitmaps)


def flipped(sample: Sample) -> Sample:
    """The mirror image."""
    width = sample.image.shape[1]
    boxes = sample.boxes.copy()
    boxes[:, [0, 2]] = width - sample.boxes[:, [2, 0]]
    bitmaps = [np.ascontiguousarray(bitmap[:, ::-1]) for bitmap in sample.bitmaps]
    return Sample(np.ascontiguousarray(sample.image[:, ::-1]), boxes, sample.labels, bitmaps)


def resized(sample: Sample, *, short: int, long: int) -> Sample:
    """Scaled as `fitting_size` says: the image bilinearly, bitmaps to the nearest pixel; boxes are cut to the image."""
    height, width = sample.image.shape[:2]
    new_height, new_width = fitting_size((height, width), short=short, long=long)
    scale = np.array([new_width / width, new_height / height] * 2, dtype=np.float32)
    limits = np.array([new_width, new_height] * 2, dtype=np.float32)
    size = new_width, new_height
    return Sample(
        cv2.resize(sample.image, size, interpolation=cv2.INTER_LINEAR),
        (sample.boxes * scale).clip(0, limits),
        sample.labels,
        [cv2.resize(bitmap, size, interpolation=cv2.INTER_NEAREST) for bitmap in sample.bitmaps],
    )


def padded_size(size: Size) -> Size:
    """Both sides rounded up to a multiple of 32."""
    return -(-size[0] // MULTIPLE) * MULTIPLE, -(-size[1] // MULTIPLE) * MULTIPLE


def frame_of(size: Size, original: Size) -> Frame:
    return Frame(size, padded_size(size), original)


def stack_images(images: Sequence[np.ndarray]) -> Tensor:
    """Images (H, W, 3) uint8 in the top left corners of a batch (B, 3, H', W') uint8 that holds their padded sizes."""
    height, width = (max(sides) for sides in zip(*(padded_size(image.shape[:2]) for image in images), strict=True))
    batch = torch.zeros(len(images), height, width, 3, dtype=torch.uint8)
    for own, image in zip(batch, images, strict=True):
        own[: image.shape[0], : image.shape[1]] = torch.from_numpy(image)
    return batch.permute(0, 3, 1, 2)  # (B, 3, H', W'), in channels_last memory


def normalize(batch: Tensor, frames: Sequence[Frame]) -> Tensor:
    """A batch (B, 3, H, W) uint8 as float32 with ImageNet's mean and deviation; 0 outside the images."""
    mean = 255 * batch.new_tensor(IMAGENET_DEFAULT_MEAN, dtype=torch.float32)[:, None, None]
    std = 255 * batch.new_tensor(IMAGENET_DEFAULT_STD, dtype=torch.float32)[:, None, None]
    normalized = (batch - mean) / std
    for own, frame in zip(normalized, frames, strict=True):
        height, width = frame.size
        own[:, height:] = 0
        own[:, :, width:] = 0
    return normalized
