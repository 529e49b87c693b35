"""Triton kernel for the stem's 3x3 convolutions with stride 1, of up to 48 channels in 16 bits, for inference.

Eager reference: `Stem.conv2` in models/layers.py, with batch norms folded into the convolutions.

With channels last, three neighboring pixels of a row are 3 C consecutive values. A program goes down the rows of a band
of columns, loads these values once for each row, and multiplies them by the weights of the three rows of outputs that
they touch, whose sums stay in registers. No power of two is near 3 C: the values come in a wide part and a narrow one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.launch import on_its_device
from models.kernels.triton.math import as_tile

COLUMNS, ROWS, WARPS = 64, 28, 4  # fastest on an H200 with 48 channels of 112x112


@triton.jit
def load_window(pointer, k, row, height, ok, row_stride):
    """Load the values k of a window in each column (columns, k) of a row; zeros outside the image."""
    inside = (as_tile(row) < height) & (as_tile(row) >= 0)
    return tl.load(pointer + row * row_stride + k[None, :], mask=ok & inside, other=0.0)


@triton.jit
def load_matrix(weight, k, n, channels, row: tl.constexpr):
    """Load the weights of one row of the stencil as a matrix (k, outputs); `weight` is (C, 3, 3, C)."""
    ok = (k < 3 * channels)[:, None] & (n < channels)[None, :]
    return tl.load(weight + n[None, :] * (9 * channels) + 3 * row * channels + k[:, None], mask=ok, other=0.0)


@triton.jit
def is_inside(k, channels, column_ok, has_left, has_right):
    """Return where values k of the columns' windows (columns, k) are in the image and belong to a window."""
    k = k[None, :]
    return column_ok & (has_left | (k >= channels)) & (has_right | (k < 2 * channels)) & (k < 3 * channels)


@triton.jit(do_not_specialize=["num_columns", "height", "width"])
def stem_layer_kernel(
    x, weight, bias, residual, out, num_columns, height, width, channels: tl.constexpr,
    RESIDUAL: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Store out = residual + conv(x) + bias if RESIDUAL, else ReLU(conv(x) + bias)."""
    n, k, rest = tl.arange(0, OUTPUTS), tl.arange(0, WIDE), WIDE + tl.arange(0, NARROW)
    top, top_rest = load_matrix(weight, k, n, channels, 0), load_matrix(weight, rest, n, channels, 0)
    mid, mid_rest = load_matrix(weight, k, n, channels, 1), load_matrix(weight, rest, n, channels, 1)
    low, low_rest = load_matrix(weight, k, n, channels, 2), load_matrix(weight, rest, n, channels, 2)
    start = tl.load(bias + n, mask=n < channels, other=0.0).to(tl.float32)[None, :]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    first_row = tl.program_id(1) * ROWS
    image, w = column // width, column % width
    column_ok = column < num_columns
    ok = is_inside(k, channels, column_ok, w > 0, w + 1 < width)
    ok_rest = is_inside(rest, channels, column_ok, w > 0, w + 1 < width)
    token = image.to(tl.int64) * height * width + w
    pointer, row_stride = x + (token - 1) * channels, width * channels
    place, out_ok = token * channels + n[None, :], column_ok & (n < channels)[None, :]

    a = load_window(pointer, k, first_row - 1, height, ok, row_stride)
    b = load_window(pointer, rest, first_row - 1, height, ok_rest, row_stride)
    c = load_window(pointer, k, first_row, height, ok, row_stride)
    d = load_window(pointer, rest, first_row, height, ok_rest, row_stride)
    next_a = load_window(pointer, k, first_row + 1, height, ok, row_stride)
    next_b = load_window(pointer, rest, first_row + 1, height, ok_rest, row_stride)
    current = tl.dot(d, mid_rest, tl.dot(c, mid, tl.dot(b, top_rest, tl.dot(a, top))))
    following = tl.dot(d, top_rest, tl.dot(c, top))
    for i in range(ROWS):
        row = first_row + i
        a, b = next_a, next_b
        next_a = load_window(pointer, k, row + 2, height, ok, row_stride)
        next_b = load_window(pointer, rest, row + 2, height, ok_rest, row_stride)
        result = tl.dot(a, low, current)
        current = tl.dot(a, mid, following)
        following = tl.dot(a, top)
        result = tl.dot(b, low_rest, result) + start
        current = tl.dot(b, mid_rest, current)
        following = tl.dot(b, top_rest, following)
        here, here_ok = place + row * width * channels, out_ok & (as_tile(row) < height)
        if RESIDUAL:
            result += tl.load(residual + here, mask=here_ok, other=0.0).to(tl.float32)
        else:
            result = tl.maximum(result, 0.0)
        tl.store(out + here, result.to(out.dtype.element_ty), mask=here_ok)


@on_its_device
def stem_layer_forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """Return residual + conv(x) + bias, or without a residual ReLU(conv(x) + bias); x (B, C, H, W), channels last."""
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    added = x if residual is None else residual.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    out = torch.empty_like(x, memory_format=torch.channels_last)
    wide = triton.next_power_of_2(3 * channels + 1) // 2
    stem_layer_kernel[(triton.cdiv(batch * width, COLUMNS), triton.cdiv(height, ROWS))](
        *(x, weight, bias, added, out, batch * width, height, width, channels),
        RESIDUAL=residual is not None, COLUMNS=COLUMNS, ROWS=ROWS, WIDE=wide,
        NARROW=max(16, triton.next_power_of_2(3 * channels - wide)),
        OUTPUTS=max(16, triton.next_power_of_2(channels)), num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return out
