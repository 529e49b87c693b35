"""Triton kernels for GELU and its gradient, with sums over tokens for a bias.

Eager references: F.gelu, and `DropPath` (models/layers.py) for the scale of a branch. The bias belongs to the previous
linear layer: its gradient is the sum over tokens of the gradient that a kernel writes, so that no other pass has to
read it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.launch import channel_block, on_its_device
from models.kernels.triton.math import exponential, reciprocal, rescale
from models.kernels.triton.sums import empty_parts

DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def normal(x):
    """Return Phi(x) and exp(-x^2 / 2), by formula 7.1.26 of Abramowitz and Stegun: off by 1e-7 at most."""
    bell = exponential(-0.5 * x * x)
    t = reciprocal(1.0 + 0.23164189 * tl.abs(x))
    p = 0.5307027145 * t - 0.7265760135
    p = p * t + 0.7107068705
    p = p * t - 0.142248368
    p = p * t + 0.127414796
    tail = p * t * bell
    return tl.where(x > 0, 1.0 - tail, tail), bell


@triton.jit
def gelu_kernel(x, out, length, LENGTH: tl.constexpr):
    """Store out = x Phi(x)."""
    index = tl.program_id(0).to(tl.int64) * LENGTH + tl.arange(0, LENGTH)
    value = tl.load(x + index, mask=index < length, other=0.0).to(tl.float32)
    phi, _ = normal(value)
    tl.store(out + index, (value * phi).to(out.dtype.element_ty), mask=index < length)


@triton.jit(do_not_specialize=["tokens_per_image"])
def gelu_backward_kernel(
    grad, scale, x, grad_x, out, partials, num_tokens, tokens_per_image, channels,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store grad_x = scale[image] grad GELU'(x) and out = scale[image] GELU(x).

    `grad` is the gradient of `out`. Sums over tokens of grad_x go to `partials` (programs, channels).
    """
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    total = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    for first in range(tl.program_id(0) * TOKENS, num_tokens, tl.num_programs(0) * TOKENS):
        token = first + tl.arange(0, TOKENS)[:, None]
        index, ok = token.to(tl.int64) * channels + channel, (token < num_tokens) & (channel < channels)
        factor = tl.load(scale + token // tokens_per_image, mask=token < num_tokens, other=0.0).to(tl.float32)
        value = tl.load(x + index, mask=ok, other=0.0).to(tl.float32)
        upstream = rescale(tl.load(grad + index, mask=ok, other=0.0).to(tl.float32), factor)
        phi, bell = normal(value)
        tl.store(out + index, (factor * value * phi).to(out.dtype.element_ty), mask=ok)
        result = upstream * (phi + value * bell * DENSITY_AT_ZERO)
        total += result
        tl.store(grad_x + index, result.to(grad_x.dtype.element_ty), mask=ok)
    target = partials + tl.program_id(0) * channels + channel
    tl.store(target, tl.sum(total, 0, keep_dims=True), mask=channel < channels)


GELU_CHANNELS = 128  # of a program, at most
ELEMENTS = 2048  # that a program takes at a time


def empty_gelu_sums(x: Tensor) -> Tensor:
    """Return a buffer for the sums of `gelu_backward`, (programs, 1, C)."""
    return empty_parts(x, 1, block=GELU_CHANNELS, programs=4)


@on_its_device
def gelu_forward(x: Tensor, *, tile: tuple[int, int] = (1024, 4)) -> Tensor:
    """Return GELU(x) for a contiguous x; `tile`: elements, warps."""
    out = torch.empty_like(x)
    gelu_kernel[(triton.cdiv(x.numel(), tile[0]),)](x, out, x.numel(), LENGTH=tile[0], num_warps=tile[1])
    return out


@on_its_device
def gelu_backward(grad: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of x, scale GELU(x), and the gradient's sum over tokens in parts.

    x is (B, H, W, C), scale (B); `grad` is the gradient of the second result. The sum is float32 (programs, 1, C).
    """
    channels = x.shape[-1]
    block = channel_block(channels, GELU_CHANNELS)
    grad_x, out, partials = torch.empty_like(x), torch.empty_like(x), empty_gelu_sums(x)
    gelu_backward_kernel[(partials.shape[0], triton.cdiv(channels, block))](
        *(grad, scale, x, grad_x, out, partials, x.numel() // channels, x.shape[1:-1].numel(), channels),
        TOKENS=ELEMENTS // block, CHANNELS=block, num_warps=4,
    )  # fmt: skip
    return grad_x, out, partials
