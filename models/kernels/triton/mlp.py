"""Triton kernel for the MLP in inference: its hidden layer, four times as wide as the tokens, stays in registers.

Eager reference: timm's `Mlp` in `MLLABlock.mix_channels` (models/mlla.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.launch import matmul_precision, on_its_device
from models.kernels.triton.math import gelu


@triton.jit
def mlp_kernel(
    x, weight1, bias1, weight2, bias2, residual, out, num_tokens, channels, hidden,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Store out = residual + GELU(x weight1^T + bias1) weight2^T + bias2."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, CHANNELS)
    token_ok, channel_ok = (token < num_tokens)[:, None], channel < channels
    index = token.to(tl.int64)[:, None] * channels + channel[None, :]
    ok = token_ok & channel_ok[None, :]
    value = tl.load(x + index, mask=ok, other=0.0)
    total = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    for first in range(0, hidden, HIDDEN):
        unit = first + tl.arange(0, HIDDEN)
        unit_ok = unit < hidden
        w1 = tl.load(
            weight1 + unit[None, :] * channels + channel[:, None],
            mask=unit_ok[None, :] & channel_ok[:, None],
            other=0.0,
        )
        w2 = tl.load(
            weight2 + channel[None, :] * hidden + unit[:, None], mask=unit_ok[:, None] & channel_ok[None, :], other=0.0
        )
        b1 = tl.load(bias1 + unit, mask=unit_ok, other=0.0).to(tl.float32)
        inner = gelu(tl.dot(value, w1, input_precision=PRECISION) + b1[None, :], PRECISION == "ieee")
        total = tl.dot(inner.to(value.dtype), w2, total, input_precision=PRECISION)
    total += tl.load(bias2 + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    total += tl.load(residual + index, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=ok)


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
    tokens, units, warps, stages = tile or ((128, 32, 4, 3) if channels == 128 else (128, 64, 8, 2))
    mlp_kernel[(triton.cdiv(num_tokens, tokens),)](
        *(x, weight1, bias1, weight2, bias2, residual, out, num_tokens, channels, hidden),
        PRECISION=matmul_precision(x.dtype),
        TOKENS=tokens, CHANNELS=max(16, triton.next_power_of_2(channels)), HIDDEN=units,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
