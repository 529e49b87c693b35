"""timm's augmentation policies with faster shears and translations, at the same random draws.

Pillow's general affine transform takes 2 ms for a 224x224 image. Shears and translations move whole rows or columns,
for which four multiplications per value are enough. A few percent of values differ from Pillow's, by one level of 255
at most (float32 instead of float64).
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


def fast_policy(transforms: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """Return a faster transform of pixels (H, W, 3), uint8, from timm's policy, a sequence of Pillow transforms."""
    for transform in transforms:
        policies = getattr(transform, "policy", None) or [getattr(transform, "ops", [])]
        for op in (op for policy in policies for op in policy):
            op.aug_fn = FAST_OPS.get(op.name, op.aug_fn)
    if len(transforms) == 1 and type(transforms[0]) is RandAugment:
        return LazyRandAugment(transforms[0])
    return PillowTransforms(transforms)


class PillowTransforms:
    """Sequence of Pillow transforms as one transform of pixels (H, W, 3), uint8."""

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
    """timm's RandAugment without conversion of the images that it does not change, a quarter.

    Random draws are timm's, in the same order.
    """

    def __init__(self, policy: RandAugment) -> None:
        self.policy = policy

    def __call__(self, pixels: Tensor) -> Tensor:
        """Augment pixels (H, W, 3), uint8; the input is not modified."""
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
    """Apply an operation without its own draw of whether to apply it."""
    probability, op.prob = op.prob, 1.0
    try:
        return op(image)
    finally:
        op.prob = probability


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` bits of each value. timm's strongest level keeps none, which makes a black image;
    ImageOps.posterize rejects 0 since Pillow 13.
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
    """Apply an operation on rows to columns."""
    transposed = row_wise(image.transpose(Image.Transpose.TRANSPOSE), amount, **settings)
    return transposed.transpose(Image.Transpose.TRANSPOSE)


FAST_OPS = {
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
    """Shift each row to the left, as Image.transform does for the affine map (x + shifts[y], y).

    Args:
        shifts: shift of each row in pixels (H,).
        fill: color of pixels from outside the image.
        resample: bilinear or bicubic, or several to choose from at random.
    """
    kind = resample if isinstance(resample, int) else random.choice(resample)
    pixels = np.asarray(image)  # (H, W, 3)
    width = pixels.shape[1]
    whole = np.floor(shifts).astype(int)
    weights = tap_weights(torch.from_numpy(shifts - whole).float(), kind)  # (taps, H)
    before = len(weights) // 2 - 1  # taps to the left of the position
    taps = torch.from_numpy(neighbors(pixels, whole - before, width + len(weights) - 1)).float()  # (H, W + taps - 1, 3)
    shifted = taps[:, :width] * weights[0, :, None, None]  # (H, W, 3)
    for offset, weight in enumerate(weights[1:], 1):
        shifted.addcmul_(taps[:, offset : offset + width], weight[:, None, None])
    values = shifted.clamp_(0, 255).to(torch.uint8).numpy()  # truncated, not rounded, as in Pillow
    positions = np.arange(width) + 0.5 + shifts[:, None]  # (H, W)
    whole_pixels = values.view("V3")[..., 0]  # (H, W), of three bytes each, which NumPy fills several times faster
    whole_pixels[(positions < 0) | (positions >= width)] = np.array(fill, dtype=np.uint8).view("V3")[0]
    return Image.fromarray(values)


def tap_weights(fraction: Tensor, kind: int) -> Tensor:
    """Return weights (taps, N) of the neighbors for positions `fraction` (N,) to the right of a pixel.

    Pillow's cubic kernel has a = -1 in affine transforms, while its resizing has a = -0.5.
    """
    if kind == Image.Resampling.BILINEAR:
        return torch.stack((1 - fraction, fraction))
    square = fraction**2
    cube = square * fraction
    return torch.stack((2 * square - cube - fraction, 1 - 2 * square + cube, fraction + square - cube, cube - square))


def neighbors(pixels: np.ndarray, starts: np.ndarray, count: int) -> np.ndarray:
    """Return `count` pixels of each row y from column starts[y] on (H, count, 3), with edge pixels repeated."""
    height, width, _ = pixels.shape
    out = np.empty((height, count, 3), dtype=np.uint8)
    bounds = np.flatnonzero(np.diff(starts)) + 1  # adjacent rows mostly have the same start
    for top, bottom in zip([0, *bounds], [*bounds, height], strict=True):
        start = int(starts[top])
        left, right = (min(max(x, 0), count) for x in (-start, width - start))  # of the columns inside the image
        rows = pixels[top:bottom]
        out[top:bottom, :left] = rows[:, :1]
        out[top:bottom, left:right] = rows[:, start + left : start + right]
        out[top:bottom, right:] = rows[:, -1:]
    return out
