"""Triton kernels that resize and flip the crops of a batch, and erase boxes: a launch each.

PyTorch needs 130 launches for small crops, four for each large one, and one for each box.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from data.batch_decoding import decode_on, pixel_groups

BLOCK = 256  # pixels, or values to erase, of a program
CROP_FIELDS = tl.constexpr(9)  # of a row of `resize_blocks`
AXIS_FIELDS = tl.constexpr(9)  # of a row of `resize_axis`
BOX_FIELDS = tl.constexpr(6)  # of a row of `erase_boxes`


def resize_with_kernel(packed: Tensor, crops: Tensor, device: torch.device) -> Tensor:
    """Resize and flip crops, as `resize_crops`."""
    size, num_bytes = int(crops[0, 6]), crops[:, 0]
    starts = num_bytes.cumsum(0) - num_bytes
    result = torch.empty(len(crops), size, size, 3, dtype=torch.uint8, device=device)
    jpegs = (crops[:, 1] > 0).nonzero().flatten()
    for group in pixel_groups(crops[jpegs, 1].tolist()):  # before other work, for which decoding would wait
        index = jpegs[group]
        ends = starts + num_bytes
        files = [packed[start:end] for start, end in zip(starts[index].tolist(), ends[index].tolist(), strict=True)]
        images = decode_on(device, files)  # (3, H, W) each
        channels, lines, columns = torch.tensor([image.stride() for image in images]).T
        addresses = torch.tensor([image.data_ptr() for image in images])
        corners = addresses + lines * crops[index, 2] + columns * crops[index, 3]
        launch_resizing(result, crops, index, [corners, lines, columns, channels])
        del images  # else their memory would be in use while the next group is decoded
    decoded = (crops[:, 1] == 0).nonzero().flatten()
    if len(decoded):
        pixels = packed.to(device, non_blocking=True)
        widths = crops[decoded, 5]
        addresses, one = pixels.data_ptr() + starts[decoded], torch.ones_like(widths)
        launch_resizing(result, crops, decoded, [addresses, 3 * widths, 3 * one, one])
    return result


def launch_resizing(result: Tensor, crops: Tensor, index: Tensor, places: Sequence[Tensor]) -> None:
    """Resize the crops of an index (N,), whose pixels have the address and the strides (N,) of lines, columns and
    channels in `places`.
    """
    size = result.shape[1]
    rows = torch.stack([index, *places, *crops[index][:, (4, 5, 7, 8)].T], dim=1)  # (N, 9)
    if result.is_cuda:
        rows = rows.pin_memory()  # else the copy might wait for the stream
    grid = (len(index), triton.cdiv(size * size, BLOCK))
    resize_blocks[grid](result, rows.to(result.device, non_blocking=True), size, BLOCK=BLOCK, enable_fp_fusion=False)


def resize_exactly(packed: Tensor, crops: Tensor, device: torch.device) -> Tensor:
    """Resize and crop images with Pillow's pixels.

    Args:
        packed: bytes of all parts of images (bytes,), uint8, on the CPU.
        crops: rows (B, 13), int64, on the CPU: the fields of an ExactCrop each; all have the same size.
        device: of the result.

    Returns:
        Pixels (B, size, size, 3), uint8.
    """
    count, size = len(crops), int(crops[0, 11])
    num_bytes, part_top, part_left, num_rows, part_width, height, width, tall, wide, top, left, _, is_cubic = crops.T
    num_lines, three = num_rows * size * 3, torch.full_like(num_bytes, 3)  # of each part, resized along its width
    starts, line_starts = (sizes.cumsum(0) - sizes for sizes in (num_bytes, num_lines))
    result_starts = 3 * size * size * torch.arange(count)
    across = starts, line_starts, 3 * part_width, num_rows, width, wide, left, part_left, is_cubic
    down = line_starts, result_starts, three, torch.full_like(three, size), height, tall, top, part_top, is_cubic
    rows = torch.stack([torch.stack(across, dim=1), torch.stack(down, dim=1)])  # (2, B, 9)
    if device.type == "cuda":
        rows = rows.pin_memory()
    rows, pixels = rows.to(device, non_blocking=True), packed.to(device, non_blocking=True)
    lines = torch.empty(int(num_lines.sum()), dtype=torch.uint8, device=device)
    result = torch.empty(count, size, size, 3, dtype=torch.uint8, device=device)
    grid = count, triton.cdiv(size * int(num_rows.max()), BLOCK)
    resize_axis[grid](pixels, lines, rows[0], size, 3, 3 * size, True, BLOCK=BLOCK, enable_fp_fusion=False)
    grid = count, triton.cdiv(size * size, BLOCK)
    resize_axis[grid](lines, result, rows[1], size, 3 * size, 3, False, BLOCK=BLOCK, enable_fp_fusion=False)
    return result


def erase_with_kernel(images: Tensor, erasures: Tensor, mode: str) -> None:
    """Fill boxes that do not overlap, in place.

    Args:
        images: values (B, 3, H, W), float32, in channels_last memory, on a GPU.
        erasures: rows (E, 6), int64, on the CPU: image, top, left, height, width and seed of each box.
        mode: "pixel", "rand" or "const", as DeviceLoader's `erase_mode`.
    """
    height, width = images.shape[2:]
    grid = (len(erasures), triton.cdiv(3 * int((erasures[:, 3] * erasures[:, 4]).max()), BLOCK))
    rows = erasures.to(images.device, non_blocking=True)
    erase_boxes[grid](images, rows, height, width, IS_COLOR=mode == "rand", IS_NOISE=mode != "const", BLOCK=BLOCK)


@triton.jit
def resize_blocks(result, rows, size, BLOCK: tl.constexpr):
    """Resize a block of a crop's pixels, with weights as `filter_taps` gives them."""
    row = rows + tl.program_id(0) * CROP_FIELDS
    source = tl.load(row + 1).to(tl.pointer_type(tl.uint8))
    line_stride, column_stride, channel_stride = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    height, width = tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32)
    is_bicubic, is_flipped = tl.load(row + 7) != 0, tl.load(row + 8) != 0
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size * size
    x = index % size
    center_y, stretch_y, first_y, end_y, num_y = taps(index // size, height, size, is_bicubic)
    center_x, stretch_x, first_x, end_x, num_x = taps(tl.where(is_flipped, size - 1 - x, x), width, size, is_bicubic)
    red = tl.zeros((BLOCK,), tl.float32)
    green, blue, total = red, red, red
    for j in range(num_y):
        y = first_y + j
        weight_y = tl.where(y < end_y, filter_weight((y - center_y + 0.5) / stretch_y, is_bicubic), 0.0)
        for i in range(num_x):
            x = first_x + i
            weight = weight_y * filter_weight((x - center_x + 0.5) / stretch_x, is_bicubic)
            is_used = mask & (y < end_y) & (x < end_x)
            weight = tl.where(is_used, weight, 0.0)
            pixel = source + y * line_stride + x * column_stride
            red += weight * tl.load(pixel, mask=is_used, other=0).to(tl.float32)
            green += weight * tl.load(pixel + channel_stride, mask=is_used, other=0).to(tl.float32)
            blue += weight * tl.load(pixel + 2 * channel_stride, mask=is_used, other=0).to(tl.float32)
            total += weight
    total = tl.where(mask, total, 1.0)
    output = result + tl.load(row) * size * size * 3 + 3 * index
    tl.store(output, round_to_byte(red / total), mask=mask)
    tl.store(output + 1, round_to_byte(green / total), mask=mask)
    tl.store(output + 2, round_to_byte(blue / total), mask=mask)


@triton.jit
def taps(position, side, size, is_bicubic):
    """Return center, stretch, first and end of what pixels along an axis are made from, and the most taps of any."""
    scale = side.to(tl.float32) / size
    stretch = tl.maximum(scale, 1.0)
    reach = stretch * tl.where(is_bicubic, 2.0, 1.0)
    center = (position.to(tl.float32) + 0.5) * scale
    first = tl.maximum(tl.floor(center - reach + 0.5), 0.0).to(tl.int32)
    end = tl.minimum(tl.floor(center + reach + 0.5).to(tl.int32), side)
    return center, stretch, first, end, tl.minimum((2 * reach).to(tl.int32) + 2, side)


@triton.jit
def filter_weight(distance, is_bicubic):
    """Return the weight at a distance in stretched pixels: of the triangle, or of the cubic kernel with a = -0.5."""
    distance = tl.abs(distance)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    cubic = tl.where(distance < 1, near, tl.where(distance < 2, far, 0.0))
    return tl.where(is_bicubic, cubic, tl.maximum(1 - distance, 0.0))


@triton.jit
def round_to_byte(value):
    """Round half to even, and clip."""
    value = tl.minimum(tl.maximum(value, 0.0), 255.0)
    floor = tl.floor(value)
    is_odd = floor - 2 * tl.floor(floor / 2)
    goes_up = (value - floor > 0.5) | ((value - floor == 0.5) & (is_odd == 1))
    return (floor + tl.where(goes_up, 1.0, 0.0)).to(tl.int32).to(tl.uint8)


@triton.jit
def resize_axis(source, target, rows, size, step, target_line, ALONG_LINES: tl.constexpr, BLOCK: tl.constexpr):
    """Resize a block of an image's pixels along an axis, with Pillow's weights of 22 bits and sums of integers.

    `step` bytes lie between the pixels of a line, which is a column of the image where ALONG_LINES is off.
    """
    row = rows + tl.program_id(0) * AXIS_FIELDS
    source += tl.load(row)
    target += tl.load(row + 1)
    line_stride, num_lines = tl.load(row + 2), tl.load(row + 3).to(tl.int32)
    side, first_place, first_pixel = tl.load(row + 4), tl.load(row + 6), tl.load(row + 7)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size * num_lines
    if ALONG_LINES:
        line, place = index // size, index % size
    else:
        line, place = index % num_lines, index // num_lines
    scale = side.to(tl.float64) / tl.load(row + 5).to(tl.float64)
    stretch = tl.maximum(scale, 1.0)
    is_cubic = tl.load(row + 8) != 0
    support = stretch * tl.where(is_cubic, 2.0, 1.0).to(tl.float64)
    center = ((first_place + place).to(tl.float64) + 0.5) * scale
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    end = tl.minimum((center + support + 0.5).to(tl.int32), side.to(tl.int32))
    narrowing = 1.0 / stretch
    num_taps = (2 * support).to(tl.int32) + 2
    total = tl.zeros((BLOCK,), tl.float64)
    for tap in range(num_taps):
        weight = exact_weight((first + tap - center + 0.5) * narrowing, is_cubic)
        total += tl.where(first + tap < end, weight, 0.0)
    total = tl.where(mask, total, 1.0)
    red = tl.full((BLOCK,), 1 << 21, tl.int32)  # rounds
    green, blue = red, red
    for tap in range(num_taps):
        is_used = mask & (first + tap < end)
        weight = exact_weight((first + tap - center + 0.5) * narrowing, is_cubic) / total * 4194304.0
        whole = (weight + tl.where(weight < 0, -0.5, 0.5)).to(tl.int32)
        value = source + line * line_stride + (first + tap - first_pixel) * step
        red += whole * tl.load(value, mask=is_used, other=0).to(tl.int32)
        green += whole * tl.load(value + 1, mask=is_used, other=0).to(tl.int32)
        blue += whole * tl.load(value + 2, mask=is_used, other=0).to(tl.int32)
    output = target + line * target_line + place * step
    tl.store(output, byte_of(red), mask=mask)
    tl.store(output + 1, byte_of(green), mask=mask)
    tl.store(output + 2, byte_of(blue), mask=mask)


@triton.jit
def exact_weight(distance, is_cubic):
    """Return the weight at a distance, float64, in Pillow's order of operations."""
    distance = tl.abs(distance)
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
    cubic = tl.where(distance < 1.0, near, tl.where(distance < 2.0, far, 0.0))
    return tl.where(is_cubic, cubic, tl.where(distance < 1.0, 1.0 - distance, 0.0))


@triton.jit
def byte_of(total):
    """Drop the 22 bits after the point, and clip."""
    return tl.minimum(tl.maximum(total >> 22, 0), 255).to(tl.uint8)


@triton.jit
def erase_boxes(images, rows, height, width, IS_COLOR: tl.constexpr, IS_NOISE: tl.constexpr, BLOCK: tl.constexpr):
    """Fill a block of a box's values with noise that depends on the box's seed alone, with one color, or with zeros."""
    row = rows + tl.program_id(0) * BOX_FIELDS
    top, left = tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32)
    box_width = tl.load(row + 4).to(tl.int32)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, pixel = index % 3, index // 3
    y, x = top + pixel // box_width, left + pixel % box_width
    mask = pixel < tl.load(row + 3).to(tl.int32) * box_width
    noise = tl.zeros((BLOCK,), tl.float32)
    if IS_NOISE:
        noise = tl.randn(tl.load(row + 5), channel if IS_COLOR else index)
    tl.store(images + ((tl.load(row) * height + y) * width + x) * 3 + channel, noise, mask=mask)
