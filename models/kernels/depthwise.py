"""Triton kernels for the 3x3 depthwise convolution on tokens (B, H, W, C), stride 1, zero padding, with bias.

A program takes pairs of neighbouring columns (of all images, end to end) and a band of rows, and marches down: each row
is read once, with the neighbours of each pair, and adds to the three output rows it touches, which stay in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.functions import as_tile, sigmoid, sum_parts
from models.kernels.launch import channel_block, num_multiprocessors, token_stride


@triton.jit
def load_row(pointer, row, height, ok0, ok1, ok2, ok3, row_stride, token_stride):
    """A pair of tokens of the row between their left and right neighbours; zeros outside the image."""
    inside = (as_tile(row) < height) & (as_tile(row) >= 0)
    here = pointer + row * row_stride
    left = tl.load(here - token_stride, mask=ok0 & inside, other=0.0)
    first = tl.load(here, mask=ok1 & inside, other=0.0)
    second = tl.load(here + token_stride, mask=ok2 & inside, other=0.0)
    right = tl.load(here + 2 * token_stride, mask=ok3 & inside, other=0.0)
    return left, first, second, right


@triton.jit
def load_taps(weight, channel, channel_ok, row: tl.constexpr):
    """The three weights of one row of the stencil, each (1, channels)."""
    base = weight + channel * 9 + row * 3
    first = tl.load(base, mask=channel_ok, other=0.0).to(tl.float32)
    second = tl.load(base + 1, mask=channel_ok, other=0.0).to(tl.float32)
    third = tl.load(base + 2, mask=channel_ok, other=0.0).to(tl.float32)
    return first, second, third


@triton.jit
def to_float(a, b, c, d):
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)


@triton.jit
def finish(
    result, offset, ok, channel_ok, attended, gate, out, second_out, channels, eps, scale, shift,
    NORM: tl.constexpr, SILU: tl.constexpr, GATE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Store one token's result, and what follows from it."""
    rounded = result.to(out.dtype.element_ty)
    if KEEP and not GATE:
        tl.store(out + offset, rounded, mask=ok)
    if NORM:
        value = rounded.to(tl.float32)
        mean = tl.sum(value, axis=1, keep_dims=True) / channels
        centred = tl.where(channel_ok, value - mean, 0.0)
        variance = tl.sum(centred * centred, axis=1, keep_dims=True) / channels
        normed = centred * tl.rsqrt(variance + eps) * scale + shift
        tl.store(second_out + offset, normed.to(second_out.dtype.element_ty), mask=ok)
    if SILU:
        tl.store(second_out + offset, (result * sigmoid(result)).to(second_out.dtype.element_ty), mask=ok)
    if GATE:
        result += tl.load(attended + offset, mask=ok, other=0.0).to(tl.float32)
        if KEEP:
            tl.store(out + offset, result.to(out.dtype.element_ty), mask=ok)
        g = tl.load(gate + offset, mask=ok, other=0.0).to(tl.float32)
        tl.store(second_out + offset, (result * g * sigmoid(g)).to(second_out.dtype.element_ty), mask=ok)


