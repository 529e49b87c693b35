"""Triton kernel for the MLP in inference: its hidden layer, four times as wide as the tokens, stays in registers.

Eager reference: timm's `Mlp` in `MLLABlock.mix_channels` (models/mlla.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.launch import matmul_precision, on_its_device
from models.kernels.triton.math import gelu

LEAST_TILE = 16  # rows and columns of tl.dot's operands


@triton.jit
def load_tile(pointer, row, column, row_ok, column_ok, row_stride, column_stride):
    """Load (rows, columns) of a matrix, with zeros outside."""
    place = pointer + column[None, :] * column_stride + row[:, None] * row_stride
    return tl.load(place, mask=row_ok[:, None] & column_ok[None, :], other=0.0)


@triton.jit
def store_sum(total, bias2, residual, out, token, channel, token_ok, channel_ok, channels):
    """Store residual + total + bias2."""
    total += tl.load(bias2 + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    total += load_tile(residual, token, channel, token_ok, channel_ok, channels, 1).to(tl.float32)
    index = token[:, None] * channels + channel[None, :]
    tl.store(out + index, total.to(out.dtype.element_ty), mask=token_ok[:, None] & channel_ok[None, :])


@triton.jit
def mlp_kernel(
    x, weight1, bias1, weight2, bias2, residual, out, num_tokens, channels, hidden,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Store out = residual + GELU(x weight1^T + bias1) weight2^T + bias2.

    Tokens are held in a tile of WIDE channels and, unless it is 0, another of NARROW.
    """
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    token_ok = token < num_tokens
    channel = tl.arange(0, WIDE)
    channel_ok = channel < channels
    value = load_tile(x, token, channel, token_ok, channel_ok, channels, 1)
    total = tl.zeros((TOKENS, WIDE), dtype=tl.float32)
    if NARROW:
        other = WIDE + tl.arange(0, NARROW)
        other_ok = other < channels
        other_value = load_tile(x, token, other, token_ok, other_ok, channels, 1)
        other_total = tl.zeros((TOKENS, NARROW), dtype=tl.float32)
    for first in range(0, hidden, HIDDEN):
        unit = first + tl.arange(0, HIDDEN)
        unit_ok = unit < hidden
        weight = load_tile(weight1, channel, unit, channel_ok, unit_ok, 1, channels)
        inner = tl.dot(value, weight, input_precision=PRECISION)
        if NARROW:
            other_weight = load_tile(weight1, other, unit, other_ok, unit_ok, 1, channels)
            inner = tl.dot(other_value, other_weight, inner, input_precision=PRECISION)
        inner += tl.load(bias1 + unit, mask=unit_ok, other=0.0).to(tl.float32)[None, :]
        inner = gelu(inner, PRECISION == "ieee").to(value.dtype)
        weight = load_tile(weight2, unit, channel, unit_ok, channel_ok, 1, hidden)
        total = tl.dot(inner, weight, total, input_precision=PRECISION)
        if NARROW:
            other_weight = load_tile(weight2, unit, other, unit_ok, other_ok, 1, hidden)
            other_total = tl.dot(inner, other_weight, other_total, input_precision=PRECISION)
    store_sum(total, bias2, residual, out, token, channel, token_ok, channel_ok, channels)
    if NARROW:
        store_sum(other_total, bias2, residual, out, token, other, token_ok, other_ok, channels)


def split_width(channels: int) -> tuple[int, int]:
    """Return the powers of two (wide, narrow) of two tiles side by side that hold all channels of a token.

    The second is 0 where one tile has no more lanes than two: 96 channels give 64 and 32, 128 give 128 and 0.
    """
    whole = triton.next_power_of_2(max(LEAST_TILE, channels))
    narrow = triton.next_power_of_2(max(LEAST_TILE, channels - whole // 2))
    return (whole // 2, narrow) if whole // 2 + narrow < whole else (whole, 0)


@on_its_device
def mlp_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor,
    *, tile: tuple[int, int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Return residual + MLP(x), both (..., C); weight1 (hidden, C), weight2 (C, hidden).

    `tile`: tokens, hidden units, warps, stages.
    """
    x, residual = x.contiguous(), residual.contiguous()
    channels, hidden = x.shape[-1], weight1.shape[0]
    num_tokens = x.numel() // channels
    out = torch.empty_like(x)
    tokens, units, warps, stages = tile or ((128, 32, 4, 3) if channels > 64 else (128, 64, 8, 2))
    wide, narrow = split_width(channels)
    mlp_kernel[(triton.cdiv(num_tokens, tokens),)](
        *(x, weight1, bias1, weight2, bias2, residual, out, num_tokens, channels, hidden),
        PRECISION=matmul_precision(x.dtype),
        TOKENS=tokens, WIDE=wide, NARROW=narrow, HIDDEN=units,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
