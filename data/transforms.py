"""From a PIL image to a normalised tensor (3, size, size), for training and for evaluation."""

from collections.abc import Callable
from typing import Any

from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

CROP_FRACTION = 224 / 256


def train_transform(
    size: int,
    *,
    interpolation: str,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    hflip: float,
    auto_augment: str,
    color_jitter: float,
    erase_prob: float,
    erase_mode: str,
    erase_count: int,
) -> Callable[[Any], Tensor]:
    """timm's training pipeline: random crop, flip, augmentation policy (or else colour jitter), normalise, erase.

    Raises:
        ValueError: timm does not understand the augmentation policy.
    """
    try:
        transform = create_transform(
            size,
            is_training=True,
            interpolation=interpolation,
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            auto_augment=None if auto_augment == "none" else auto_augment,
            color_jitter=color_jitter,
            re_prob=erase_prob,
            re_mode=erase_mode,
            re_count=erase_count,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
        )
    except (AssertionError, IndexError, KeyError, ValueError) as error:
        raise ValueError(f"AUG.AUTO_AUGMENT {auto_augment!r}: timm cannot read this policy ({error})") from error
    for step in transform.transforms:
        policies = getattr(step, "policy", None) or [getattr(step, "ops", [])]
        for op in (op for policy in policies for op in policy if op.name.startswith("Posterize")):
            op.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` bits of each value. timm's strongest level asks for none of them, which makes a black
    image, as it always did; from Pillow 13 on ImageOps.posterize refuses 0.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def eval_transform(size: int, *, crop: bool, interpolation: str) -> Callable[[Any], Tensor]:
    """With crop: short side to 256/224 of the size, then its centre; without: both sides to the size."""
    mode = InterpolationMode("bicubic" if interpolation == "random" else interpolation)
    if crop:
        resize = [transforms.Resize(round(size / CROP_FRACTION), interpolation=mode), transforms.CenterCrop(size)]
    else:
        resize = [transforms.Resize((size, size), interpolation=mode)]
    normalise = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return transforms.Compose([*resize, transforms.ToTensor(), normalise])


def denormalise(images: Tensor) -> Tensor:
    """Normalised images (B, 3, H, W) back to colours from 0 to 1, to look at."""
    mean = images.new_tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
    std = images.new_tensor(IMAGENET_DEFAULT_STD)[:, None, None]
    return (images * std + mean).clamp(0, 1)
