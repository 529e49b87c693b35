"""Images of an annotation file as the detector takes them, alone and in batches."""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.samplers import SampleKey
from downstream.detection.data.coco import CocoImages
from downstream.detection.data.transforms import (
    Sample,
    TrainTransform,
    frame_of,
    stack_images,
)
from downstream.detection.model.structures import Frame, Target
from downstream.transforms import fitting_size


class Item(NamedTuple):
    """An image (H, W, 3) uint8, its sizes, its id in the file, and its objects (only for training)."""

    image: np.ndarray
    frame: Frame
    image_id: int
    target: Target | None


class Batch(NamedTuple):
    """Images (B, 3, H, W) uint8, padded, with the sizes, ids and objects of their items."""

    images: Tensor
    frames: list[Frame]
    image_ids: list[int]
    targets: list[Target]

    def pin_memory(self) -> "Batch":
        return self._replace(images=self.images.pin_memory(), targets=[target.pin_memory() for target in self.targets])


class TrainImages(Dataset[Item]):
    """Augmented images by SampleKey; the augmentation follows from (seed, epoch, position) alone."""

    def __init__(self, images: CocoImages, transform: TrainTransform, seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> Item:
        record = self.images[key.position]
        image, masks = self.images.read_image(record), self.images.read_masks(record)
        sample = Sample(image, record.boxes, record.labels, masks)
        sample = self.transform(sample, np.random.default_rng((self.seed, key.epoch, key.position)))
        frame = frame_of(sample.image.shape[:2], (record.height, record.width))
        return Item(sample.image, frame, record.image_id, target_of(sample, frame))


class EvalImages(Dataset[Item]):
    """Images resized for evaluation, by SampleKey."""

    def __init__(self, images: CocoImages, *, short_side: int, long_side: int) -> None:
        self.images = images
        self.short_side = short_side
        self.long_side = long_side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> Item:
        record = self.images[key.position]
        image = self.images.read_image(record)
        return eval_item(image, short_side=self.short_side, long_side=self.long_side, image_id=record.image_id)


def eval_item(image: np.ndarray, *, short_side: int, long_side: int, image_id: int = 0) -> Item:
    """Return an image (H, W, 3) uint8 of any size as an item for evaluation, resized."""
    height, width = fitting_size(image.shape[:2], short=short_side, long=long_side)
    scaled = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return Item(scaled, frame_of((height, width), image.shape[:2]), image_id, None)


def target_of(sample: Sample, frame: Frame) -> Target:
    """Return the objects with masks of the image's padded size, 0 in the padding."""
    masks = torch.zeros(len(sample.masks), *frame.padded, dtype=torch.uint8)
    for padded, mask in zip(masks, sample.masks, strict=True):
        padded[: mask.shape[0], : mask.shape[1]] = torch.from_numpy(np.ascontiguousarray(mask))
    return Target(torch.from_numpy(sample.boxes.astype(np.float32)), torch.from_numpy(sample.labels), masks)


def collate(items: list[Item]) -> Batch:
    return Batch(
        stack_images([item.image for item in items]),
        [item.frame for item in items],
        [item.image_id for item in items],
        [item.target for item in items if item.target is not None],
    )
