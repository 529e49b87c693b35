"""Triton kernels for the 3x3 depthwise convolution with stride 2 between two ReLUs, on tokens (B, H, W, C).

Eager reference: the first two layers of `Downsample` in models/layers.py.

H and W are even. Gradients go by output tokens: those of the four tokens of x at (2r, 2c) .. (2r + 1, 2c + 1) depend on
the four of the gradient at (r, c) .. (r + 1, c + 1) alone, by nine products in all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.depthwise_io import load_stencil, store_sums
from models.kernels.triton.launch import channel_block, num_multiprocessors, on_its_device
from models.kernels.triton.math import as_tile
from models.kernels.triton.sums import empty_parts


@triton.jit
def load_three(pointer, ok_left, ok, channels):
    """Load ReLU of three tokens in a row, float32."""
    a = tl.maximum(tl.load(pointer - channels, mask=ok_left, other=0.0).to(tl.float32), 0.0)
    b = tl.maximum(tl.load(pointer, mask=ok, other=0.0).to(tl.float32), 0.0)
    c = tl.maximum(tl.load(pointer + channels, mask=ok, other=0.0).to(tl.float32), 0.0)
    return a, b, c


@triton.jit(do_not_specialize=["num_columns", "num_blocks", "height", "width"])
def strided_forward_kernel(
    x, weight, bias, out, num_columns, num_blocks, height, width, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store out = ReLU(conv(ReLU(x)) + bias); height and width are out's, half of x's."""
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    channel_ok = channel < channels
    top0, top1, top2, mid0, mid1, mid2, low0, low1, low2 = load_stencil(weight, channel, channel_ok)
    start = tl.load(bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    num_column_blocks = tl.cdiv(num_columns, COLUMNS)
    row_stride = 2 * width * channels
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        column = ((block % num_column_blocks) * COLUMNS + tl.arange(0, COLUMNS))[:, None]
        first_row = (block // num_column_blocks) * ROWS
        image, w = column // width, column % width
        ok = (column < num_columns) & channel_ok
        ok_left = ok & (w > 0)
        image = image.to(tl.int64) * height * width
        pointer = x + (4 * image + 2 * w) * channels + channel
        target = out + (image + w) * channels + channel
        inside = as_tile(first_row) > 0
        a, b, c = load_three(pointer + (2 * first_row - 1) * row_stride, ok_left & inside, ok & inside, channels)
        for i in tl.static_range(ROWS):
            row = first_row + i
            inside = as_tile(row) < height
            result = start + top0 * a + top1 * b + top2 * c
            a, b, c = load_three(pointer + 2 * row * row_stride, ok_left & inside, ok & inside, channels)
            result += mid0 * a + mid1 * b + mid2 * c
            a, b, c = load_three(pointer + (2 * row + 1) * row_stride, ok_left & inside, ok & inside, channels)
            result += low0 * a + low1 * b + low2 * c
            result = tl.maximum(result, 0.0)
            tl.store(target + row * width * channels, result.to(out.dtype.element_ty), mask=ok & inside)


@triton.jit
def load_relu_grad(grad, out, index, ok):
    """Load the gradient where the second ReLU's output is positive, zeros elsewhere, float32."""
    value = tl.load(grad + index, mask=ok, other=0.0).to(tl.float32)
    return tl.where(tl.load(out + index, mask=ok, other=0.0) > 0, value, 0.0)


@triton.jit(do_not_specialize=["num_columns", "num_blocks", "height", "width"])
def strided_backward_kernel(
    grad, x, weight, out, grad_x, partials, num_columns, num_blocks, height, width, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store grad_x, and sums over tokens for taps, bias and grad_x in `partials` (programs, 11, channels)."""
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    channel_ok = channel < channels
    top0, top1, top2, mid0, mid1, mid2, low0, low1, low2 = load_stencil(weight, channel, channel_ok)
    zeros = tl.zeros((COLUMNS, CHANNELS), dtype=tl.float32)
    t0, t1, t2, m0, m1, m2, l0, l1, l2, total = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    input_sum = zeros
    num_column_blocks = tl.cdiv(num_columns, COLUMNS)
    dtype = grad_x.dtype.element_ty
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        column = ((block % num_column_blocks) * COLUMNS + tl.arange(0, COLUMNS))[:, None]
        first_row = (block // num_column_blocks) * ROWS
        image, w = column // width, column % width
        ok = (column < num_columns) & channel_ok
        ok_right = ok & (w + 1 < width)
        image = image.to(tl.int64) * height * width
        index = (image + w) * channels + channel
        x_index = (4 * image + 2 * w) * channels + channel
        here = load_relu_grad(grad, out, index + first_row * width * channels, ok)
        right = load_relu_grad(grad, out, index + first_row * width * channels + channels, ok_right)
        for i in range(ROWS):
            row = first_row + i
            inside = as_tile(row) < height
            below_ok = as_tile(row) + 1 < height
            below_index = index + (row + 1) * width * channels
            below = load_relu_grad(grad, out, below_index, ok & below_ok)
            corner = load_relu_grad(grad, out, below_index + channels, ok_right & below_ok)
            first = x_index + row * 4 * width * channels
            second = first + 2 * width * channels
            x00 = tl.load(x + first, mask=ok & inside, other=0.0).to(tl.float32)
            x01 = tl.load(x + first + channels, mask=ok & inside, other=0.0).to(tl.float32)
            x10 = tl.load(x + second, mask=ok & inside, other=0.0).to(tl.float32)
            x11 = tl.load(x + second + channels, mask=ok & inside, other=0.0).to(tl.float32)
            g00 = tl.where(x00 > 0, mid1 * here, 0.0)
            g01 = tl.where(x01 > 0, mid2 * here + mid0 * right, 0.0)
            g10 = tl.where(x10 > 0, low1 * here + top1 * below, 0.0)
            g11 = tl.where(x11 > 0, low2 * here + low0 * right + top2 * below + top0 * corner, 0.0)
            tl.store(grad_x + first, g00.to(dtype), mask=ok & inside)
            tl.store(grad_x + first + channels, g01.to(dtype), mask=ok & inside)
            tl.store(grad_x + second, g10.to(dtype), mask=ok & inside)
            tl.store(grad_x + second + channels, g11.to(dtype), mask=ok & inside)
            x00, x01 = tl.maximum(x00, 0.0), tl.maximum(x01, 0.0)
            x10, x11 = tl.maximum(x10, 0.0), tl.maximum(x11, 0.0)
            m1 += x00 * here
            m2 += x01 * here
            m0 += x01 * right
            l1 += x10 * here
            t1 += x10 * below
            l2 += x11 * here
            l0 += x11 * right
            t2 += x11 * below
            t0 += x11 * corner
            total += tl.where(inside, here, 0.0)
            input_sum += g00 + g01 + g10 + g11  # zeros outside, where x is
            here = below
            right = corner
    target = partials + tl.program_id(0) * 11 * channels + channel
    store_sums(target, channels, channel_ok, t0, t1, t2, m0, m1, m2, l0, l1, l2, total, input_sum, True)


CHANNELS = 64  # of a program, at most
Tile = tuple[int, int, int, int]  # columns, rows, channels, warps


def plan(x: Tensor, tile: Tile | None) -> tuple[Tile, int, int, int]:
    """Return the tile, and the number of columns, blocks, and blocks of channels for x (B, H, W, C)."""
    batch, height, width, channels = x.shape
    columns, rows, block, warps = tile or (4, 7, channel_block(channels, CHANNELS), 4)
    num_columns = batch * width // 2
    num_blocks = triton.cdiv(num_columns, columns) * triton.cdiv(height // 2, rows)
    return (columns, rows, block, warps), num_columns, num_blocks, triton.cdiv(channels, block)


def empty_sums(x: Tensor) -> Tensor:
    """Return a buffer for sums over tokens, (programs, 11, C): gradients of taps, bias and input bias."""
    return empty_parts(x, 11, block=CHANNELS, programs=4)


@on_its_device
def strided_forward(x: Tensor, weight: Tensor, bias: Tensor, *, tile: Tile | None = None) -> Tensor:
    """Return ReLU(conv(ReLU(x)) + bias), (B, H / 2, W / 2, C)."""
    x = x.contiguous()
    batch, height, width, channels = x.shape
    tile, num_columns, num_blocks, channel_blocks = plan(x, tile)
    programs = min(num_blocks, max(1, 16 * num_multiprocessors(x.device) // channel_blocks))
    out = torch.empty(batch, height // 2, width // 2, channels, dtype=x.dtype, device=x.device)
    strided_forward_kernel[(programs, channel_blocks)](
        *(x, weight, bias, out, num_columns, num_blocks, height // 2, width // 2, channels),
        ROWS=tile[1], COLUMNS=tile[0], CHANNELS=tile[2], num_warps=tile[3],
    )  # fmt: skip
    return out


@on_its_device
def strided_backward(
    grad: Tensor, x: Tensor, weight: Tensor, out: Tensor, *, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Return gradients of `strided_forward`, which gave `out`: for x, and in parts for taps, bias and input bias.

    The latter are float32 (programs, 11, C).
    """
    grad, x = grad.contiguous(), x.contiguous()
    tile, num_columns, num_blocks, channel_blocks = plan(x, tile)
    grad_x, partials = torch.empty_like(x), empty_sums(x)
    strided_backward_kernel[(partials.shape[0], channel_blocks)](
        *(grad, x, weight, out, grad_x, partials, num_columns, num_blocks, x.shape[1] // 2, x.shape[2] // 2),
        *(x.shape[3],),
        ROWS=tile[1], COLUMNS=tile[0], CHANNELS=tile[2], num_warps=tile[3],
    )  # fmt: skip
    return grad_x, partials
