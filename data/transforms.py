"""From a decoded image to the pixels of a batch (size, size, 3), uint8; the device normalises and erases."""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from data.augmentation import faster

CROP_FRACTION = 224 / 256
ERASED_AREA = (0.02, 1 / 3)  # of the image, both as in timm's RandomErasing
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


class Erasure(NamedTuple):
    """A rectangle to fill with noise, in pixels, and the seed of the noise."""

    top: int
    left: int
    height: int
    width: int
    seed: int


Transform = Callable[[Any], tuple[Tensor, list[Erasure]]]


class TrainTransform:
    """timm's training pipeline: random crop, flip, augmentation policy (or else colour jitter), erasing.

    Draws are timm's, in its order. The crop is cut before it is resized, by torch's resizing of uint8, which differs
    from Pillow's by rounding; the policy works on the small image.

    Raises:
        ValueError: timm does not understand the augmentation policy.
    """

    def __init__(
        self,
        size: int,
        *,
        interpolation: str,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        hflip: float,
        auto_augment: str,
        color_jitter: float,
        erase_prob: float,
        erase_count: int,
    ) -> None:
        try:
            geometry, colours, _ = create_transform(
                size,
                is_training=True,
                interpolation=interpolation,
                scale=scale,
                ratio=ratio,
                hflip=hflip,
                auto_augment=None if auto_augment == "none" else auto_augment,
                color_jitter=color_jitter or None,  # type: ignore[arg-type]
                separate=True,
            )
        except (AssertionError, IndexError, KeyError, ValueError) as error:
            raise ValueError(f"AUG.AUTO_AUGMENT {auto_augment!r}: timm cannot read this policy ({error})") from error
        self.size = size
        self.crop: RandomResizedCropAndInterpolation = geometry.transforms[0]
        self.hflip = hflip
        self.policy = faster(colours.transforms)
        self.erase_prob = erase_prob
        self.erase_count = erase_count

    def __call__(self, image: Tensor) -> tuple[Tensor, list[Erasure]]:
        """An image (3, H, W), uint8, to one (size, size, 3), and what is to be erased of it."""
        pixels = self.resized_crop(image).permute(1, 2, 0)  # (size, size, 3)
        if self.hflip and torch.rand(1).item() < self.hflip:
            pixels = pixels.flip(1)
        return self.policy(pixels.contiguous()), self.draw_erasures()

    def resized_crop(self, image: Tensor) -> Tensor:
        """A random part of an image (3, H, W), resized to (3, size, size)."""
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        height, width = max(1, height), max(1, width)  # in images of a few pixels they may be rounded to 0
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, tuple | list) else modes
        part = image[:, top : top + height, left : left + width]
        return functional.resize(part, [self.size, self.size], interpolation=mode, antialias=True)

    def draw_erasures(self) -> list[Erasure]:
        """Where random erasing (Zhong et al., 2020) takes effect, as timm's RandomErasing draws it."""
        if not self.erase_prob or random.random() > self.erase_prob:
            return []
        boxes = []
        count = random.randint(1, self.erase_count) if self.erase_count > 1 else 1
        for _ in range(count):
            for _ in range(ERASING_ATTEMPTS):
                area = random.uniform(*ERASED_AREA) * self.size**2 / count
                aspect = math.exp(random.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
                height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if height < self.size and width < self.size:
                    top, left = random.randint(0, self.size - height), random.randint(0, self.size - width)
                    boxes.append((top, left, height, width))
                    break
        return [Erasure(*box, seed=random.getrandbits(62)) for box in boxes]


class EvalTransform:
    """With crop: short side to 256/224 of the size, then its centre; without: both sides to the size."""

    def __init__(self, size: int, *, crop: bool, interpolation: str) -> None:
        self.size = size
        self.resized = [round(size / CROP_FRACTION)] if crop else [size, size]
        self.mode = InterpolationMode("bicubic" if interpolation == "random" else interpolation)

    def __call__(self, image: Image.Image | Tensor) -> tuple[Tensor, list[Erasure]]:
        """An image, as Pillow's or (3, H, W), uint8, to one (size, size, 3); nothing is erased."""
        image = functional.resize(image, self.resized, interpolation=self.mode, antialias=True)
        image = functional.center_crop(image, [self.size, self.size])
        if isinstance(image, Tensor):
            return image.permute(1, 2, 0), []  # (size, size, 3)
        return torch.from_numpy(np.array(image)), []  # (size, size, 3)


def denormalise(images: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) back to colours from 0 to 1, to look at."""
    mean = images.new_tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
    std = images.new_tensor(IMAGENET_DEFAULT_STD)[:, None, None]
    return (images * std + mean).clamp(0, 1)
