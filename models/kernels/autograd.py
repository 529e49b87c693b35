"""Halves of a block, and a downsampling's wide part, with gradients of their own, written out.

What is cheap is computed again in the backward pass instead of being kept: norms, SiLU, GELU, the gated output of
attention, the wide tokens of a downsampling, and the MLP's hidden layer where channels are few. The gradient of a bias
is summed by the kernel that writes the gradient of what it was added to. Around the kernels this is plain PyTorch, for
torch.compile to fuse.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import ops
from models.kernels.matmul import add_product, linear, linear_again

WIDEST_HIDDEN_AGAIN = 96  # channels up to which a hidden layer's product costs little more than its passes over memory


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """That of `weight` (K, C) in a product x weight^T, from the product's gradient (..., K) and x (..., C)."""
    return (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)


def through(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient for x of a product x weight^T, from the product's: (..., K) and (K, C) to (..., C)."""
    return grad @ weight.to(grad.dtype)


class Mixer(torch.autograd.Function):
    """The first half of an MLLA block, x' + scale out_proj((attention + lepe)(v) SiLU(gate)) with x' = x + cpe1(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, heads: int, eps: float,
        cpe: Tensor, cpe_bias: Tensor, norm: Tensor, norm_bias: Tensor, inner: Tensor, inner_bias: Tensor,
        gate: Tensor, gate_bias: Tensor, dwc: Tensor, dwc_bias: Tensor, qk: Tensor, qk_bias: Tensor | None,
        lepe: Tensor, lepe_bias: Tensor, out: Tensor, out_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        """Tokens x (B, H, W, C), tables of angles, a scale (B, 1, 1, 1) of the branch, then weights and biases."""
        residual, normed = ops.conv_norm(x, cpe, cpe_bias, norm, norm_bias, eps)
        before, opening = linear(normed, inner, inner_bias), linear(normed, gate, gate_bias)
        v, inactive = ops.conv_silu(before, dwc, dwc_bias, True)
        queries_keys = linear(v, qk, qk_bias)
        gated, ungated, matrix, mean = ops.linear_attention(
            queries_keys, v, opening, lepe, lepe_bias, cos, sin, heads, True
        )
        ctx.heads, ctx.eps, ctx.has_qk_bias = heads, eps, qk_bias is not None
        ctx.save_for_backward(
            *(x, residual, before, opening, inactive, queries_keys, ungated, matrix, mean, cos, sin, scale),
            *(cpe, norm, norm_bias, inner, gate, dwc, qk, lepe, out),
        )
        return residual + linear(gated, out, out_bias) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, before, opening, inactive, queries_keys, ungated, matrix, mean, cos, sin, scale, *weights = (
            ctx.saved_tensors
        )
        cpe, norm, norm_bias, inner, gate, dwc, qk, lepe, out = weights

        v = F.silu(inactive)
        branch, of_out_bias = ops.scale_and_sum(grad, scale)
        of_qk, of_v, of_opening, of_ungated, gated, sums = ops.linear_attention_backward(
            through(branch, out), queries_keys, v, opening, ungated, cos, sin, matrix, mean, ctx.heads
        )
        of_out = weight_gradient(branch, gated, out)
        of_qk_bias, of_gate_bias = sums.split([len(qk), len(gate)])
        of_v, of_lepe = ops.conv_backward(of_ungated, v, lepe, of_v, False, False)
        add_product(of_v, of_qk, qk.to(of_v.dtype).t())
        of_before, of_dwc = ops.conv_backward(
            torch.ops.aten.silu_backward(of_v, inactive), before, dwc, None, False, True
        )
        of_normed = through(of_before, inner)
        add_product(of_normed, of_opening, gate.to(of_normed.dtype).t())
        of_residual, of_norm, normed = ops.norm_backward(of_normed, residual, grad, norm, norm_bias, ctx.eps)
        of_x, of_cpe = ops.conv_backward(of_residual, x, cpe, None, True, False)

        of_dwc_weight, of_dwc_bias, of_inner_bias = split_sums(of_dwc, dwc)
        return (
            *(of_x, None, None, None, None, None),
            *(*split_sums(of_cpe, cpe), of_norm[0], of_norm[1]),
            *(weight_gradient(of_before, normed, inner), of_inner_bias),
            *(weight_gradient(of_opening, normed, gate), of_gate_bias, of_dwc_weight, of_dwc_bias),
            *(weight_gradient(of_qk, v, qk), of_qk_bias if ctx.has_qk_bias else None),
            *(*split_sums(of_lepe, lepe), of_out, of_out_bias),
        )


class MlpBranch(torch.autograd.Function):
    """The second half of an MLLA block, x' + scale mlp(norm2(x')) with x' = x + cpe2(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, eps: float, cpe: Tensor, cpe_bias: Tensor, norm: Tensor, norm_bias: Tensor,
        widen: Tensor, widen_bias: Tensor, narrow: Tensor, narrow_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        """Tokens x (B, H, W, C), a scale (B, 1, 1, 1) of the branch, then weights and biases."""
        residual, normed = ops.conv_norm(x, cpe, cpe_bias, norm, norm_bias, eps)
        hidden = linear(normed, widen, widen_bias)
        ctx.eps = eps
        kept = hidden if x.shape[-1] > WIDEST_HIDDEN_AGAIN else None
        ctx.save_for_backward(x, residual, kept, scale, cpe, norm, norm_bias, widen, widen_bias, narrow)
        return residual + linear(ops.gelu(hidden), narrow, narrow_bias) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, hidden, scale, cpe, norm, norm_bias, widen, widen_bias, narrow = ctx.saved_tensors
        if hidden is None:
            normed = F.layer_norm(residual.float(), norm.shape, norm.float(), norm_bias.float(), ctx.eps).to(
                residual.dtype
            )
            hidden = linear_again(normed, widen, widen_bias)
        branch, of_narrow_bias = ops.scale_and_sum(grad, scale)
        of_hidden, active, of_widen_bias = ops.gelu_backward(through(branch, narrow), hidden)
        of_narrow = weight_gradient(branch, active, narrow)
        of_residual, of_norm, normed = ops.norm_backward(
            through(of_hidden, widen), residual, grad, norm, norm_bias, ctx.eps
        )
        of_x, of_cpe = ops.conv_backward(of_residual, x, cpe, None, True, False)
        return (
            *(of_x, None, None, *split_sums(of_cpe, cpe), of_norm[0], of_norm[1]),
            *(weight_gradient(of_hidden, normed, widen), of_widen_bias, of_narrow, of_narrow_bias),
        )


