"""Autograd functions of the kernels: a block's two halves, and the wide layers of a downsampling.

The backward pass recomputes what is cheap instead of keeping it: norms, SiLU, GELU, the gated output of attention, the
wide tokens of a downsampling, and the MLP's hidden layer where channels are few. The kernel that writes the gradient of
a biased tensor also sums it for the bias, in parts; one launch at the end sums the parts of all. A branch's scale is
applied by kernels that load or store the tensors around it, and the norm's, which reads the branch's gradient as the
residual's, sums it for the bias. Around the kernels this is PyTorch that torch.compile can fuse.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels import ops
from models.kernels.matmul import add_product, linear, linear_again

WIDEST_HIDDEN_AGAIN = 96  # channels up to which a hidden layer's product costs little more than its passes over memory


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of `weight` (K, C) in x weight^T, from the product's gradient (..., K) and x (..., C)."""
    return (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of x in x weight^T, from the product's: (..., K) and (K, C) to (..., C)."""
    return grad @ weight.to(grad.dtype)


class Mixer(torch.autograd.Function):
    """`MLLABlock.mix_tokens`: x' + scale out_proj((attention + lepe)(v) SiLU(gate)) with x' = x + cpe1(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, scale: Tensor, heads: int, eps: float,
        cpe: Tensor, cpe_bias: Tensor, norm: Tensor, norm_bias: Tensor, in_proj: Tensor, in_proj_bias: Tensor,
        act_proj: Tensor, act_proj_bias: Tensor, dwc: Tensor, dwc_bias: Tensor, qk: Tensor, qk_bias: Tensor | None,
        lepe: Tensor, lepe_bias: Tensor, out: Tensor, out_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        """Tokens x (B, H, W, C), tables of angles, a scale (B, 1, 1, 1) of the branch, then weights and biases."""
        residual, normed = ops.conv_norm(x, cpe, cpe_bias, norm, norm_bias, eps)
        inner, gate = linear(normed, in_proj, in_proj_bias), linear(normed, act_proj, act_proj_bias)
        v, inactive = ops.conv_silu(inner, dwc, dwc_bias, True)
        queries_keys = linear(v, qk, qk_bias)
        gated, ungated, matrix, mean = ops.linear_attention(queries_keys, v, gate, lepe, lepe_bias, cos, sin, heads)
        ctx.heads, ctx.eps, ctx.has_qk_bias = heads, eps, qk_bias is not None
        ctx.save_for_backward(
            *(x, residual, inner, gate, inactive, queries_keys, ungated, matrix, mean, cos, sin, scale),
            *(cpe, norm, norm_bias, in_proj, act_proj, dwc, qk, lepe, out),
        )
        return residual + linear(gated, out, out_bias) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, inner, gate, inactive, queries_keys, ungated, matrix, mean, cos, sin, scale, *weights = (
            ctx.saved_tensors
        )
        cpe, norm, norm_bias, in_proj, act_proj, dwc, qk, lepe, out = weights

        v = F.silu(inactive)
        grad = grad.contiguous()
        grad_qk, grad_v, grad_gate, grad_ungated, scaled_gated, qk_gate_parts = ops.linear_attention_backward(
            input_gradient(grad, out), scale, queries_keys, v, gate, ungated, cos, sin, matrix, mean, ctx.heads
        )
        grad_out = weight_gradient(grad, scaled_gated, out)
        grad_v, lepe_parts = ops.conv_backward(grad_ungated, v, lepe, grad_v, False, False)
        add_product(grad_v, grad_qk, qk.to(grad_v.dtype).t())
        grad_inner, dwc_parts = ops.conv_backward(
            torch.ops.aten.silu_backward(grad_v, inactive), inner, dwc, None, False, True
        )
        grad_normed = input_gradient(grad_inner, in_proj)
        add_product(grad_normed, grad_gate, act_proj.to(grad_normed.dtype).t())
        grad_residual, norm_parts, normed = ops.norm_backward(
            grad_normed, residual, grad, scale, norm, norm_bias, ctx.eps
        )
        grad_x, cpe_parts = ops.conv_backward(grad_residual, x, cpe, None, True, False)

        grad_qk_gate, grad_lepe, grad_dwc, grad_norms, grad_cpe = sum_all(
            qk_gate_parts, lepe_parts, dwc_parts, norm_parts, cpe_parts
        )
        grad_norm, grad_norm_bias, grad_out_bias = grad_norms.split(len(norm))
        grad_qk_bias, grad_act_proj_bias = grad_qk_gate.split([len(qk), len(act_proj)])
        grad_dwc_weight, grad_dwc_bias, grad_in_proj_bias = split_taps(grad_dwc, dwc)
        return (
            *(grad_x, None, None, None, None, None),
            *(*split_taps(grad_cpe, cpe), grad_norm, grad_norm_bias),
            *(weight_gradient(grad_inner, normed, in_proj), grad_in_proj_bias),
            *(weight_gradient(grad_gate, normed, act_proj), grad_act_proj_bias, grad_dwc_weight, grad_dwc_bias),
            *(weight_gradient(grad_qk, v, qk), grad_qk_bias if ctx.has_qk_bias else None),
            *(*split_taps(grad_lepe, lepe), grad_out, grad_out_bias),
        )


class MlpBranch(torch.autograd.Function):
    """`MLLABlock.mix_channels`: x' + scale mlp(norm2(x')) with x' = x + cpe2(x)."""

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
            hidden = linear_again(ops.layer_norm(residual, norm, norm_bias, ctx.eps), widen, widen_bias)
        grad = grad.contiguous()
        grad_hidden, scaled_active, widen_bias_parts = ops.gelu_backward(input_gradient(grad, narrow), scale, hidden)
        grad_narrow = weight_gradient(grad, scaled_active, narrow)
        grad_residual, norm_parts, normed = ops.norm_backward(
            input_gradient(grad_hidden, widen), residual, grad, scale, norm, norm_bias, ctx.eps
        )
        grad_x, cpe_parts = ops.conv_backward(grad_residual, x, cpe, None, True, False)
        grad_widen_bias, grad_norms, grad_cpe = sum_all(widen_bias_parts, norm_parts, cpe_parts)
        grad_norm, grad_norm_bias, grad_narrow_bias = grad_norms.split(len(norm))
        return (
            *(grad_x, None, None, *split_taps(grad_cpe, cpe), grad_norm, grad_norm_bias),
            *(weight_gradient(grad_hidden, normed, widen), grad_widen_bias, grad_narrow, grad_narrow_bias),
        )