@triton.jit
def conv_forward_kernel(
    x, weight, bias, norm_weight, norm_bias, attended, gate, out, second_out,
    num_pairs, num_blocks, height, width, channels, x_token_stride, eps,
    NORM: tl.constexpr, SILU: tl.constexpr, GATE: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One of three: NORM, out = conv(x) + bias + x, second_out = LayerNorm(out); SILU, out = conv(x) + bias,
    second_out = SiLU(out); GATE, out = conv(x) + bias + attended, second_out = out SiLU(gate). `out` is stored if KEEP.
    """
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    channel_ok = channel < channels
    top0, top1, top2 = load_taps(weight, channel, channel_ok, 0)
    mid0, mid1, mid2 = load_taps(weight, channel, channel_ok, 1)
    low0, low1, low2 = load_taps(weight, channel, channel_ok, 2)
    start = tl.load(bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    scale, shift = start, start
    if NORM:
        scale = tl.load(norm_weight + channel, mask=channel_ok, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    pairs_a_row = (width + 1) // 2
    num_pair_blocks = tl.cdiv(num_pairs, PAIRS)
    row_stride = width * x_token_stride
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        pair = ((block % num_pair_blocks) * PAIRS + tl.arange(0, PAIRS))[:, None]
        first_row = (block // num_pair_blocks) * ROWS
        image, w = pair // pairs_a_row, pair % pairs_a_row * 2
        ok1 = (pair < num_pairs) & channel_ok
        ok0, ok2, ok3 = ok1 & (w > 0), ok1 & (w + 1 < width), ok1 & (w + 2 < width)
        token = image.to(tl.int64) * height * width + w
        pointer = x + token * x_token_stride + channel
        offset = token * channels + channel

        a, b, c, d = to_float(*load_row(pointer, first_row - 1, height, ok0, ok1, ok2, ok3, row_stride, x_token_stride))
        current1 = start + top0 * a + top1 * b + top2 * c
        current2 = start + top0 * b + top1 * c + top2 * d
        a, b, c, d = to_float(*load_row(pointer, first_row, height, ok0, ok1, ok2, ok3, row_stride, x_token_stride))
        current1 += mid0 * a + mid1 * b + mid2 * c
        current2 += mid0 * b + mid1 * c + mid2 * d
        following1 = start + top0 * a + top1 * b + top2 * c
        following2 = start + top0 * b + top1 * c + top2 * d
        above1, above2 = b, c
        for i in tl.static_range(ROWS):
            row = first_row + i
            a, b, c, d = to_float(*load_row(pointer, row + 1, height, ok0, ok1, ok2, ok3, row_stride, x_token_stride))
            result1 = current1 + low0 * a + low1 * b + low2 * c
            result2 = current2 + low0 * b + low1 * c + low2 * d
            current1 = following1 + mid0 * a + mid1 * b + mid2 * c
            current2 = following2 + mid0 * b + mid1 * c + mid2 * d
            following1 = start + top0 * a + top1 * b + top2 * c
            following2 = start + top0 * b + top1 * c + top2 * d
            if NORM:
                result1 += above1
                result2 += above2
            above1, above2 = b, c
            here = offset + row * width * channels
            inside = as_tile(row) < height
            finish(
                result1, here, ok1 & inside, channel_ok, attended, gate, out, second_out, channels, eps, scale, shift,
                NORM, SILU, GATE, KEEP,
            )  # fmt: skip
            finish(
                result2, here + channels, ok2 & inside, channel_ok, attended, gate, out, second_out, channels, eps,
                scale, shift, NORM, SILU, GATE, KEEP,
            )  # fmt: skip


@triton.jit
def conv_backward_kernel(
    grad, x, weight, extra, grad_x, partials,
    num_pairs, num_blocks, height, width, channels, grad_token_stride, x_token_stride,
    RESIDUAL: tl.constexpr, EXTRA: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the convolution: grad_x (+ grad if RESIDUAL, + extra if EXTRA); sums over tokens go to `partials`
    (programs, 10, channels): nine taps and the bias, one part for each program, so that the order of adding is fixed.
    """
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    channel_ok = channel < channels
    top0, top1, top2 = load_taps(weight, channel, channel_ok, 0)
    mid0, mid1, mid2 = load_taps(weight, channel, channel_ok, 1)
    low0, low1, low2 = load_taps(weight, channel, channel_ok, 2)
    zeros = tl.zeros((PAIRS, CHANNELS), dtype=tl.float32)
    t0, t1, t2, m0, m1, m2, l0, l1, l2, total = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    pairs_a_row = (width + 1) // 2
    num_pair_blocks = tl.cdiv(num_pairs, PAIRS)
    grad_row_stride = width * grad_token_stride
    x_row_stride = width * x_token_stride
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        pair = ((block % num_pair_blocks) * PAIRS + tl.arange(0, PAIRS))[:, None]
        first_row = (block // num_pair_blocks) * ROWS
        image, w = pair // pairs_a_row, pair % pairs_a_row * 2
        ok1 = (pair < num_pairs) & channel_ok
        ok0, ok2, ok3 = ok1 & (w > 0), ok1 & (w + 1 < width), ok1 & (w + 2 < width)
        token = image.to(tl.int64) * height * width + w
        grad_pointer = grad + token * grad_token_stride + channel
        x_pointer = x + token * x_token_stride + channel
        offset = token * channels + channel
        # Two zeros: Triton takes a name for a constant if a loop seems to give it the object that it had before.
        x_above1, x_above2 = zeros * 1.0, zeros * 1.0
        x_here1, x_here2 = zeros, zeros
        above1, above2, here1, here2 = zeros, zeros, zeros, zeros  # of grad_x: rows row - 1 and row
        grad_above1, grad_above2 = zeros, zeros
        for i in tl.range(ROWS + 2):
            row = first_row - 1 + i  # of grad; it touches grad_x in the rows row - 1, row and row + 1
            a, b, c, d = to_float(
                *load_row(grad_pointer, row, height, ok0, ok1, ok2, ok3, grad_row_stride, grad_token_stride)
            )
            below_ok = (as_tile(i) < ROWS) & (as_tile(row) + 1 < height)
            x_next = x_pointer + (row + 1) * x_row_stride
            x_below1 = tl.load(x_next, mask=ok1 & below_ok, other=0.0).to(tl.float32)
            x_below2 = tl.load(x_next + x_token_stride, mask=ok2 & below_ok, other=0.0).to(tl.float32)
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
            done = (as_tile(i) >= 2) & (as_tile(row) - 1 < height)
            place = offset + (row - 1) * width * channels
            if RESIDUAL:
                result1 += grad_above1
                result2 += grad_above2
            if EXTRA:
                result1 += tl.load(extra + place, mask=ok1 & done, other=0.0).to(tl.float32)
                result2 += tl.load(extra + place + channels, mask=ok2 & done, other=0.0).to(tl.float32)
            tl.store(grad_x + place, result1.to(grad_x.dtype.element_ty), mask=ok1 & done)
            tl.store(grad_x + place + channels, result2.to(grad_x.dtype.element_ty), mask=ok2 & done)
            grad_above1, grad_above2 = b, c
            x_above1, x_above2 = x_here1, x_here2
            x_here1, x_here2 = x_below1, x_below2
    target = partials + tl.program_id(0) * 10 * channels + channel
    tl.store(target, tl.sum(t0, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + channels, tl.sum(t1, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 2 * channels, tl.sum(t2, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 3 * channels, tl.sum(m0, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 4 * channels, tl.sum(m1, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 5 * channels, tl.sum(m2, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 6 * channels, tl.sum(l0, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 7 * channels, tl.sum(l1, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 8 * channels, tl.sum(l2, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 9 * channels, tl.sum(total, 0, keep_dims=True), mask=channel_ok)


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, second_out: Tensor, tile: tuple[int, int, int, int],
    *, norm: tuple[Tensor, Tensor, float] | None = None, gate: tuple[Tensor, Tensor] | None = None, keep: bool = True,
) -> None:  # fmt: skip
    """Launch the forward kernel; `tile` is (column pairs, rows, channels, warps) of a program.

    `norm` is (weight, bias, eps) of a LayerNorm, `gate` (attended, gate); without either, SiLU follows.
    """
    batch, height, width, channels = x.shape
    x, stride = token_stride(x)
    pairs, rows, block, warps = tile
    num_pairs = batch * triton.cdiv(width, 2)
    num_blocks = triton.cdiv(num_pairs, pairs) * triton.cdiv(height, rows)
    channel_blocks = triton.cdiv(channels, block)
    programs = min(num_blocks, max(1, 16 * num_multiprocessors(x.device) // channel_blocks))
    conv_forward_kernel[(programs, channel_blocks)](
        *(x, weight, bias, *((norm or (bias, bias))[:2]), *(gate or (x, x)), out, second_out),
        *(num_pairs, num_blocks, height, width, channels, stride, norm[2] if norm else 0.0),
        NORM=norm is not None, SILU=norm is None and gate is None, GATE=gate is not None, KEEP=keep,
        ROWS=rows, PAIRS=pairs, CHANNELS=block, num_warps=warps,
    )  # fmt: skip


def conv_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    *, tile: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + conv(x) and its LayerNorm, each (B, H, W, C); `tile` is (column pairs, rows, warps) of a program."""
    out, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    block = triton.next_power_of_2(x.shape[-1])
    pairs, rows, warps = tile or (max(1, 256 // block), 7, max(1, block // 256))
    conv_forward(x, weight, bias, out, normed, (pairs, rows, block, warps), norm=(norm_weight, norm_bias, eps))
    return out, normed


def conv_silu_forward(
    x: Tensor, weight: Tensor, bias: Tensor, *, keep: bool, tile: tuple[int, int, int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """SiLU(conv(x)) and, with `keep`, conv(x) itself, else an empty tensor; `tile` as in `conv_forward`."""
    active = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    before = torch.empty(x.shape if keep else (0,), dtype=x.dtype, device=x.device)
    conv_forward(x, weight, bias, before, active, tile or default_tile(x), keep=keep)
    return active, before


def conv_gate_forward(
    x: Tensor, weight: Tensor, bias: Tensor, attended: Tensor, gate: Tensor,
    *, keep: bool, tile: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(conv(x) + attended) SiLU(gate) and, with `keep`, conv(x) + attended, else an empty tensor."""
    gated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    before = torch.empty(x.shape if keep else (0,), dtype=x.dtype, device=x.device)
    conv_forward(x, weight, bias, before, gated, tile or default_tile(x), gate=(attended, gate), keep=keep)
    return gated, before


def default_tile(x: Tensor) -> tuple[int, int, int, int]:
    """(column pairs, rows, channels, warps) that did best on an H200 in this grid's neighbourhood."""
    return (4, 14, channel_block(x.shape[-1], 64), 2) if x.shape[1] > 14 else (8, 7, channel_block(x.shape[-1], 64), 4)


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    extra: Tensor | None = None,
    *,
    residual: bool,
    tile: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of conv(x) (+ x if `residual`): for x, plus `extra`, and float32 (10, C): nine taps, then the bias."""
    batch, height, width, channels = x.shape
    x, x_stride = token_stride(x)
    grad, grad_stride = token_stride(grad)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pairs, rows, block, warps = tile or (
        (8, 14, channel_block(channels, 64), 4) if channels <= 64 else (8, 14, channel_block(channels, 32), 1)
    )
    num_pairs = batch * triton.cdiv(width, 2)
    num_blocks = triton.cdiv(num_pairs, pairs) * triton.cdiv(height, rows)
    channel_blocks = triton.cdiv(channels, block)
    programs = min(num_blocks, max(1, 4 * num_multiprocessors(x.device) // channel_blocks))
    partials = torch.empty(programs, 10, channels, dtype=torch.float32, device=x.device)
    conv_backward_kernel[(programs, channel_blocks)](
        *(grad, x, weight, grad if extra is None else extra.contiguous(), grad_x, partials),
        *(num_pairs, num_blocks, height, width, channels, grad_stride, x_stride),
        RESIDUAL=residual, EXTRA=extra is not None, ROWS=rows, PAIRS=pairs, CHANNELS=block, num_warps=warps,
    )  # fmt: skip
    return grad_x, sum_parts(partials)  # (10, C)
