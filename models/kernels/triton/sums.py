"""Triton kernel for the sums over tokens that other kernels leave in parts: gradients of biases, taps and norms.

Eager reference: `parts.sum(0)`. Each program of a kernel stores its part, so that the order of additions is fixed. One
launch sums the buffers of several kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.launch import num_multiprocessors, on_its_device

LENGTH = 16  # sums of one program
PARTS = 256  # which it loads at a time
MAX_BUFFERS = 5  # of one launch
NUM_TAPS = tl.constexpr(9)


def empty_parts(x: Tensor, rows: int, block: int, programs: int) -> Tensor:
    """Return a buffer for sums over the tokens of x (..., C), float32 (parts, rows, C), a part for each program.

    The number of parts depends on the device and C alone, for blocks of `block` channels and `programs` per
    multiprocessor: under torch.compile, sizes of batch and grid are symbols. Programs without tokens store zeros.
    """
    channels = int(x.shape[-1])
    parts = max(1, programs * num_multiprocessors(x.device) // triton.cdiv(channels, block))
    return torch.empty(parts, rows, channels, dtype=torch.float32, device=x.device)


@triton.jit
def next_buffer(
    tile, out, parts, num_parts, rows, channels, parts2, num_parts2, rows2, channels2, LENGTH: tl.constexpr
):
    """Return the arguments that belong to a tile: those of the first buffer, or if it ends before, of the second."""
    num_tiles = tl.cdiv(rows * channels, LENGTH)
    is_past = tile >= num_tiles
    return (
        tl.where(is_past, tile - num_tiles, tile),
        out + tl.where(is_past, rows * channels, 0),
        tl.where(is_past, parts2, parts),
        tl.where(is_past, num_parts2, num_parts),
        tl.where(is_past, rows2, rows),
        tl.where(is_past, channels2, channels),
    )


# Numbers of parts and rows differ between launches: specialized, each would be compiled once more.
@triton.jit(do_not_specialize=[f"{name}{i}" for i in range(MAX_BUFFERS) for name in ("num_parts", "rows")])
def sum_parts_kernel(
    out,
    parts0, num_parts0, rows0, channels0, parts1, num_parts1, rows1, channels1,
    parts2, num_parts2, rows2, channels2, parts3, num_parts3, rows3, channels3,
    parts4, num_parts4, rows4, channels4,
    PARTS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Store the sums over parts of buffers (num_parts, rows, channels), one after the other; taps by channel."""
    # A tile that has reached its buffer stays there.
    tile, out, parts, num_parts, rows, channels = next_buffer(
        tl.program_id(0), out, parts0, num_parts0, rows0, channels0, parts1, num_parts1, rows1, channels1, LENGTH
    )
    tile, out, parts, num_parts, rows, channels = next_buffer(
        tile, out, parts, num_parts, rows, channels, parts2, num_parts2, rows2, channels2, LENGTH
    )
    tile, out, parts, num_parts, rows, channels = next_buffer(
        tile, out, parts, num_parts, rows, channels, parts3, num_parts3, rows3, channels3, LENGTH
    )
    tile, out, parts, num_parts, rows, channels = next_buffer(
        tile, out, parts, num_parts, rows, channels, parts4, num_parts4, rows4, channels4, LENGTH
    )
    length = rows * channels
    index = tile * LENGTH + tl.arange(0, LENGTH)[None, :]
    total = tl.zeros((PARTS, LENGTH), dtype=tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        total += tl.load(parts + part * length + index, mask=(part < num_parts) & (index < length), other=0.0)
    row, channel = index // channels, index % channels
    num_taps = tl.where(rows >= NUM_TAPS, NUM_TAPS, 0)
    target = tl.where(row < num_taps, channel * NUM_TAPS + row, index)
    tl.store(out + target, tl.sum(total, 0, keep_dims=True), mask=index < length)


@on_its_device
def sum_parts(*buffers: Tensor) -> Tensor:
    """Return up to five float32 (parts, rows, C), summed over parts, flat and joined; in one launch, in a fixed order.

    Nine rows or more begin with a depthwise weight's taps: these become (C, taps), then the other rows follow.
    """
    shapes = [buffer.shape for buffer in buffers]
    out = torch.empty(
        sum(rows * channels for _, rows, channels in shapes), dtype=torch.float32, device=buffers[0].device
    )
    args = [(buffer, *shape) for buffer, shape in zip(buffers, shapes, strict=True)]
    args += [args[-1]] * (MAX_BUFFERS - len(args))  # without tiles
    num_tiles = sum(triton.cdiv(rows * channels, LENGTH) for _, rows, channels in shapes)
    sum_parts_kernel[(num_tiles,)](
        out, *(arg for group in args for arg in group), PARTS=PARTS, LENGTH=LENGTH, num_warps=8
    )
    return out
