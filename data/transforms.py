"""Transforms of decoded images to pixels (size, size, 3), uint8; normalization and erasing follow on the device."""

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
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

from data.augmentation import fast_policy
from data.batch_augmentation import Operation, RecordedPolicy, unsupported_reason
from data.batch_crops import SMALL_SIDE, Crop
from data.batch_decoding import DeviceJpeg
from data.decoding import MAX_PIXELS
from data.errors import DataError
from data.exact_crops import MAX_BYTES, ExactCrop, exact_crop, is_resized_along_width_first

SMALL = 32  # pixels; images of a size up to this are not resized to it, as in the official code
PADDING = 4  # pixels around such images, before training crops them
ERASED_AREA = (0.02, 1 / 3)  # fraction of the image; both ranges as in timm's RandomErasing
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10
FILTER_MARGIN = 16  # pixels that the resizing filter sees beside the crop


class Erasure(NamedTuple):
    """A box to fill with noise, in pixels, and the seed of the noise."""

    top: int
    left: int
    height: int
    width: int
    seed: int


class Sample(NamedTuple):
    """A transformed image, and what remains to be done on the device, in this order."""

    pixels: Tensor  # (size, size, 3) uint8, or with a `crop` what it is made from: pixels, or a JPEG (bytes,)
    crop: Crop | ExactCrop | None = None
    operations: Sequence[Operation] = ()
    erasures: Sequence[Erasure] = ()


Transform = Callable[[Any], Sample]


