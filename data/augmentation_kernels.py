"""Triton kernels of the operations in batch_augmentation.py: three launches for the first operations of all images,
three for the second ones, and so on, where PyTorch needs more than 300.

They compute what the PyTorch operations do, in the same order of float32 and float64 operations, without fused
multiply-adds, which would round differently.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from data.batch_augmentation import FILL, SOLARIZE_ADD_BELOW, Kind

INVERT, POSTERIZE, SOLARIZE = (tl.constexpr(int(kind)) for kind in (Kind.INVERT, Kind.POSTERIZE, Kind.SOLARIZE))
SOLARIZE_ADD, AUTO_CONTRAST = tl.constexpr(int(Kind.SOLARIZE_ADD)), tl.constexpr(int(Kind.AUTO_CONTRAST))
EQUALIZE, CONTRAST, COLOR = (tl.constexpr(int(kind)) for kind in (Kind.EQUALIZE, Kind.CONTRAST, Kind.COLOR))
SHARPNESS, BILINEAR = tl.constexpr(int(Kind.SHARPNESS)), tl.constexpr(int(Kind.BILINEAR))
THRESHOLD = tl.constexpr(SOLARIZE_ADD_BELOW)
FILL_RED, FILL_GREEN, FILL_BLUE = (tl.constexpr(value) for value in FILL)
FIELDS = tl.constexpr(10)  # of a row of operations: image, place, kind, level, a to f
STATISTICS_BLOCK, BLOCK = 2048, 256  # pixels


def augment_with_kernels(images: Tensor, operations: Tensor) -> Tensor:
    """Apply operations to a batch, as `augment`; the batch stays as it is.

    Args:
        images: pixels (B, H, W, 3), uint8, contiguous, on a GPU.
        operations: rows (O, 10), float64, on the CPU.
    """
    _, height, width, _ = images.shape
    num_operations, num_places = len(operations), int(operations[:, 1].max()) + 1
    rows = operations.to(images.device, non_blocking=True)
    tables = torch.empty(num_operations, 3, 256, dtype=torch.uint8, device=images.device)
    means = torch.empty(num_operations, dtype=torch.int32, device=images.device)
    grid = (num_operations, triton.cdiv(height * width, BLOCK))
    for place in range(num_places):
        result = images.clone()
        compute_statistics[(num_operations, 3)](
            *(images, rows, tables, means, place, height * width),
            BLOCK=STATISTICS_BLOCK,
            enable_fp_fusion=False,
        )
        apply_operations[grid](
            *(images, result, rows, tables, means, place, height, width), BLOCK=BLOCK, enable_fp_fusion=False
        )
        images = result
    return images


@triton.jit(do_not_specialize=["place"])
def compute_statistics(images, rows, tables, means, place, num_pixels, BLOCK: tl.constexpr):
    """Compute the tables (256,) of an image's channel that automatic contrast and equalizing look values up in, and the
    mean gray that contrast needs.
    """
    operation, channel = tl.program_id(0), tl.program_id(1)
    row = rows + operation * FIELDS
    kind = tl.load(row + 2).to(tl.int32)
    pixels = images + tl.load(row).to(tl.int64) * num_pixels * 3
    is_here = tl.load(row + 1).to(tl.int32) == place
    if is_here & ((kind == AUTO_CONTRAST) | (kind == EQUALIZE)):
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, num_pixels, BLOCK):
            index = start + tl.arange(0, BLOCK)
            values = tl.load(pixels + 3 * index + channel, mask=index < num_pixels, other=0)
            counts += tl.histogram(values.to(tl.int32), 256)
        values = tl.arange(0, 256)
        padding = (num_pixels + BLOCK - 1) // BLOCK * BLOCK - num_pixels  # was counted as zeros
        counts -= tl.where(values == 0, padding, 0)
        high = tl.max(tl.where(counts > 0, values, 0), 0)
        if kind == AUTO_CONTRAST:
            low = tl.min(tl.where(counts > 0, values, 255), 0)
            scale = 255 / tl.maximum(high - low, 1).to(tl.float64)
            stretched = values.to(tl.float64) * scale - low.to(tl.float64) * scale
            table = tl.where(high > low, to_byte(stretched), values.to(tl.uint8))
        else:
            below = tl.cumsum(counts, 0) - counts
            step = tl.sum(tl.where(values == high, below, 0), 0) // 255
            spread = (below + step // 2) // tl.maximum(step, 1)
            table = tl.where(step > 0, tl.minimum(spread, 255), values).to(tl.uint8)
        tl.store(tables + (operation * 3 + channel) * 256 + values, table)
    if is_here & (kind == CONTRAST) & (channel == 0):
        total = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, num_pixels, BLOCK):
            index = start + tl.arange(0, BLOCK)
            mask = index < num_pixels
            red = tl.load(pixels + 3 * index, mask=mask, other=0)
            green = tl.load(pixels + 3 * index + 1, mask=mask, other=0)
            blue = tl.load(pixels + 3 * index + 2, mask=mask, other=0)
            total += gray(red, green, blue)
        tl.store(means + operation, (tl.sum(total, 0) + num_pixels // 2) // num_pixels)


@triton.jit(do_not_specialize=["place"])
def apply_operations(images, result, rows, tables, means, place, height, width, BLOCK: tl.constexpr):
    """Apply an operation to a block of an image's pixels."""
    operation = tl.program_id(0)
    row = rows + operation * FIELDS
    if tl.load(row + 1).to(tl.int32) == place:
        kind, level = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.float32)
        start = tl.load(row).to(tl.int64) * height * width * 3
        index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = index < height * width
        pixels, output = images + start, result + start + 3 * index
        y, x = index // width, index % width
        if kind < AUTO_CONTRAST:
            for channel in tl.static_range(3):
                value = tl.load(pixels + 3 * index + channel, mask=mask, other=0).to(tl.int32)
                tl.store(output + channel, change_value(value, kind, level), mask=mask)
        elif kind <= EQUALIZE:
            for channel in tl.static_range(3):
                value = tl.load(pixels + 3 * index + channel, mask=mask, other=0).to(tl.int32)
                table = tables + (operation * 3 + channel) * 256
                tl.store(output + channel, tl.load(table + value, mask=mask, other=0), mask=mask)
        elif kind <= COLOR:
            red = tl.load(pixels + 3 * index, mask=mask, other=0)
            green = tl.load(pixels + 3 * index + 1, mask=mask, other=0)
            blue = tl.load(pixels + 3 * index + 2, mask=mask, other=0)
            first = gray(red, green, blue)
            if kind == CONTRAST:
                first = tl.zeros_like(first) + tl.load(means + operation)
            tl.store(output, blend(first, red, level), mask=mask)
            tl.store(output + 1, blend(first, green, level), mask=mask)
            tl.store(output + 2, blend(first, blue, level), mask=mask)
        elif kind == SHARPNESS:
            change_sharpness(pixels, output, index, x, y, mask, height, width, level)
        else:
            transform_affine(pixels, output, row, x, y, mask, height, width, kind)


