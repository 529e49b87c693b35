"""Triton kernels for the top-down path of the feature pyramid, channels_last.

Eager reference: `fpn.add_upsampled_eagerly`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.triton.launch import channel_block, on_its_device

PIXELS = 8  # of a program
LARGEST_BLOCK = 256  # channels of a program
WARPS = 4


@triton.jit(do_not_specialize=["num_pixels", "width"])
def add_kernel(fine, coarse, out, num_pixels, width, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Store out = fine + coarse, whose rows and columns count twice; `width` is the fine map's."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    ok = (pixel < num_pixels) & (channel < channels)
    source = (pixel // width // 2) * (width // 2) + pixel % width // 2
    index = pixel.to(tl.int64) * channels + channel
    total = tl.load(fine + index, mask=ok, other=0.0).to(tl.float32)
    total += tl.load(coarse + source.to(tl.int64) * channels + channel, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_pixels", "width"])
def sum_kernel(fine, coarse, num_pixels, width, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Store the sums of 2x2 pixels of fine in coarse; `num_pixels` and `width` are the coarse map's."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    ok = (pixel < num_pixels) & (channel < channels)
    first = (pixel // width) * 4 * width + pixel % width * 2
    total = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    for row in tl.static_range(2):
        for column in tl.static_range(2):
            index = (first + row * 2 * width + column).to(tl.int64) * channels + channel
            total += tl.load(fine + index, mask=ok, other=0.0).to(tl.float32)
    tl.store(coarse + pixel.to(tl.int64) * channels + channel, total.to(coarse.dtype.element_ty), mask=ok)


@on_its_device
def launch(out: Tensor, fine: Tensor, coarse: Tensor | None = None) -> Tensor:
    """Write fine plus coarse, or without coarse sums of 2x2 pixels of fine, to `out` (B, C, H, W), and return it."""
    batch, channels, height, width = out.shape
    num_pixels, block = batch * height * width, channel_block(channels, LARGEST_BLOCK)
    kernel, inputs = (sum_kernel, (fine,)) if coarse is None else (add_kernel, (fine, coarse))
    kernel[(triton.cdiv(num_pixels, PIXELS), triton.cdiv(channels, block))](
        *(*inputs, out, num_pixels, width, channels),
        PIXELS=PIXELS,
        CHANNELS=block,
        num_warps=WARPS,
    )
    return out


class AddUpsampled(torch.autograd.Function):
    """fine (B, C, 2 h, 2 w) plus the nearest cells of coarse (B, C, h, w)."""

    @staticmethod
    def forward(ctx: Any, fine: Tensor, coarse: Tensor) -> Tensor:
        fine, coarse = (x.contiguous(memory_format=torch.channels_last) for x in (fine, coarse))
        ctx.shape = coarse.shape
        return launch(torch.empty_like(fine), fine, coarse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        grad = grad.contiguous(memory_format=torch.channels_last)
        coarse = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        return grad, launch(coarse, grad)


def add_upsampled_with_kernel(fine: Tensor, coarse: Tensor) -> Tensor:
    """Return the sum as `add_upsampled_eagerly` does, of maps of one dtype, of which fine is twice as large."""
    return AddUpsampled.apply(fine, coarse)
