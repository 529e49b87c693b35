"""Triton kernels for the 3x3 depthwise convolution on tokens (B, H, W, C), stride 1, zero padding, with bias.

Eager reference: `TokenConv` in models/layers.py, and what follows it in `MLLABlock` (models/mlla.py).

A program takes pairs of neighboring columns (of all images, end to end) and a band of rows, and goes down: each row is
read once, with the neighbors of each pair, and adds to the three output rows it touches, which stay in registers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.depthwise_io import load_gate, load_row, load_stencil, to_float
from models.kernels.triton.launch import channel_block, num_multiprocessors, on_its_device, token_stride
from models.kernels.triton.math import as_tile, sigmoid
from models.kernels.triton.norm import norm_forward

WIDEST_NORM = 256  # channels; beyond, many tokens are normalized in a launch of their own
MANY_TOKENS = 2048  # of all images together


@triton.jit
def finish(
    result, attended, gate, offset, ok, channel_ok, out, second_out, channels, eps, scale, shift, later,
    NORM: tl.constexpr, SILU: tl.constexpr, GATE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Store a token's convolution, and its norm, SiLU or gated value."""
    if NORM:
        rounded = result.to(out.dtype.element_ty)
        tl.store(out + offset, (rounded + later).to(out.dtype.element_ty), mask=ok)
        value = rounded.to(tl.float32)
        mean = tl.sum(value, axis=1, keep_dims=True) / channels
        centered = tl.where(channel_ok, value - mean, 0.0)
        variance = tl.sum(centered * centered, axis=1, keep_dims=True) / channels
        result = centered * tl.rsqrt(variance + eps) * scale + shift
    else:
        if GATE:
            result += attended.to(tl.float32)
        if KEEP:
            tl.store(out + offset, result.to(out.dtype.element_ty), mask=ok)
        if SILU:
            result *= sigmoid(result)
        if GATE:
            g = gate.to(tl.float32)
            result *= g * sigmoid(g)
    tl.store(second_out + offset, result.to(second_out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "height", "width"])
