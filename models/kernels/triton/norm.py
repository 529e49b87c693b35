"""Triton kernels for LayerNorm over the channels of tokens, and its gradient with the residual's gradient added.

Eager reference: autograd of F.layer_norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton import LARGEST_WIDTH
from models.kernels.triton.launch import on_its_device
from models.kernels.triton.sums import empty_parts

MAX_REGISTERS = 128  # of a thread: all programs fit on the multiprocessors at once, PROGRAMS of 4 warps on each
PROGRAMS = 4


@triton.jit(do_not_specialize=["num_tokens"])
def norm_kernel(
    x, norm_weight, norm_bias, later_bias, out, num_tokens, channels, eps,
    LATER: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store out = LayerNorm(x), or with LATER LayerNorm(x - later_bias)."""
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    channel_ok = channel < channels
    index, ok = token * channels + channel, (token < num_tokens) & channel_ok
    scale = tl.load(norm_weight + channel, mask=channel_ok, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    value = tl.load(x + index, mask=ok, other=0.0).to(tl.float32)
    if LATER:
        value -= tl.load(later_bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=1, keep_dims=True) / channels
    centered = tl.where(channel_ok, value - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centered * centered, axis=1, keep_dims=True) / channels + eps)
    tl.store(out + index, (centered * inverse * scale + shift).to(out.dtype.element_ty), mask=ok)


@on_its_device
def norm_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, later_bias: Tensor | None = None
) -> Tensor:
    """Return LayerNorm(x) of x (B, H, W, C), or LayerNorm(x - later_bias) where that was added to x for later."""
    x, channels = x.contiguous(), x.shape[-1]
    out, num_tokens = torch.empty_like(x), x.numel() // channels
    block = triton.next_power_of_2(channels)
    # Fastest on an H200 with 96 to 768 channels; 64 were not tried with fewer warps.
    tokens, warps = (2048 // block, 4) if block <= 64 else (4, 1) if block <= 256 else (2, 2)
    norm_kernel[(triton.cdiv(num_tokens, tokens),)](
        *(x, norm_weight, norm_bias, norm_bias if later_bias is None else later_bias, out, num_tokens, channels, eps),
        LATER=later_bias is not None, BLOCK_TOKENS=tokens, BLOCK_CHANNELS=block, num_warps=warps,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens_per_image"])
def norm_backward_kernel(
    grad,
    x,
    residual_grad,
    branch_scale,
    norm_weight,
    norm_bias,
    grad_x,
    normed_out,
    partials,
    num_tokens,
    tokens_per_image,
    channels,
    eps,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Store grad_x = residual_grad + the gradient through LayerNorm(x), and that norm again.

    Sums over tokens for the norm's weight and bias, and of branch_scale[image] residual_grad, go to `partials`
    (programs, 3, channels).
    """
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    channel_ok = channel < channels
    scale = tl.load(norm_weight + channel, mask=channel_ok, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    scale_sum = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), dtype=tl.float32)
    shift_sum = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), dtype=tl.float32)
    branch_sum = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), dtype=tl.float32)
    for first in range(tl.program_id(0) * BLOCK_TOKENS, num_tokens, tl.num_programs(0) * BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)[:, None]
        ok = (token < num_tokens) & channel_ok
        index = token.to(tl.int64) * channels + channel
        value = tl.load(x + index, mask=ok, other=0.0).to(tl.float32)
        upstream = tl.load(grad + index, mask=ok, other=0.0).to(tl.float32)
        residual = tl.load(residual_grad + index, mask=ok, other=0.0).to(tl.float32)
        factor = tl.load(branch_scale + token // tokens_per_image, mask=token < num_tokens, other=0.0).to(tl.float32)
        branch_sum += factor * residual
        mean = tl.sum(value, axis=1, keep_dims=True) / channels
        centered = tl.where(channel_ok, value - mean, 0.0)
        inverse = tl.rsqrt(tl.sum(centered * centered, axis=1, keep_dims=True) / channels + eps)
        normed = centered * inverse
        tl.store(normed_out + index, (normed * scale + shift).to(normed_out.dtype.element_ty), mask=ok)
        scale_sum += upstream * normed
        shift_sum += upstream
        scaled = upstream * scale
        mean_grad = tl.sum(scaled, axis=1, keep_dims=True) / channels
        mean_product = tl.sum(scaled * normed, axis=1, keep_dims=True) / channels
        result = residual + inverse * (scaled - mean_grad - normed * mean_product)
        tl.store(grad_x + index, result.to(grad_x.dtype.element_ty), mask=ok)
    target = partials + tl.program_id(0) * 3 * channels + channel
    tl.store(target, tl.sum(scale_sum, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + channels, tl.sum(shift_sum, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 2 * channels, tl.sum(branch_sum, 0, keep_dims=True), mask=channel_ok)


def empty_sums(x: Tensor) -> Tensor:
    """Return a buffer for sums over tokens, (programs, 3, C): gradients of norm weight, norm bias, a branch's bias."""
    return empty_parts(x, 3, block=LARGEST_WIDTH, programs=PROGRAMS)


@on_its_device
def norm_backward(
    grad: Tensor,
    x: Tensor,
    residual_grad: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of (x, LayerNorm(x)): for x (B, H, W, C), and weight and bias; and LayerNorm(x).

    Those of weight and bias are in parts, float32 (programs, 3, C), together with the sum over tokens of residual_grad
    times the scale of its image (B): the gradient of a bias at the end of a branch. `tile`: tokens, warps.
    """
    channels = x.shape[-1]
    grad, x, residual_grad = grad.contiguous(), x.contiguous(), residual_grad.contiguous()
    num_tokens = x.numel() // channels
    block = triton.next_power_of_2(channels)
    tokens, warps = tile or (max(1, 2048 // block), 4)
    grad_x, normed = torch.empty_like(x), torch.empty_like(x)
    partials = empty_sums(x)
    norm_backward_kernel[(partials.shape[0],)](
        *(grad, x, residual_grad, scale, norm_weight, norm_bias, grad_x, normed, partials),
        *(num_tokens, x.shape[1:-1].numel(), channels, eps),
        BLOCK_TOKENS=tokens,
        BLOCK_CHANNELS=block,
        num_warps=warps,
        maxnreg=MAX_REGISTERS,
    )
    return grad_x, partials, normed
