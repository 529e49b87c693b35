"""Crops of different sizes in one buffer, which a GPU resizes and flips, and decodes if they are JPEGs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import get_worker_info

from data.batch_decoding import decode_in_groups


class Crop(NamedTuple):
    """A crop (height, width, 3) that becomes (size, size, 3)."""

    num_bytes: int  # in the buffer: the pixels of the crop, or the JPEG that it is cut from
    jpeg_pixels: int  # of the whole JPEG; 0: none
    top: int  # in the JPEG
    left: int
    height: int
    width: int
    size: int
    is_bicubic: bool
    is_flipped: bool


def pack_bytes(images: Sequence[Tensor]) -> Tensor:
    """Copy images (H, W, 3) or files (bytes,), uint8, to one buffer (bytes,), in a loader's worker in shared memory."""
    count = sum(image.numel() for image in images)
    packed = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is None:
        packed.resize_(count)
    else:  # as torch's default_collate: the training process gets it without another copy
        packed.set_(torch.UntypedStorage._new_shared(count))  # type: ignore[call-overload]
    for image, target in zip(images, packed.split([image.numel() for image in images]), strict=True):
        target.view(image.shape).copy_(image)
    return packed


def resize_crops(packed: Tensor, crops: Tensor, device: torch.device) -> Tensor:
    """Resize and flip crops. Differs from `resize` of transforms.py by rounding.

    Args:
        packed: bytes of all crops (bytes,), uint8, on the CPU.
        crops: rows (B, 9), int64, on the CPU: the fields of a Crop each; all have the same size.
        device: of the result.

    Returns:
        Pixels (B, size, size, 3), uint8.

    Raises:
        BrokenImageError: a JPEG cannot be decoded.
    """
    rows = [Crop(*row) for row in crops.tolist()]
    size = rows[0].size
    resized = torch.empty(len(rows), 3, size, size, device=device)
    for crop, pixels, target in zip(rows, crop_pixels(packed, rows, device), resized, strict=True):
        mode = "bicubic" if crop.is_bicubic else "bilinear"
        target.copy_(functional.interpolate(pixels[None].float(), size=(size, size), mode=mode, antialias=True)[0])
    images = resized.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()  # (B, size, size, 3)
    flipped = torch.tensor([i for i, crop in enumerate(rows) if crop.is_flipped], dtype=torch.int64)
    index = flipped.to(device, non_blocking=True)
    return images.index_copy_(0, index, images[index].flip(2))


def crop_pixels(packed: Tensor, rows: Sequence[Crop], device: torch.device) -> Iterator[Tensor]:
    """Yield pixels (3, height, width) of each crop on the device, uint8."""
    jpeg_pixels = [crop.jpeg_pixels for crop in rows if crop.jpeg_pixels]
    if not jpeg_pixels:
        packed = packed.to(device, non_blocking=True)
    parts = packed.split([crop.num_bytes for crop in rows])
    jpegs = [part for part, crop in zip(parts, rows, strict=True) if crop.jpeg_pixels]
    images = decode_in_groups(jpegs, jpeg_pixels, device)
    for part, crop in zip(parts, rows, strict=True):
        if crop.jpeg_pixels:
            yield next(images)[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        else:
            yield part.view(crop.height, crop.width, 3).permute(2, 0, 1).to(device, non_blocking=True)
