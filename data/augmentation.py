"""timm's augmentation policies with its slowest operations done in less time, at the same draws and distribution.

Pillow's general affine transform takes 2 ms for a 224x224 image; shears and translations move whole rows or columns,
which four multiplications per value do. Their pixels differ from Pillow's by one level of 255 at most, in a few
hundredths of places (float32 for float64).
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp, RandAugment
from torch import Tensor

Color = tuple[int, int, int]
Filter = Image.Resampling | Sequence[Image.Resampling]


def faster(transforms: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """timm's policy, a sequence of transforms of Pillow's images, as one of pixels (H, W, 3), uint8, that takes less
    time.
    """
    for transform in transforms:
        policies = getattr(transform, "policy", None) or [getattr(transform, "ops", [])]
        for op in (op for policy in policies for op in policy):
            op.aug_fn = FASTER.get(op.name, op.aug_fn)
    if len(transforms) == 1 and type(transforms[0]) is RandAugment:
        return LazyRandAugment(transforms[0])
    return OnImages(transforms)


class OnImages:
    """Transforms of Pillow's images as one of pixels (H, W, 3), uint8."""

    def __init__(self, transforms: Sequence[Any]) -> None:
        self.transforms = transforms

    def __call__(self, pixels: Tensor) -> Tensor:
        if not self.transforms:
            return pixels
        image = Image.fromarray(pixels.numpy())
        for transform in self.transforms:
            image = transform(image)
        return torch.from_numpy(np.array(image))  # (H, W, 3)


class LazyRandAugment:
    """timm's RandAugment, which says beforehand whether it will change an image: a quarter passes unchanged.

    It draws what timm's draws, in the same order.
    """

    def __init__(self, policy: RandAugment) -> None:
        self.policy = policy

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (H, W, 3), uint8, to new ones of the same shape."""
        ops, count, weights = self.policy.ops, self.policy.num_layers, self.policy.choice_weights
        image = None
        for index in np.random.choice(len(ops), count, replace=weights is None, p=weights):
            op = ops[index]
            if op.prob < 1 and random.random() > op.prob:
                continue
            image = Image.fromarray(pixels.numpy()) if image is None else image
            image = apply(op, image)
        return pixels if image is None else torch.from_numpy(np.array(image))  # (H, W, 3)


def apply(op: AugmentOp, image: Image.Image) -> Image.Image:
    """An operation without its own draw of whether to apply it."""
    probability, op.prob = op.prob, 1.0
    try:
        return op(image)
    finally:
        op.prob = probability


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` bits of each value. timm's strongest level asks for none of them, which makes a black
    image, as it always did; from Pillow 13 on ImageOps.posterize refuses 0.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def shear_x(image: Image.Image, factor: float, *, fillcolor: Color, resample: Filter) -> Image.Image:
    return shift_rows(image, factor * (np.arange(image.height) + 0.5), fillcolor, resample)


def translate_x(image: Image.Image, pixels: float, *, fillcolor: Color, resample: Filter) -> Image.Image:
    return shift_rows(image, np.full(image.height, pixels), fillcolor, resample)


def translate_x_relative(image: Image.Image, share: float, *, fillcolor: Color, resample: Filter) -> Image.Image:
    return translate_x(image, share * image.width, fillcolor=fillcolor, resample=resample)


def on_columns(row_wise: Any, image: Image.Image, amount: float, **settings: Any) -> Image.Image:
    """An operation on rows, done on columns."""
    turned = row_wise(image.transpose(Image.Transpose.TRANSPOSE), amount, **settings)
    return turned.transpose(Image.Transpose.TRANSPOSE)


FASTER = {
    "Posterize": posterize,
    "PosterizeIncreasing": posterize,
    "PosterizeOriginal": posterize,
    "ShearX": shear_x,
    "ShearY": partial(on_columns, shear_x),
    "TranslateX": translate_x,
    "TranslateY": partial(on_columns, translate_x),
    "TranslateXRel": translate_x_relative,
    "TranslateYRel": partial(on_columns, translate_x_relative),
}


def shift_rows(image: Image.Image, shifts: np.ndarray, fill: Color, resample: Filter) -> Image.Image:
    """Row y takes its values from `shifts[y]` pixels further right, with `fill` from outside: what
    Image.transform gives for the affine map (x + shifts[y], y), to one level of 255.

    Args:
        shifts: (H,), in pixels.
        resample: bilinear or bicubic, or several to choose from at random.
    """
    kind = resample if isinstance(resample, int) else random.choice(resample)
    pixels = np.asarray(image)  # (H, W, 3)
    width = pixels.shape[1]
    whole = np.floor(shifts).astype(int)
    weights = tap_weights(torch.from_numpy(shifts - whole).float(), kind)  # (taps, H)
    before = len(weights) // 2 - 1  # taps left of the position
    taps = torch.from_numpy(neighbors(pixels, whole - before, width + len(weights) - 1)).float()  # (H, W + taps - 1, 3)
    shifted = taps[:, :width] * weights[0, :, None, None]  # (H, W, 3)
    for offset, weight in enumerate(weights[1:], 1):
        shifted.addcmul_(taps[:, offset : offset + width], weight[:, None, None])
    values = shifted.clamp_(0, 255).to(torch.uint8).numpy()  # cut off, not rounded, as Pillow does
    positions = np.arange(width) + 0.5 + shifts[:, None]  # (H, W)
    values[(positions < 0) | (positions >= width)] = fill
    return Image.fromarray(values)


def tap_weights(fraction: Tensor, kind: int) -> Tensor:
    """Weights (taps, N) of the neighbors for positions `fraction` (N,) after the pixel in the middle. Pillow's cubic
    here is the one with a = -1, and not that of its resizing, where a = -0.5.
    """
    if kind == Image.Resampling.BILINEAR:
        return torch.stack((1 - fraction, fraction))
    square = fraction**2
    cube = square * fraction
    return torch.stack((2 * square - cube - fraction, 1 - 2 * square + cube, fraction + square - cube, cube - square))


def neighbors(pixels: np.ndarray, starts: np.ndarray, count: int) -> np.ndarray:
    """From row y, `count` pixels from column starts[y] on (H, count, 3); beyond the edge, that at the edge."""
    height, width, _ = pixels.shape
    out = np.empty((height, count, 3), dtype=np.uint8)
    bounds = np.flatnonzero(np.diff(starts)) + 1  # neighboring rows mostly start alike
    for top, bottom in zip([0, *bounds], [*bounds, height], strict=True):
        start = starts[top]
        left, right = np.clip([-start, width - start], 0, count)  # of what lies inside
        rows = pixels[top:bottom]
        out[top:bottom, :left] = rows[:, :1]
        out[top:bottom, left:right] = rows[:, start + left : start + right]
        out[top:bottom, right:] = rows[:, -1:]
    return out
