"""From a decoded image to the pixels of a batch (size, size, 3), uint8; the device normalizes and erases."""

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
from torch.nn import functional
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from data.augmentation import faster
from data.errors import DataError

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
    """timm's training pipeline: random crop, flip, augmentation policy (or else color jitter), erasing.

    Draws are timm's, in its order. The crop is cut before it is resized, by torch's resizing of uint8, which differs
    from Pillow's by rounding; the policy works on the small image.

    Raises:
        DataError: timm does not understand the augmentation policy.
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
            geometry, colors, _ = create_transform(
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
            raise DataError(f"AUG.AUTO_AUGMENT {auto_augment!r}: timm cannot read this policy ({error})") from error
        self.size = size
        self.crop: RandomResizedCropAndInterpolation = geometry.transforms[0]
        self.hflip = hflip
        self.policy = faster(colors.transforms)
        self.erase_prob = erase_prob
        self.erase_count = erase_count

    def __call__(self, pixels: Tensor) -> tuple[Tensor, list[Erasure]]:
        """Pixels (H, W, 3), uint8, to (size, size, 3), and what is to be erased of them."""
        return self.policy(self.flip(self.resized_crop(pixels))), self.draw_erasures()

    def resized_crop(self, pixels: Tensor) -> Tensor:
        """A random part of the pixels (H, W, 3), resized to (size, size, 3)."""
        top, left, height, width = self.crop.get_params(pixels.permute(2, 0, 1), self.crop.scale, self.crop.ratio)
        height, width = max(1, height), max(1, width)  # in images of a few pixels they may be rounded to 0
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, tuple | list) else modes
        return resize(pixels[top : top + height, left : left + width], self.size, self.size, mode)

    def flip(self, pixels: Tensor) -> Tensor:
        """Pixels (H, W, 3), perhaps as in a mirror."""
        return pixels.flip(1) if self.hflip and torch.rand(1).item() < self.hflip else pixels

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
    """With crop: short side to 256/224 of the size, then its center; without: both sides to the size."""

    def __init__(self, size: int, *, crop: bool, interpolation: str) -> None:
        self.size = size
        self.crop = crop
        self.mode = InterpolationMode("bicubic" if interpolation == "random" else interpolation)
        short = round(size / CROP_FRACTION)
        self.plain = (
            transforms.Compose([transforms.Resize(short, self.mode), transforms.CenterCrop(size)])
            if crop
            else transforms.Resize((size, size), self.mode)
        )

    def __call__(self, image: Image.Image | Tensor) -> tuple[Tensor, list[Erasure]]:
        """An image of Pillow's, or pixels (H, W, 3), uint8, to pixels (size, size, 3); nothing is erased."""
        if isinstance(image, Image.Image):
            return torch.from_numpy(np.array(self.plain(image))), []  # (size, size, 3)
        height, width = image.shape[:2]
        if self.crop:
            # As torchvision's Resize and CenterCrop have it: the long side rounded down, the middle to even numbers.
            short = round(self.size / CROP_FRACTION)
            height, width = (int(short * side / min(height, width)) for side in (height, width))
        else:
            height = width = self.size
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        resized = resize(image, height, width, self.mode)
        return resized[top : top + self.size, left : left + self.size], []  # (size, size, 3)


def resize(pixels: Tensor, height: int, width: int, mode: InterpolationMode) -> Tensor:
    """Pixels (H, W, 3), uint8, to (height, width, 3), by torch's kernels for uint8; they keep the memory's order."""
    images = pixels[None].permute(0, 3, 1, 2)  # (1, 3, H, W)
    resized = functional.interpolate(images, size=(height, width), mode=mode.value, antialias=True)
    return resized[0].permute(1, 2, 0)  # (height, width, 3)


def denormalize(images: Tensor) -> Tensor:
    """Normalized images (B, 3, H, W) back to colors from 0 to 1, to look at."""
    mean = images.new_tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
    std = images.new_tensor(IMAGENET_DEFAULT_STD)[:, None, None]
    return (images * std + mean).clamp(0, 1)
