"""Small crops and JPEGs of different sizes in one buffer, which a GPU decodes, resizes and flips.

PyTorch resizes small crops all together. Large ones it resizes one by one, and a GPU would wait for the CPU, which
starts four kernels for each: workers resize the large crops of the images that they decode, unless the GPU decodes
JPEGs as well.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import get_worker_info

from data.batch_decoding import decode_in_groups

SMALL_SIDE = 64  # pixels; crops with sides up to this are resized together
LARGE_SIDE = 512  # up to which crops go to a device that also decodes; larger ones would take much shared memory
MAX_VALUES = 2**23  # of small crops that are resized at once, which takes 200 MB


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


def whole_crop(pixels: Tensor) -> Crop:
    """Return the crop of pixels (size, size, 3) that are finished."""
    size = len(pixels)
    return Crop(pixels.numel(), 0, 0, 0, size, size, size, is_bicubic=True, is_flipped=False)


def pack_bytes(images: Sequence[Tensor]) -> Tensor:
    """Copy images (H, W, 3) or files (bytes,), uint8, to one buffer (bytes,), in a loader's worker in shared memory."""
    sizes = [image.numel() for image in images]
    count = sum(sizes)
    packed = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is None:
        packed.resize_(count)
    else:  # as torch's default_collate: the training process gets it without another copy
        packed.set_(torch.UntypedStorage._new_shared(count))  # type: ignore[call-overload]
    values, end = packed.numpy(), 0  # NumPy copies small arrays faster
    for image, size in zip(images, sizes, strict=True):
        start, end = end, end + size
        values[start:end].reshape(image.shape)[...] = image.numpy()
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
    size, starts = rows[0].size, crops[:, 0].cumsum(0) - crops[:, 0]
    on_device = packed if all(crop.jpeg_pixels for crop in rows) else packed.to(device, non_blocking=True)
    resized = torch.empty(len(rows), size, size, 3, device=device)
    small = torch.tensor([i for i, crop in enumerate(rows) if is_small(crop)], dtype=torch.int64)
    for part in small.split(max(1, MAX_VALUES // (3 * SMALL_SIDE * size))):
        if len(part):
            pixels = resize_small(on_device, starts[part], crops[part])
            resized.index_copy_(0, part.to(device, non_blocking=True), pixels)
    jpegs = [(i, crop) for i, crop in enumerate(rows) if crop.jpeg_pixels]
    begins = starts.tolist()
    files = [packed[begins[i] : begins[i] + crop.num_bytes] for i, crop in jpegs]
    images = decode_in_groups(files, [crop.jpeg_pixels for _, crop in jpegs], device)
    for i, crop in enumerate(rows):
        if is_small(crop):
            continue
        if crop.jpeg_pixels:
            cut = next(images)[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        else:
            pixels = on_device[begins[i] : begins[i] + crop.num_bytes]
            cut = pixels.view(crop.height, crop.width, 3).permute(2, 0, 1)  # (3, height, width)
        mode = "bicubic" if crop.is_bicubic else "bilinear"
        image = functional.interpolate(cut[None].float(), size=(size, size), mode=mode, antialias=True)[0]
        resized[i].copy_(image.permute(1, 2, 0))
    pixels = resized.round_().clamp_(0, 255).to(torch.uint8)  # (B, size, size, 3)
    flipped = torch.tensor([i for i, crop in enumerate(rows) if crop.is_flipped], dtype=torch.int64)
    index = flipped.to(device, non_blocking=True)
    return pixels.index_copy_(0, index, pixels[index].flip(2))


def is_small(crop: Crop) -> bool:
    return not crop.jpeg_pixels and max(crop.height, crop.width) <= SMALL_SIDE


def resize_small(packed: Tensor, starts: Tensor, crops: Tensor) -> Tensor:
    """Resize small crops together. The result for a crop does not depend on the others.

    Args:
        packed: bytes of all crops (bytes,), uint8, on the device.
        starts: where each crop begins in them (N,), int64, on the CPU.
        crops: rows (N, 9), int64, on the CPU: the fields of a Crop each.

    Returns:
        Values (N, size, size, 3), float32, on the device.
    """
    size = Crop(*crops[0].tolist()).size
    num_rows, num_columns = crops[:, 4:6].amax(dim=0).tolist()
    start, height, width, is_bicubic = (
        torch.stack([starts, *crops[:, (4, 5, 7)].T]).to(packed.device, non_blocking=True).unbind()
    )  # (N,)
    columns, weights = filter_taps(width, size, is_bicubic, max_side=num_columns)  # (taps, N, size)
    rows = torch.arange(num_rows, device=packed.device).minimum(height[:, None] - 1)  # (N, H)
    row_starts = (start[:, None] + 3 * width[:, None] * rows)[..., None, None]  # (N, H, 1, 1)
    channels = torch.arange(3, device=packed.device)
    lines = torch.zeros(len(crops), num_rows, size, 3, device=packed.device)
    for column, weight in zip(columns, weights, strict=True):
        values = packed[row_starts + (3 * column[..., None] + channels)[:, None]]  # (N, H, size, 3)
        lines.addcmul_(values.float(), weight[:, None, :, None])
    rows, weights = filter_taps(height, size, is_bicubic, max_side=num_rows)
    resized = lines.new_zeros(len(crops), size, size, 3)
    for row, weight in zip(rows, weights, strict=True):
        values = lines.gather(1, row[..., None, None].expand_as(resized))  # (N, size, size, 3)
        resized.addcmul_(values, weight[..., None, None])
    return resized


def filter_taps(sides: Tensor, size: int, is_bicubic: Tensor, *, max_side: int) -> tuple[Tensor, Tensor]:
    """Return what each pixel along an axis is made from when sides (N,) are resized to `size`, as `interpolate` does
    with antialiasing: indices (taps, N, size) along the side, and their weights.
    """
    scale = (sides / size)[:, None]  # (N, 1)
    stretch = scale.clamp(min=1)
    reach = stretch * (1 + is_bicubic[:, None])
    centers = (torch.arange(size, device=sides.device) + 0.5) * scale  # (N, size)
    first, end = (centers - reach + 0.5).floor().clamp(min=0), (centers + reach + 0.5).floor()
    num_taps = 2 * math.ceil(2 * max(1, max_side / size)) + 1
    positions = first + torch.arange(num_taps, device=sides.device)[:, None, None]  # (taps, N, size)
    distance = ((positions - centers + 0.5) / stretch).abs()
    near, far = (1.5 * distance - 2.5) * distance**2 + 1, ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    cubic = torch.where(distance < 1, near, far.where(distance < 2, 0))  # with a = -0.5, as in Pillow's resizing
    weights = torch.where(is_bicubic[:, None] > 0, cubic, (1 - distance).clamp(min=0))
    weights = weights.where((positions < end) & (positions < sides[:, None]), 0)
    total = sum(weights)  # one by one, in an order that does not depend on N
    return positions.long().minimum(sides[:, None] - 1), weights / total
