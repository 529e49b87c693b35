"""Triton kernel for the gradients of the 3x3 depthwise convolution of `depthwise.py`, going down in the same way.

Eager reference: autograd of `TokenConv` in models/layers.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.depthwise import Tile
from models.kernels.triton.depthwise_io import load_pair, load_row, load_stencil, store_sums, to_float
from models.kernels.triton.launch import channel_block, on_its_device, token_stride
from models.kernels.triton.math import as_tile
from models.kernels.triton.sums import empty_parts


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "height", "width"])
def conv_backward_kernel(
    grad, x, weight, extra, grad_x, partials,
    num_pairs, num_blocks, height, width, channels, grad_token_stride, x_token_stride,
    RESIDUAL: tl.constexpr, EXTRA: tl.constexpr, INPUT_BIAS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Store grad_x (+ grad if RESIDUAL, + extra if EXTRA), and sums over tokens in `partials` (programs, 10, channels).

    The sums are the gradients of nine taps and the bias, a part for each program, so that the order of additions is
    fixed. With INPUT_BIAS they are (programs, 11, channels), the last for grad_x.
    """
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    channel_ok = channel < channels
    top0, top1, top2, mid0, mid1, mid2, low0, low1, low2 = load_stencil(weight, channel, channel_ok)
    zeros = tl.zeros((PAIRS, CHANNELS), dtype=tl.float32)
    t0, t1, t2, m0, m1, m2, l0, l1, l2, total = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    input_sum = zeros
    pairs_per_row = (width + 1) // 2
    num_pair_blocks = tl.cdiv(num_pairs, PAIRS)
    grad_row_stride = width * grad_token_stride
    x_row_stride = width * x_token_stride
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        pair = ((block % num_pair_blocks) * PAIRS + tl.arange(0, PAIRS))[:, None]
        first_row = (block // num_pair_blocks) * ROWS
        image, w = pair // pairs_per_row, pair % pairs_per_row * 2
        ok1 = (pair < num_pairs) & channel_ok
        ok0, ok2, ok3 = ok1 & (w > 0), ok1 & (w + 1 < width), ok1 & (w + 2 < width)
        token = image.to(tl.int64) * height * width + w
        grad_pointer = grad + token * grad_token_stride + channel
        x_pointer = x + token * x_token_stride + channel
        offset = token * channels + channel
        # Not the same object as below: Triton takes a name for a constant if a loop seems to assign what it held.
        x_above1, x_above2 = zeros * 1.0, zeros * 1.0
        x_here1, x_here2 = zeros, zeros
        above1, above2, here1, here2 = zeros, zeros, zeros, zeros  # of grad_x: rows row - 1 and row
        grad_above1, grad_above2 = zeros, zeros
        # A row is loaded while the previous one is worked on.
        next0, next1, next2, next3 = load_row(
            grad_pointer, first_row - 1, height, ok0, ok1, ok2, ok3, grad_row_stride, grad_token_stride
        )
        x_next1, x_next2 = load_pair(x_pointer, first_row, height, ok1, ok2, x_row_stride, x_token_stride)
        for i in tl.range(0, ROWS + 2, loop_unroll_factor=UNROLL):
            row = first_row - 1 + i  # of grad; it touches grad_x in the rows row - 1, row and row + 1
            a, b, c, d = to_float(next0, next1, next2, next3)
            x_below1, x_below2 = x_next1.to(tl.float32), x_next2.to(tl.float32)
            more = as_tile(i) < ROWS + 1
            next0, next1, next2, next3 = load_row(
                grad_pointer,
                row + 1,
                height,
                ok0 & more,
                ok1 & more,
                ok2 & more,
                ok3 & more,
                grad_row_stride,
                grad_token_stride,
            )
            more = as_tile(i) + 1 < ROWS
            x_next1, x_next2 = load_pair(
                x_pointer, row + 2, height, ok1 & more, ok2 & more, x_row_stride, x_token_stride
            )
            is_stored = (as_tile(i) >= 2) & (as_tile(row) - 1 < height)
            index = offset + (row - 1) * width * channels
            extra1, extra2 = zeros, zeros
            if EXTRA:
                extra1 = tl.load(extra + index, mask=ok1 & is_stored, other=0.0).to(tl.float32)
                extra2 = tl.load(extra + index + channels, mask=ok2 & is_stored, other=0.0).to(tl.float32)
            t0 += x_above1 * c + x_above2 * d
            t1 += x_above1 * b + x_above2 * c
            t2 += x_above1 * a + x_above2 * b
            m0 += x_here1 * c + x_here2 * d
            m1 += x_here1 * b + x_here2 * c
            m2 += x_here1 * a + x_here2 * b
            l0 += x_below1 * c + x_below2 * d
            l1 += x_below1 * b + x_below2 * c
            l2 += x_below1 * a + x_below2 * b
            is_own = tl.where((as_tile(i) >= 1) & (as_tile(i) <= ROWS), 1.0, 0.0)
            total += is_own * (b + c)
            result1 = above1 + top0 * c + top1 * b + top2 * a
            result2 = above2 + top0 * d + top1 * c + top2 * b
            above1 = here1 + mid0 * c + mid1 * b + mid2 * a
            above2 = here2 + mid0 * d + mid1 * c + mid2 * b
            here1 = low0 * c + low1 * b + low2 * a
            here2 = low0 * d + low1 * c + low2 * b
            if RESIDUAL:
                result1 += grad_above1
                result2 += grad_above2
            if EXTRA:
                result1 += extra1
                result2 += extra2
            if INPUT_BIAS:
                input_sum += tl.where(ok1 & is_stored, result1, 0.0) + tl.where(ok2 & is_stored, result2, 0.0)
            tl.store(grad_x + index, result1.to(grad_x.dtype.element_ty), mask=ok1 & is_stored)
            tl.store(grad_x + index + channels, result2.to(grad_x.dtype.element_ty), mask=ok2 & is_stored)
            grad_above1, grad_above2 = b, c
            x_above1, x_above2 = x_here1, x_here2
            x_here1, x_here2 = x_below1, x_below2
    target = partials + tl.program_id(0) * (11 if INPUT_BIAS else 10) * channels + channel
    store_sums(target, channels, channel_ok, t0, t1, t2, m0, m1, m2, l0, l1, l2, total, input_sum, INPUT_BIAS)


CHANNELS = 64  # of a program, at most


def empty_sums(x: Tensor, *, input_bias: bool) -> Tensor:
    """Return a buffer for sums over tokens, (programs, 10, C), or (programs, 11, C) with `input_bias`."""
    return empty_parts(x, 11 if input_bias else 10, block=CHANNELS, programs=4)


@on_its_device
def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    extra: Tensor | None = None,
    *,
    residual: bool,
    input_bias: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Return gradients of conv(x) (+ x if `residual`): for x, plus `extra`, and for taps, then bias.

    The latter are in parts, float32 (programs, 10, C). With `input_bias`, (programs, 11, C): also for a bias that was
    added to x.
    """
    batch, height, width, channels = x.shape
    x, x_stride = token_stride(x)
    grad, grad_stride = token_stride(grad)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = channel_block(channels, CHANNELS)
    tile = tile or (Tile(4, 14, block, 4) if height > 7 else Tile(4, 7, block, 2))
    num_pairs = batch * triton.cdiv(width, 2)
    num_blocks = triton.cdiv(num_pairs, tile.pairs) * triton.cdiv(height, tile.rows)
    partials = empty_sums(x, input_bias=input_bias)
    conv_backward_kernel[(partials.shape[0], triton.cdiv(channels, tile.channels))](
        *(grad, x, weight, grad if extra is None else extra.contiguous(), grad_x, partials),
        *(num_pairs, num_blocks, height, width, channels, grad_stride, x_stride),
        RESIDUAL=residual, EXTRA=extra is not None, INPUT_BIAS=input_bias,
        ROWS=tile.rows, PAIRS=tile.pairs, CHANNELS=tile.channels, UNROLL=tile.unroll, num_warps=tile.warps,
    )  # fmt: skip
    return grad_x, partials
