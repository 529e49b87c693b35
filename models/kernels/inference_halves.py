"""The halves of an `InferenceBlock` in kernels, as functions of tokens and weights, which the self-test calls too.

Eager reference: `InferenceBlock` itself, and `MLLABlock` (models/mlla.py).
"""

import torch.nn.functional as F
from torch import Tensor

from models.kernels import ops
from models.kernels.matmul import WIDEST_FUSED_MLP, add_linear, linear_gelu, takes_linear_gelu


def mix_tokens(
    x: Tensor, rotary: tuple[Tensor, Tensor], heads: int, eps: float,
    cpe: Tensor, cpe_bias: Tensor, norm: Tensor, norm_bias: Tensor, in_proj: Tensor, in_proj_bias: Tensor,
    dwc: Tensor, dwc_bias: Tensor, qk: Tensor, qk_bias: Tensor | None,
    lepe: Tensor, lepe_bias: Tensor, out: Tensor, out_bias: Tensor, *, few: bool = False,
) -> Tensor:  # fmt: skip
    """Add the attention branch to tokens x (B, H, W, C); `in_proj` (2 C, C) gives the convolution's input and the gate.

    Matrices must have the dtype of x, or be cast by autocast. `few` chooses the kernels for `has_few_tokens`.
    """
    if few:
        weights = (cpe, cpe_bias, norm, norm_bias, in_proj, in_proj_bias, dwc, dwc_bias, qk, qk_bias)
        return ops.few_tokens_mixer(x, *rotary, heads, eps, *weights, lepe, lepe_bias, out, out_bias)
    x, y = ops.conv_norm(x, cpe, cpe_bias, norm, norm_bias, eps, out_bias)
    inner, gate = F.linear(y, in_proj, in_proj_bias).chunk(2, dim=-1)  # (B, H, W, C) each
    v, _ = ops.conv_silu(inner, dwc, dwc_bias, False)
    queries_keys = F.linear(v, qk, qk_bias)  # (B, H, W, 2 C)
    gated = ops.linear_attention_inference(queries_keys, v, gate, lepe, lepe_bias, *rotary, heads)
    return add_linear(x, gated, out)


def mix_channels(
    x: Tensor, eps: float, cpe: Tensor, cpe_bias: Tensor, norm: Tensor, norm_bias: Tensor,
    widen: Tensor, widen_bias: Tensor, narrow: Tensor, narrow_bias: Tensor, *, few: bool = False,
) -> Tensor:  # fmt: skip
    """Add the MLP branch to tokens x (B, H, W, C); matrices and `few` as in `mix_tokens`."""
    if few:
        return ops.few_tokens_mlp(x, eps, cpe, cpe_bias, norm, norm_bias, widen, widen_bias, narrow, narrow_bias)
    adds_mlp = narrow.shape[0] > WIDEST_FUSED_MLP
    x, y = ops.conv_norm(x, cpe, cpe_bias, norm, norm_bias, eps, narrow_bias if adds_mlp else None)
    if not adds_mlp:
        return ops.mlp(y, widen, widen_bias, narrow, narrow_bias, x)
    if takes_linear_gelu(x, widen):
        return add_linear(x, linear_gelu(y, widen, widen_bias), narrow)
    return add_linear(x, ops.gelu(F.linear(y, widen, widen_bias)), narrow)