class TrainTransform:
    """timm's training pipeline: random crop, flip, augmentation policy (or color jitter), erasing.

    Random draws are timm's, in the same order. The crop is cut first and then resized by torch, whose uint8 kernels
    differ from Pillow's by rounding. With a `scale` of None, images that have the size already, if it is SMALL at most,
    are padded and cropped instead.

    Args:
        size: height and width of the result in pixels.
        interpolation: "bicubic", "bilinear" or "random".
        scale: range of the crop's share of the image; None: from 0.08 to 1, and small images are padded.
        ratio: range of the crop's width over its height.
        hflip: probability of a flip.
        auto_augment: timm's name of the augmentation policy, or "none".
        color_jitter: strength of the color jitter, which takes the place of a policy that is "none".
        erase_prob: probability of random erasing.
        erase_count: boxes to erase at most.
        on_device: leave the policy to the device, and resizing and flip of JPEGs that it decodes and of small crops.
        device_side: sides in pixels up to which crops are small, if the result is not larger either.

    Attributes:
        may_move_to_device: whether `on_device` is off, and could be on.

    Raises:
        DataError: timm does not understand the augmentation policy, or the device does not support it.
    """

    def __init__(
        self,
        size: int,
        *,
        interpolation: str,
        scale: tuple[float, float] | None,
        ratio: tuple[float, float],
        hflip: float,
        auto_augment: str,
        color_jitter: float,
        erase_prob: float,
        erase_count: int,
        on_device: bool = False,
        device_side: int = SMALL_SIDE,
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
        self.pads = scale is None and size <= SMALL
        self.crop: RandomResizedCropAndInterpolation = geometry.transforms[0]
        self.hflip = hflip
        self.device_side = device_side
        self.recorded_policy = None
        reason = unsupported_reason(colors.transforms)
        self.may_move_to_device = not on_device and not reason
        if on_device:
            if reason:
                raise DataError(f"DATA.AUGMENT_ON gpu: {reason} there; set it to cpu, or change AUG.AUTO_AUGMENT")
            self.recorded_policy = RecordedPolicy(colors.transforms)
        self.policy = fast_policy([] if on_device else colors.transforms)
        self.erase_prob = erase_prob
        self.erase_count = erase_count

    def __call__(self, image: Tensor | DeviceJpeg) -> Sample:
        """Transform pixels (H, W, 3), uint8, to (size, size, 3), or draw what the device is to do."""
        if self.recorded_policy is None:
            assert isinstance(image, Tensor)
            return Sample(self.policy(self.flip(self.resized_crop(image))), erasures=self.draw_erasures())
        crop = None
        if isinstance(image, DeviceJpeg):
            pixels = torch.frombuffer(bytearray(image.data), dtype=torch.uint8)
            box, mode = self.draw_box(image.height, image.width)
            is_bicubic = mode == InterpolationMode.BICUBIC
            crop = Crop(len(pixels), image.height * image.width, *box, self.size, is_bicubic, self.draw_flip())
        else:
            pixels, mode = self.draw_crop(image)
            is_bicubic = mode == InterpolationMode.BICUBIC
            height, width = pixels.shape[:2]
            if max(self.size, height, width) <= self.device_side:
                crop = Crop(pixels.numel(), 0, 0, 0, height, width, self.size, is_bicubic, self.draw_flip())
            else:
                pixels = self.flip(resize(pixels, self.size, self.size, mode))
        return Sample(pixels, crop, self.recorded_policy(self.size, self.size), self.draw_erasures())

    def resized_crop(self, pixels: Tensor) -> Tensor:
        """Cut a random crop of the pixels (H, W, 3) and resize it to (size, size, 3)."""
        crop, mode = self.draw_crop(pixels)
        return resize(crop, self.size, self.size, mode)

    def draw_crop(self, pixels: Tensor) -> tuple[Tensor, InterpolationMode]:
        """Cut a random crop of the pixels (H, W, 3), and choose the filter of its resizing."""
        if self.pads and tuple(pixels.shape[:2]) == (self.size, self.size):
            return self.padded_crop(pixels), InterpolationMode.BICUBIC  # of the same size, which changes nothing
        (top, left, height, width), mode = self.draw_box(*pixels.shape[:2])
        return pixels[top : top + height, left : left + width], mode

    def draw_box(self, height: int, width: int) -> tuple[tuple[int, int, int, int], InterpolationMode]:
        """Draw top, left, height and width of a crop of an image, and the filter of its resizing."""
        image: Any = image_without_pixels(height, width)
        top, left, rows, columns = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        rows, columns = max(1, rows), max(1, columns)  # they round to 0 in images of a few pixels,
        top, left = min(top, height - rows), min(left, width - columns)  # after the last pixel
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, tuple | list) else modes
        return (top, left, rows, columns), mode

    def padded_crop(self, pixels: Tensor) -> Tensor:
        """Shift the pixels (size, size, 3) by up to PADDING, filling with zeros, as torchvision's RandomCrop does."""
        padded = functional.pad(pixels, (0, 0, PADDING, PADDING, PADDING, PADDING))  # (size + 8, size + 8, 3)
        top, left, *_ = transforms.RandomCrop.get_params(padded.permute(2, 0, 1), (self.size, self.size))
        return padded[top : top + self.size, left : left + self.size]

    def flip(self, pixels: Tensor) -> Tensor:
        """Mirror the pixels (H, W, 3) with probability `hflip`."""
        return pixels.flip(1) if self.draw_flip() else pixels

    def draw_flip(self) -> bool:
        return bool(self.hflip) and torch.rand(1).item() < self.hflip

    def draw_erasures(self) -> list[Erasure]:
        """Draw the boxes of random erasing (Zhong et al., 2020) as timm's RandomErasing does."""
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
    """Resize of the short side to 256/224 of the size and center crop; without `crop`, of both sides to the size.

    Images that have the size already, if it is SMALL at most, stay as they are.

    Attributes:
        on_device: leave the exact resizing to the device, which gets the part of the image that it needs.
    """

    def __init__(self, size: int, *, crop: bool, interpolation: str) -> None:
        self.size = size
        self.crop = crop
        self.mode = InterpolationMode("bilinear" if interpolation == "random" else interpolation)
        self.on_device = False
        self.reference = (
            transforms.Compose([transforms.Resize(short_side(size), self.mode), transforms.CenterCrop(size)])
            if crop
            else transforms.Resize((size, size), self.mode)
        )

    def __call__(self, image: Image.Image | Tensor) -> Sample:
        """Transform a Pillow image exactly, or pixels (H, W, 3), uint8, faster."""
        if self.crop:
            image = self.without_ends(image)
        if isinstance(image, Image.Image):
            if self.keeps(image.height, image.width):
                return Sample(torch.from_numpy(np.array(image)))
            if self.on_device and (crop := self.exact_crop(image)):
                left, top = crop.part_left, crop.part_top
                part = image.crop((left, top, left + crop.part_width, top + crop.part_height))
                return Sample(torch.from_numpy(np.array(part)), crop)
            return Sample(torch.from_numpy(np.array(self.reference(image))))
        height, width = image.shape[:2]
        if self.keeps(height, width):
            return Sample(image)
        height, width, top, left = self.geometry(height, width)
        resized = resize(image, height, width, self.mode)
        return Sample(resized[top : top + self.size, left : left + self.size])

    def geometry(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return height and width to which an image is resized, and top and left of the crop."""
        if self.crop:
            # As torchvision's Resize and CenterCrop: the long side rounded down, offsets rounded half to even.
            short = short_side(self.size)
            height, width = (int(short * side / min(height, width)) for side in (height, width))
        else:
            height = width = self.size
        return height, width, round((height - self.size) / 2), round((width - self.size) / 2)

    def exact_crop(self, image: Image.Image) -> ExactCrop | None:
        """Return the crop of an image for the device, or None if it must be resized here."""
        height, width, *offset = self.geometry(*(image_size := (image.height, image.width)))
        if not is_resized_along_width_first(image_size, (height, width)):
            return None
        is_bicubic = self.mode == InterpolationMode.BICUBIC
        crop = exact_crop(image_size, (height, width), (offset[0], offset[1]), self.size, is_bicubic=is_bicubic)
        return crop if crop.num_bytes <= MAX_BYTES else None

    def without_ends(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        """Cut the ends off a strip that would be resized to more than MAX_PIXELS pixels; the center crop has none."""
        width, height = image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])
        short, long = min(width, height), max(width, height)
        if short_side(self.size) ** 2 * long / short <= MAX_PIXELS:
            return image
        kept = 2 * short + FILTER_MARGIN + (long - FILTER_MARGIN) % 2  # as odd or even as `long`: the center stays
        start = max((long - kept) // 2, 0)
        left, top, right, bottom = (
            (start, 0, start + kept, short) if width > height else (0, start, short, start + kept)
        )
        if isinstance(image, Image.Image):
            return image.crop((left, top, right, bottom))
        return image[top:bottom, left:right]

    def keeps(self, height: int, width: int) -> bool:
        """Return whether an image stays as it is."""
        return self.size <= SMALL and height == width == self.size


@lru_cache(maxsize=4096)
def image_without_pixels(height: int, width: int) -> Tensor:
    """Return a tensor (3, H, W) that has the size of an image, for draws that depend on it alone."""
    return torch.empty(3, height, width, device="meta")


def short_side(size: int) -> int:
    """Return the short side in pixels from which evaluation crops `size`, rounded down as in the official code."""
    return int(256 / 224 * size)


def resize(pixels: Tensor, height: int, width: int, mode: InterpolationMode) -> Tensor:
    """Resize pixels (H, W, 3), uint8, to (height, width, 3) with torch's uint8 kernels, which keep the memory order."""
    images = pixels[None].permute(0, 3, 1, 2)  # (1, 3, H, W)
    resized = functional.interpolate(images, size=(height, width), mode=mode.value, antialias=True)
    return resized[0].permute(1, 2, 0)  # (height, width, 3)


def denormalize(images: Tensor) -> Tensor:
    """Convert normalized images (B, 3, H, W) back to colors from 0 to 1."""
    mean = images.new_tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
    std = images.new_tensor(IMAGENET_DEFAULT_STD)[:, None, None]
    return (images * std + mean).clamp(0, 1)
