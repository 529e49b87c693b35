"""Crops of different sizes in one buffer, which a GPU resizes and flips."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import get_worker_info


class Crop(NamedTuple):
    """A crop (height, width, 3) that becomes (size, size, 3)."""

    height: int
    width: int
    size: int
    is_bicubic: bool
    is_flipped: bool


def pack_pixels(images: Sequence[Tensor]) -> Tensor:
    """Copy images (H, W, 3), uint8, of any sizes to one buffer (bytes,), in a loader's worker to shared memory."""
    count = sum(image.numel() for image in images)
    packed = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is None:
        packed.resize_(count)
    else:  # as torch's default_collate: the training process gets it without another copy
        packed.set_(torch.UntypedStorage._new_shared(count))  # type: ignore[call-overload]
    for image, target in zip(images, packed.split([image.numel() for image in images]), strict=True):
        target.view(image.shape).copy_(image)
    return packed


def resize_crops(packed: Tensor, crops: Tensor) -> Tensor:
    """Resize and flip crops. Differs from `resize` of transforms.py by rounding.

    Args:
        packed: pixels of all crops (bytes,), uint8, on any device.
        crops: rows (B, 5), int64, on the CPU: the fields of a Crop each; all have the same size.

    Returns:
        Pixels (B, size, size, 3), uint8.
    """
    rows = [Crop(*row) for row in crops.tolist()]
    size = rows[0].size
    resized = torch.empty(len(rows), 3, size, size, device=packed.device)
    lengths = [3 * crop.height * crop.width for crop in rows]
    for crop, pixels, target in zip(rows, packed.split(lengths), resized, strict=True):
        image = pixels.view(1, crop.height, crop.width, 3).permute(0, 3, 1, 2).float()  # (1, 3, H, W)
        mode = "bicubic" if crop.is_bicubic else "bilinear"
        target.copy_(functional.interpolate(image, size=(size, size), mode=mode, antialias=True)[0])
    images = resized.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()  # (B, size, size, 3)
    flipped = torch.tensor([i for i, crop in enumerate(rows) if crop.is_flipped], dtype=torch.int64)
    index = flipped.to(packed.device, non_blocking=True)
    return images.index_copy_(0, index, images[index].flip(2))