@triton.jit
def to_byte(value):
    """Clip and truncate, as Pillow does."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32).to(tl.uint8)


@triton.jit
def gray(red, green, blue):
    """Convert pixels to luma, as Pillow does."""
    total = 19595 * red.to(tl.int32) + 38470 * green.to(tl.int32) + 7471 * blue.to(tl.int32)
    return (total + 0x8000) >> 16


@triton.jit
def blend(first, second, level):
    """Return first + level * (second - first), as Pillow does."""
    return to_byte(first.to(tl.float32) + level * (second.to(tl.float32) - first.to(tl.float32)))


@triton.jit
def change_value(value, kind, level):
    """Apply an operation that depends on the value alone."""
    changed = level * value.to(tl.float32)  # brightness
    bits = tl.minimum(tl.maximum(8 - level.to(tl.int32), 0), 8)
    changed = tl.where(kind == INVERT, 255.0 - value, changed)
    changed = tl.where(kind == POSTERIZE, ((value >> bits) << bits).to(tl.float32), changed)
    changed = tl.where(kind == SOLARIZE, tl.where(value < level, value, 255 - value).to(tl.float32), changed)
    added = tl.where(value < THRESHOLD, value + level, value.to(tl.float32))
    return to_byte(tl.where(kind == SOLARIZE_ADD, added, changed))


@triton.jit
def change_sharpness(pixels, output, index, x, y, mask, height, width, level):
    """Blend a block of pixels with their versions smoothed by Pillow's ImageFilter.SMOOTH; the border stays."""
    is_interior = mask & (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
    for channel in tl.static_range(3):
        value = tl.load(pixels + 3 * index + channel, mask=mask, other=0)
        total = 4 * value.to(tl.int32)
        for neighbor in tl.static_range(9):
            offset = 3 * (index + (neighbor // 3 - 1) * width + neighbor % 3 - 1) + channel
            total += tl.load(pixels + offset, mask=is_interior, other=0).to(tl.int32)
        smooth = tl.where(is_interior, (2 * total + 13) // 26, value.to(tl.int32))
        tl.store(output + channel, blend(smooth, value, level), mask=mask)


@triton.jit
def transform_affine(pixels, output, row, x, y, mask, height, width, kind):
    """Apply an affine map to a block of pixels, as Pillow's Image.transform does."""
    right, down = x.to(tl.float64) + 0.5, y.to(tl.float64) + 0.5
    u = tl.load(row + 4) * right + tl.load(row + 5) * down + tl.load(row + 6)
    v = tl.load(row + 7) * right + tl.load(row + 8) * down + tl.load(row + 9)
    is_inside = mask & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    left, top = tl.floor(u - 0.5), tl.floor(v - 0.5)
    s, t = (u - 0.5 - left).to(tl.float32), (v - 0.5 - top).to(tl.float32)
    column, line = left.to(tl.int32), top.to(tl.int32)
    for channel in range(3):
        if kind == BILINEAR:
            first = interpolate_linear(pixels + channel, column, line, s, width, height, is_inside)
            second = interpolate_linear(pixels + channel, column, line + 1, s, width, height, is_inside)
            value = first + t * (second - first)
        else:
            p = interpolate_row(pixels + channel, column, line - 1, s, width, height, is_inside)
            q = interpolate_row(pixels + channel, column, line, s, width, height, is_inside)
            r = interpolate_row(pixels + channel, column, line + 1, s, width, height, is_inside)
            value = cubic(p, q, r, interpolate_row(pixels + channel, column, line + 2, s, width, height, is_inside), t)
        fill = tl.where(channel == 0, FILL_RED, tl.where(channel == 1, FILL_GREEN, FILL_BLUE)).to(tl.uint8)
        tl.store(output + channel, tl.where(is_inside, to_byte(value), fill), mask=mask)


@triton.jit
def load_clamped(pixels, column, line, width, height, mask):
    """Load values of a channel; outside the image, values of its edge."""
    column, line = tl.minimum(tl.maximum(column, 0), width - 1), tl.minimum(tl.maximum(line, 0), height - 1)
    return tl.load(pixels + 3 * (line * width + column), mask=mask, other=0).to(tl.float32)


@triton.jit
def interpolate_linear(pixels, column, line, s, width, height, mask):
    """Interpolate between two values of a line."""
    first = load_clamped(pixels, column, line, width, height, mask)
    return first + s * (load_clamped(pixels, column + 1, line, width, height, mask) - first)


@triton.jit
def interpolate_row(pixels, column, line, s, width, height, mask):
    """Interpolate between four values of a line."""
    p = load_clamped(pixels, column - 1, line, width, height, mask)
    q = load_clamped(pixels, column, line, width, height, mask)
    r = load_clamped(pixels, column + 1, line, width, height, mask)
    return cubic(p, q, r, load_clamped(pixels, column + 2, line, width, height, mask), s)


@triton.jit
def cubic(p, q, r, s, t):
    """Interpolate with Pillow's cubic kernel of affine maps, as `interpolate_cubic`."""
    return q + t * (r - p + t * (2 * (p - q) + r - s + t * (q - p + s - r)))
