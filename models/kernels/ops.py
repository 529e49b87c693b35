"""The kernels as PyTorch operators, which torch.compile and fake tensors understand.

Only `stem_conv` has a gradient of its own; the others' are in `autograd.py`. The eager PyTorch references are in
models/mlla.py, models/layers.py and models/attention.py; models/kernels/problems.py puts them side by side.
"""

from typing import Any

import torch
from torch import Tensor

from models.kernels.triton import (
    attention,
    attention_backward,
    depthwise,
    depthwise_backward,
    downsample,
    elementwise,
    few_tokens,
    norm,
    stem,
    stem_layers,
    sums,
)
from models.kernels.triton import mlp as mlp_kernels


@torch.library.custom_op("mlla::conv_norm", mutates_args=())
def conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    later_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x + conv(x) and its LayerNorm; x (B, H, W, C), weight (C, 1, 3, 3).

    `later_bias`, for inference, is added to the first after taking the norm: it belongs to the product added next.
    """
    return depthwise.conv_norm_forward(x, weight, bias, norm_weight, norm_bias, eps, later_bias)


@torch.library.custom_op("mlla::norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return LayerNorm(x), x (B, H, W, C), in the dtype of x."""
    return norm.norm_forward(x, weight, bias, eps)


@torch.library.custom_op("mlla::norm_backward", mutates_args=())
def norm_backward(
    grad: Tensor, x: Tensor, residual_grad: Tensor, scale: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return residual_grad + the gradient through LayerNorm(x); parts of sums over tokens; LayerNorm(x).

    The parts are (parts, 3, C), for `sum_parts`: gradients of norm weight and bias, and scale residual_grad.
    """
    return norm.norm_backward(grad, x, residual_grad, scale, norm_weight, norm_bias, eps)


@torch.library.custom_op("mlla::conv_backward", mutates_args=())
def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, extra: Tensor | None, residual: bool, input_bias: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of conv(x) (+ x if residual) for x, plus extra, and parts for the taps, then the bias.

    The parts are (parts, 10, C), or with `input_bias` (parts, 11, C): also for a bias that was added to x.
    """
    return depthwise_backward.conv_backward(grad, x, weight, extra, residual=residual, input_bias=input_bias)


@torch.library.custom_op("mlla::conv_silu", mutates_args=())
def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Return SiLU(conv(x)), and conv(x) if keep (else empty), which the gradient needs."""
    return depthwise.conv_silu_forward(x, weight, bias, keep=keep)


@torch.library.custom_op("mlla::linear_attention", mutates_args=())
def linear_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (attention + lepe) SiLU(gate), attention + lepe, and the heads' matrices and means by parts."""
    return attention.attention_forward(qk.contiguous(), v.contiguous(), gate, weight, bias, cos, sin, heads)


@torch.library.custom_op("mlla::linear_attention_inference", mutates_args=())
def linear_attention_inference(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """Return (attention + lepe) SiLU(gate) alone, without gradient."""
    return attention.attention_inference(qk.contiguous(), v.contiguous(), gate, weight, bias, cos, sin, heads)


@torch.library.custom_op("mlla::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    grad: Tensor,
    scale: Tensor,
    qk: Tensor,
    v: Tensor,
    gate: Tensor,
    ungated: Tensor,
    cos: Tensor,
    sin: Tensor,
    matrix: Tensor,
    mean: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of qk, v without lepe's part, gate and attention + lepe; y; and sums over tokens.

    y is linear_attention's first result times a scale for each image, and `grad` its gradient. The sums (parts, 3, C)
    are gradients of biases that were added to qk and to gate.
    """
    qk, v, gate = qk.contiguous(), v.contiguous(), gate.contiguous()
    return attention_backward.attention_backward(
        grad.contiguous(), scale, qk, v, gate, ungated, cos, sin, matrix, mean, heads
    )


@torch.library.custom_op("mlla::gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    """Return GELU(x)."""
    return elementwise.gelu_forward(x.contiguous())


@torch.library.custom_op("mlla::gelu_backward", mutates_args=())
def gelu_backward(grad: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of x; y, which is GELU(x) times a scale for each image; and sums over tokens.

    x is (B, H, W, C), and `grad` the gradient of y. The sums (parts, 1, C) are of the gradient of x.
    """
    return elementwise.gelu_backward(grad.contiguous(), scale, x.contiguous())


@torch.library.custom_op("mlla::mlp", mutates_args=())
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor) -> Tensor:
    """Return residual + MLP(x); for inference, without gradient."""
    return mlp_kernels.mlp_forward(x, weight1.to(x.dtype), bias1, weight2.to(x.dtype), bias2, residual)


@torch.library.custom_op("mlla::few_tokens_mixer", mutates_args=())
def few_tokens_mixer(
    x: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
    cpe: Tensor, cpe_bias: Tensor, norm: Tensor, norm_bias: Tensor, in_proj: Tensor, in_proj_bias: Tensor,
    dwc: Tensor, dwc_bias: Tensor, qk: Tensor, qk_bias: Tensor | None,
    lepe: Tensor, lepe_bias: Tensor, out: Tensor, out_bias: Tensor,
) -> Tensor:  # fmt: skip
    """Add a block's attention branch to a few tokens x (B, H, W, C); for inference, without gradient."""
    in_proj, qk, out = in_proj.to(x.dtype), qk.to(x.dtype), out.to(x.dtype)
    weights = (cpe, cpe_bias, norm, norm_bias, in_proj, in_proj_bias, dwc, dwc_bias, qk, qk_bias)
    return few_tokens.mixer_forward(x, cos, sin, heads, eps, *weights, lepe, lepe_bias, out, out_bias)


@torch.library.custom_op("mlla::few_tokens_mlp", mutates_args=())
def few_tokens_mlp(
    x: Tensor, eps: float, cpe: Tensor, cpe_bias: Tensor, norm: Tensor, norm_bias: Tensor,
    widen: Tensor, widen_bias: Tensor, narrow: Tensor, narrow_bias: Tensor,
) -> Tensor:  # fmt: skip
    """Add a block's MLP branch to a few tokens x (B, H, W, C); for inference, without gradient."""
    widen, narrow = widen.to(x.dtype), narrow.to(x.dtype)
    return few_tokens.mlp_branch_forward(x, eps, cpe, cpe_bias, norm, norm_bias, widen, widen_bias, narrow, narrow_bias)


@torch.library.custom_op("mlla::strided_conv", mutates_args=())
def strided_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ReLU(conv(ReLU(x))) with stride 2, (B, H, W, C) -> (B, H / 2, W / 2, C)."""
    return downsample.strided_forward(x, weight, bias)


@torch.library.custom_op("mlla::wide_conv_backward", mutates_args=())
def wide_conv_backward(grad: Tensor, x: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients of out = strided_conv(x, weight, bias): for x; (parts, 11, C) for weight, bias, a bias in x."""
    return downsample.strided_backward(grad, x, weight, out)


# torch 2.6 finds no schema for list[Tensor].
@torch.library.custom_op("mlla::sum_parts", mutates_args=(), schema="(Tensor[] buffers) -> Tensor")
def sum_parts(buffers: list[Tensor]) -> Tensor:
    """Return up to five buffers (parts, rows, C) summed over their parts, flat and joined; taps as (C, taps)."""
    return sums.sum_parts(*buffers)


@torch.library.custom_op("mlla::stem_conv", mutates_args=())
def stem_conv(images: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the 3x3 convolution with stride 2, in dtype, (B, C, H / 2, W / 2); only the weight has a gradient."""
    return stem.stem_forward(images, weight, None, dtype)


@torch.library.custom_op("mlla::stem_conv_relu", mutates_args=())
def stem_conv_relu(images: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the same with bias and ReLU; for inference, without gradient."""
    return stem.stem_forward(images, weight, bias, dtype)


@torch.library.custom_op("mlla::stem_layer", mutates_args=())
def stem_layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return ReLU(conv(x) + bias), or with a residual, without ReLU, their sum; for inference.

    The convolution is 3x3 with stride 1; x (B, C, H, W) and the residual are best channels last, as the result is.
    """
    return stem_layers.stem_layer_forward(x, weight, bias, residual)


@torch.library.custom_op("mlla::stem_conv_backward", mutates_args=())
def stem_conv_backward(grad: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of stem_conv for its weight, float32 in the weight's memory format."""
    return stem.stem_backward(grad, images, weight)


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape or like.shape, dtype=dtype or like.dtype, device=like.device)


@conv_norm.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty(x), empty(x)


@layer_norm.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return empty(x)


@norm_backward.register_fake
def _(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty(x), norm.empty_sums(x), empty(x)


@conv_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, extra: Tensor | None, residual: bool, input_bias: bool
) -> tuple[Tensor, Tensor]:
    return empty(x), depthwise_backward.empty_sums(x, input_bias=input_bias)


@conv_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return empty(x), empty(x) if keep else empty(x, 0)


@linear_attention.register_fake
def _(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, height, width, channels = v.shape
    parts = attention.forward_parts(height * width, batch * heads, v.device)
    dim, parts = channels // heads, parts if parts <= attention.MAX_PARTS else 1
    return (
        empty(v),
        empty(v),
        empty(v, parts, batch * heads, dim, dim, dtype=torch.float32),
        empty(v, parts, batch * heads, dim, dtype=torch.float32),
    )


@linear_attention_inference.register_fake
def _(qk: Tensor, v: Tensor, *_: Any) -> Tensor:
    return empty(v)


@linear_attention_backward.register_fake
def _(
    grad: Tensor, scale: Tensor, qk: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads = args[-1]
    return empty(qk), empty(v), empty(v), empty(v), empty(v), attention_backward.empty_sums(v, heads)


@strided_conv.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return empty(x, x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3])


@wide_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty(x), downsample.empty_sums(x)


@gelu.register_fake
def _(x: Tensor) -> Tensor:
    return empty(x)


@gelu_backward.register_fake
def _(grad: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty(x), empty(x), elementwise.empty_gelu_sums(x)


@sum_parts.register_fake
def _(buffers: list[Tensor]) -> Tensor:
    return empty(buffers[0], sum(rows * channels for _, rows, channels in (buffer.shape for buffer in buffers)))


def empty_stem(images: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B, C, H / 2, W / 2), channels last: a permuted view after the operator would cost inductor copies."""
    batch, _, height, width = images.shape
    return empty(images, batch, height // 2, width // 2, weight.shape[0], dtype=dtype).permute(0, 3, 1, 2)


@stem_conv.register_fake
def _(images: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return empty_stem(images, weight, dtype)


@stem_conv_relu.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return empty_stem(images, weight, dtype)


@stem_layer.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@stem_conv_backward.register_fake
def _(grad: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32)


@mlp.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return empty(x)


@few_tokens_mixer.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return empty(x)


@few_tokens_mlp.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return empty(x)


def stem_conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, _ = inputs
    ctx.save_for_backward(images, weight)


def stem_conv_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    images, weight = ctx.saved_tensors
    return None, stem_conv_backward(grad, images, weight).to(weight.dtype), None


stem_conv.register_autograd(stem_conv_grad, setup_context=stem_conv_setup)
