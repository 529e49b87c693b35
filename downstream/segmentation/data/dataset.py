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
    """(image (3, S, S), labels (S, S)) by Draw, augmented by (seed, turn, image) and nothing else."""

    def __init__(self, images: MaskedImages, transform: TrainTransform, seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, draw.turn, draw.image))
        return self.transform(*self.images.read(draw.image), rng)


class EvalItem(NamedTuple):
    """An image as the network takes it, once for each scale of testing, and what it is compared to."""

    number: int
    inputs: list[Tensor]  # (3, h, w) each
    labels: Tensor  # (H, W) uint8, of the image as it is on disk


class EvalImages(Dataset[EvalItem]):
    """Samples of evaluation by number."""

    def __init__(self, images: MaskedImages, transform: EvalTransform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> EvalItem:
        image, labels = self.images.read(index)
        return EvalItem(index, self.transform(image), torch.from_numpy(labels))