class WideConv(torch.autograd.Function):
    """ReLU(conv(ReLU(x widen^T + bias))), the convolution of stride 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, widen: Tensor, widen_bias: Tensor, taps: Tensor, taps_bias: Tensor) -> Tensor:
        """Tokens x (B, H, W, C), weights (K, C), (K,), (K, 1, 3, 3) and (K,), to (B, H / 2, W / 2, K)."""
        out = ops.strided_conv(linear(x, widen, widen_bias), taps, taps_bias)
        ctx.save_for_backward(x, widen, widen_bias, taps, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, widen, widen_bias, taps, out = ctx.saved_tensors
        of_wide, sums = ops.wide_conv_backward(grad, linear_again(x, widen, widen_bias), taps, out)
        of_taps, of_taps_bias, of_widen_bias = split_sums(sums, taps)
        return through(of_wide, widen), weight_gradient(of_wide, x, widen), of_widen_bias, of_taps, of_taps_bias


def split_sums(sums: Tensor, weight: Tensor) -> list[Tensor]:
    """(10 C,) to the gradients of a depthwise weight (C, 1, 3, 3) and its bias (C,); (11 C,): and of a bias before."""
    taps, *biases = sums.split([weight.numel()] + [len(weight)] * (len(sums) // len(weight) - 9))
    return [taps.view(weight.shape), *biases]
