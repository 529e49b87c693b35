"""Images with masks as the network takes them, in training and in evaluation."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from downstream.segmentation.data.masked_images import MaskedImages
from downstream.segmentation.data.samplers import Draw
from downstream.segmentation.data.transforms import EvalTransform, TrainTransform


class TrainImages(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of image (3, S, S) and labels (S, S) by Draw; the augmentation follows from (seed, epoch, image) alone."""

    def __init__(self, images: MaskedImages, transform: TrainTransform, seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, draw.epoch, draw.image))
        return self.transform(*self.images.read(draw.image), rng)


class EvalItem(NamedTuple):
    """An image at each scale of testing, and its labels.

    Attributes:
        position: index in the dataset.
        inputs: normalized images (3, h, w), one for each scale.
        labels: (H, W) uint8, at the size of the image file.
    """

    position: int
    inputs: list[Tensor]
    labels: Tensor


class EvalImages(Dataset[EvalItem]):
    """Images for evaluation by index."""

    def __init__(self, images: MaskedImages, transform: EvalTransform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> EvalItem:
        image, labels = self.images.read(index)
        return EvalItem(index, self.transform(image), torch.from_numpy(labels))
