"""Stretches of a block with a gradient of their own: what is cheap is computed again instead of being kept.

Their forward passes are plain PyTorch around kernels, so that torch.compile fuses what lies between these. Where two
kernels follow each other, the gradient of a bias between them is summed by the one that writes the gradient there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import ops
from models.kernels.products import add_product


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """That of `weight` (K, C) in a product x weight^T, from the product's gradient (..., K) and x (..., C)."""
    return (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)


class NormedProducts(torch.autograd.Function):
    """x + conv(x), and one or two products of its LayerNorm. The norm's result is not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, taps: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
        *weights_and_biases: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Tokens x (B, H, W, C); then weight (K, C) and bias (K,) of each product, whose results are (B, H, W, K)."""
        weights, biases = weights_and_biases[::2], weights_and_biases[1::2]
        out, normed = ops.conv_norm(x, taps, bias, norm_weight, norm_bias, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, taps, norm_weight, norm_bias, out, *weights)
        return out, *(linear(normed, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, norm_weight, norm_bias, out, *weights = ctx.saved_tensors
        grad_normed = grads[0] @ weights[0].to(x.dtype)
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            add_product(grad_normed, grad, weight.to(x.dtype).t())
        grad, norm_sums, normed = ops.norm_backward(grad_normed, out, grad_out, norm_weight, norm_bias, ctx.eps)
        grad_x, sums = ops.conv_backward(grad, x, taps, None, True, False)
        of_products: list[Tensor | None] = []
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            is_asked = ctx.needs_input_grad[7 + 2 * i]
            of_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype) if is_asked else None
            of_products += [weight_gradient(grad, normed, weight), of_bias]
        norm_sums = norm_sums.to(norm_weight.dtype)
        return grad_x, *ops.split_sums(sums, taps), norm_sums[0], norm_sums[1], None, *of_products


class ScaledBranch(torch.autograd.Function):
    """branch scale; `bias` (C,) is in branch (B, ..., C) already, and is here to get its gradient in the same pass."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = bias.dtype
        return branch * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        grad, total = ops.scale_and_sum(grad, ctx.saved_tensors[0])
        return grad, None, total.to(ctx.dtype)


class GeluBranch(torch.autograd.Function):
    """x + scale (GELU(hidden) weight^T + bias). GELU's result is not kept.

    `bias_before` (K,) is in hidden (B, ..., K) already, and is here to get its gradient in the same pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, hidden: Tensor, bias_before: Tensor, weight: Tensor, bias: Tensor, scale: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, scale)
        ctx.dtype = bias_before.dtype
        return x + linear(ops.gelu(hidden), weight, bias) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        branch, total = ops.scale_and_sum(grad, scale)
        grad_hidden, active, total_before = ops.gelu_backward(branch @ weight.to(branch.dtype), hidden)
        of_weight = weight_gradient(branch, active, weight)
        return grad, grad_hidden, total_before.to(ctx.dtype), of_weight, total.to(ctx.dtype), None