class WideConv(torch.autograd.Function):
    """The first two layers of `Downsample`: ReLU(conv(ReLU(x widen^T + bias))), the convolution of stride 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, widen: Tensor, widen_bias: Tensor, taps: Tensor, taps_bias: Tensor) -> Tensor:
        """Tokens x (B, H, W, C), weights (K, C), (K,), (K, 1, 3, 3) and (K,), to (B, H / 2, W / 2, K)."""
        out = ops.strided_conv(linear(x, widen, widen_bias), taps, taps_bias)
        ctx.save_for_backward(x, widen, widen_bias, taps, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, widen, widen_bias, taps, out = ctx.saved_tensors
        grad_wide, parts = ops.wide_conv_backward(grad, linear_again(x, widen, widen_bias), taps, out)
        grad_taps, grad_taps_bias, grad_widen_bias = split_taps(ops.sum_parts([parts]), taps)
        return (
            input_gradient(grad_wide, widen),
            weight_gradient(grad_wide, x, widen),
            grad_widen_bias,
            grad_taps,
            grad_taps_bias,
        )


def mixer(*args: Any) -> Tensor:
    """Call `Mixer`; torch.compile takes this and the next two functions as one operation each, see `autograd_calls`."""
    return Mixer.apply(*args)


def mlp_branch(*args: Any) -> Tensor:
    return MlpBranch.apply(*args)


def wide_conv(*args: Any) -> Tensor:
    return WideConv.apply(*args)


def sum_all(*buffers: Tensor) -> tuple[Tensor, ...]:
    """Sum buffers (parts, rows, C) over their parts, all in one launch, each to (rows C,)."""
    return ops.sum_parts(list(buffers)).split([buffer.shape[1] * buffer.shape[2] for buffer in buffers])


def split_taps(sums: Tensor, weight: Tensor) -> list[Tensor]:
    """Split (10 C,) into gradients of a depthwise weight (C, 1, 3, 3) and its bias; (11 C,): also of an input bias."""
    taps, *biases = sums.split([weight.numel()] + [len(weight)] * (len(sums) // len(weight) - 9))
    return [taps.view(weight.shape), *biases]