def conv_forward_kernel(
    x, weight, bias, norm_weight, norm_bias, later_bias, attended, gate, out, second_out,
    num_pairs, num_blocks, height, width, channels, x_token_stride, gate_token_stride, eps,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, LATER: tl.constexpr, SILU: tl.constexpr, GATE: tl.constexpr,
    KEEP: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Compute one of four; `out` is stored for NORM, and for SILU and GATE if KEEP.

    NORM: out = conv(x) + bias + x, second_out = LayerNorm(out), and then out += later_bias if LATER.
    RESIDUAL: second_out = conv(x) + bias + x, + later_bias if LATER.
    SILU: out = conv(x) + bias, second_out = SiLU(out).
    GATE: out = conv(x) + bias + attended, second_out = out SiLU(gate).
    """
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    channel_ok = channel < channels
    top0, top1, top2, mid0, mid1, mid2, low0, low1, low2 = load_stencil(weight, channel, channel_ok)
    start = tl.load(bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    scale, shift = start, start
    if NORM:
        scale = tl.load(norm_weight + channel, mask=channel_ok, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    later = start * 0.0
    if LATER:
        later = tl.load(later_bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    if RESIDUAL:
        start += later
        mid1 += 1.0
    pairs_per_row = (width + 1) // 2
    num_pair_blocks = tl.cdiv(num_pairs, PAIRS)
    row_stride = width * x_token_stride
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        pair = ((block % num_pair_blocks) * PAIRS + tl.arange(0, PAIRS))[:, None]
        first_row = (block // num_pair_blocks) * ROWS
        image, w = pair // pairs_per_row, pair % pairs_per_row * 2
        ok1 = (pair < num_pairs) & channel_ok
        ok0, ok2, ok3 = ok1 & (w > 0), ok1 & (w + 1 < width), ok1 & (w + 2 < width)
        token = image.to(tl.int64) * height * width + w
        pointer = x + token * x_token_stride + channel
        offset = token * channels + channel

        # Load two rows ahead: memory latency is long, and stores delay later loads.
        a, b, c, d = load_row(pointer, first_row - 1, height, ok0, ok1, ok2, ok3, row_stride, x_token_stride)
        e, f, g, h = load_row(pointer, first_row, height, ok0, ok1, ok2, ok3, row_stride, x_token_stride)
        next0, next1, next2, next3 = load_row(
            pointer, first_row + 1, height, ok0, ok1, ok2, ok3, row_stride, x_token_stride
        )
        then0, then1, then2, then3 = load_row(
            pointer, first_row + 2, height, ok0, ok1, ok2, ok3, row_stride, x_token_stride
        )
        next_attended1, next_attended2, next_gate1, next_gate2 = a, a, a, a
        gate_pointer = gate + token * gate_token_stride + channel
        if GATE:
            next_attended1, next_attended2, next_gate1, next_gate2 = load_gate(
                attended + offset, gate_pointer, first_row, height, ok1, ok2, width, channels, gate_token_stride
            )
        a, b, c, d = to_float(a, b, c, d)
        current1 = start + top0 * a + top1 * b + top2 * c
        current2 = start + top0 * b + top1 * c + top2 * d
        a, b, c, d = to_float(e, f, g, h)
        current1 += mid0 * a + mid1 * b + mid2 * c
        current2 += mid0 * b + mid1 * c + mid2 * d
        following1 = start + top0 * a + top1 * b + top2 * c
        following2 = start + top0 * b + top1 * c + top2 * d
        above1, above2 = b, c
        for i in tl.range(0, ROWS, loop_unroll_factor=UNROLL):
            row = first_row + i
            a, b, c, d = to_float(next0, next1, next2, next3)
            next0, next1, next2, next3 = then0, then1, then2, then3
            more = as_tile(i) + 2 < ROWS
            then0, then1, then2, then3 = load_row(
                pointer, row + 3, height, ok0 & more, ok1 & more, ok2 & more, ok3 & more, row_stride, x_token_stride
            )
            here = offset + row * width * channels
            inside = as_tile(row) < height
            attended1, attended2, gate1, gate2 = next_attended1, next_attended2, next_gate1, next_gate2
            if GATE:
                more = as_tile(i) + 1 < ROWS
                next_attended1, next_attended2, next_gate1, next_gate2 = load_gate(
                    attended + offset,
                    gate_pointer,
                    row + 1,
                    height,
                    ok1 & more,
                    ok2 & more,
                    width,
                    channels,
                    gate_token_stride,
                )
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
            finish(
                result1, attended1, gate1, here, ok1 & inside, channel_ok, out, second_out, channels, eps, scale, shift,
                later, NORM, SILU, GATE, KEEP,
            )  # fmt: skip
            finish(
                result2, attended2, gate2, here + channels, ok2 & inside, channel_ok, out, second_out, channels, eps,
                scale, shift, later, NORM, SILU, GATE, KEEP,
            )  # fmt: skip


class Tile(NamedTuple):
    """Work of one program at a time: pairs of columns, rows, channels; its warps, and rows in one turn of its loop."""

    pairs: int
    rows: int
    channels: int
    warps: int
    unroll: int = 2


@on_its_device
def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, second_out: Tensor, tile: Tile,
    *, norm: tuple[Tensor, Tensor, float] | None = None, later_bias: Tensor | None = None,
    gate: tuple[Tensor, Tensor] | None = None, residual: bool = False, keep: bool = True,
) -> None:  # fmt: skip
    """Launch the kernel: `norm` is (weight, bias, eps) of a LayerNorm, `gate` (attended, gate), `residual` adds x.

    With none of them it applies SiLU.
    """
    batch, height, width, channels = x.shape
    x, stride = token_stride(x)
    attended, gate_tokens = gate or (x, x)
    gate_tokens, gate_stride = token_stride(gate_tokens)
    num_pairs = batch * triton.cdiv(width, 2)
    pair_blocks, channel_blocks = triton.cdiv(num_pairs, tile.pairs), triton.cdiv(channels, tile.channels)
    rows = tile.rows
    while rows > 1 and pair_blocks * triton.cdiv(height, rows) * channel_blocks < 2 * num_multiprocessors(x.device):
        rows //= 2  # with one or two images, shorter bands beat idle multiprocessors
    num_blocks = pair_blocks * triton.cdiv(height, rows)
    programs = min(num_blocks, max(1, 16 * num_multiprocessors(x.device) // channel_blocks))
    conv_forward_kernel[(programs, channel_blocks)](
        *(x, weight, bias, *((norm or (bias, bias))[:2]), bias if later_bias is None else later_bias),
        *(attended, gate_tokens, out, second_out),
        *(num_pairs, num_blocks, height, width, channels, stride, gate_stride, norm[2] if norm else 0.0),
        NORM=norm is not None, RESIDUAL=residual, LATER=later_bias is not None,
        SILU=norm is None and gate is None and not residual, GATE=gate is not None, KEEP=keep,
        ROWS=rows, PAIRS=tile.pairs, CHANNELS=tile.channels, UNROLL=min(rows, tile.unroll), num_warps=tile.warps,
    )  # fmt: skip


def conv_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    later_bias: Tensor | None = None, *, tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return x + conv(x), with `later_bias` added after taking its LayerNorm, and that norm; each (B, H, W, C)."""
    out, channels = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    if channels > WIDEST_NORM and x.numel() >= MANY_TOKENS * channels and tile is None:
        rows = 14 if x.shape[1] > 7 else 7
        tile = Tile(4, rows, 128, 4, unroll=rows)
        conv_forward(x, weight, bias, out, out, tile, later_bias=later_bias, residual=True, keep=False)
        return out, norm_forward(out, norm_weight, norm_bias, eps, later_bias)
    normed = torch.empty_like(out)
    block = triton.next_power_of_2(channels)
    is_tall = x.shape[1] > 14
    pairs = max(1, (256 if is_tall else 512) // block)
    tile = tile or Tile(pairs, 14 if is_tall else 7, block, max(min(2, pairs), block // 256))
    norm = (norm_weight, norm_bias, eps)
    conv_forward(x, weight, bias, out, normed, tile, norm=norm, later_bias=later_bias)
    return out, normed


def conv_silu_forward(
    x: Tensor, weight: Tensor, bias: Tensor, *, keep: bool, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Return SiLU(conv(x)) and, with `keep`, conv(x), else an empty tensor."""
    active = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    linear_out = torch.empty(x.shape if keep else (0,), dtype=x.dtype, device=x.device)
    conv_forward(x, weight, bias, linear_out, active, tile or silu_tile(x), keep=keep)
    return active, linear_out


def conv_gate_forward(
    x: Tensor, weight: Tensor, bias: Tensor, attended: Tensor, gate: Tensor, *, keep: bool, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Return (conv(x) + attended) SiLU(gate) and, with `keep`, conv(x) + attended, else an empty tensor."""
    gated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    linear_out = torch.empty(x.shape if keep else (0,), dtype=x.dtype, device=x.device)
    conv_forward(x, weight, bias, linear_out, gated, tile or gate_tile(x), gate=(attended, gate), keep=keep)
    return gated, linear_out


# These tiles were fastest on an H200 in MLLA-T's four grids.
def silu_tile(x: Tensor) -> Tile:
    channels = channel_block(x.shape[-1], 64)
    return Tile(4, 14, channels, 4, unroll=14) if x.shape[1] > 7 else Tile(4, 7, channels, 2, unroll=7)


def gate_tile(x: Tensor) -> Tile:
    return Tile(4, 14 if x.shape[1] > 14 else 7, channel_block(x.shape[-1], 64), 2)
