"""Evaluation's resizing and center crop, left to a GPU that computes Pillow's pixels.

Pillow resizes whole images and rounds to bytes after each axis, with weights of 22 bits. A kernel does the same integer
arithmetic for the pixels of the center crop alone; workers send the part of the image that these are made from.
"""

import math
from typing import NamedTuple

from torch import Tensor

MAX_BYTES = 2**22  # of an image's part; workers resize larger ones, to save memory


class ExactCrop(NamedTuple):
    """A center crop (size, size, 3) of an image resized by Pillow, and the part of the image that it is made from."""

    num_bytes: int  # of the part in the buffer
    part_top: int
    part_left: int
    part_height: int
    part_width: int
    height: int  # of the image
    width: int
    resized_height: int
    resized_width: int
    top: int  # of the crop in the resized image
    left: int
    size: int
    is_bicubic: bool


def exact_crop(
    image_size: tuple[int, int], resized: tuple[int, int], offset: tuple[int, int], size: int, *, is_bicubic: bool
) -> ExactCrop:
    """Return the crop at an offset (top, left) of an image of a size (height, width) that is resized."""
    sides = zip(image_size, resized, offset, strict=True)
    (top, height), (left, width) = (needed_part(*side, size, is_bicubic=is_bicubic) for side in sides)
    part = 3 * height * width, top, left, height, width
    return ExactCrop(*part, *image_size, *resized, *offset, size, is_bicubic)


def whole_exact_crop(pixels: Tensor) -> ExactCrop:
    """Return the crop of pixels (size, size, 3) that are finished."""
    size = len(pixels)
    return exact_crop((size, size), (size, size), (0, 0), size, is_bicubic=True)


def is_resized_along_width_first(image_size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Return whether all versions of Pillow resize an image of a size (height, width) along its width first.

    From version 13 on, it is along the height if that loses over twice as many pixels.
    """
    lost_rows, lost_columns = (side - new for side, new in zip(image_size, resized, strict=True))
    return lost_rows <= max(0, 2 * lost_columns)


def needed_part(side: int, resized: int, offset: int, size: int, *, is_bicubic: bool) -> tuple[int, int]:
    """Return start and length of what the pixels from `offset` on are made from, along an axis."""
    scale = side / resized
    support = max(scale, 1.0) * (2 if is_bicubic else 1)
    start = max(math.trunc((offset + 0.5) * scale - support + 0.5), 0)
    end = min(math.trunc((offset + size - 0.5) * scale + support + 0.5), side)
    return start, end - start
