"""The block of MLLA as its kernels compute it: in training, and in inference. What it is can be read in `MLLABlock`."""

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from models.kernels import choice
from models.kernels.products import linear_gelu
from models.layers import AddedLinear, TokenConv, computed_dtype

if TYPE_CHECKING:
    from models.mlla import MLLABlock

WIDEST_FUSED_MLP = 128  # beyond, the matrix products are too large to keep a hidden layer in registers


def ops() -> Any:
    """The kernels, which need Triton: imported where they are used."""
    from models.kernels import ops

    return ops


def takes(block: "MLLABlock", x: Tensor, half: str) -> bool:
    """Whether the kernels take tokens x (B, H, W, C) through "mixer" or "mlp_branch", a half of the block."""
    norm, attention = (block.norm1 if half == "mixer" else block.norm2), block.attn
    return choice.takes(
        *(block.kernels, x, half),
        channels=attention.dim,
        head_width=attention.dim // attention.num_heads,
        norm=norm,
        dtype=computed_dtype(x),
    )


def can_train(block: "MLLABlock", x: Tensor) -> bool:
    """Whether `train` computes the block for tokens x (B, H, W, C), with a gradient."""
    drops_out = block.mlp.training and block.mlp.drop1.p > 0
    return torch.is_grad_enabled() and not drops_out and takes(block, x, "mixer") and takes(block, x, "mlp_branch")


def train(block: "MLLABlock", x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The block for tokens x (B, H, W, C), in autocast's dtype where there is autocast."""
    from models.kernels import segments

    x = x.to(computed_dtype(x))
    norm, attention, mlp = cast("nn.LayerNorm", block.norm1), block.attn, block.mlp
    x = segments.Mixer.apply(
        *(x, *rotary, block.drop_path.draw(x), attention.num_heads, norm.eps),
        *(block.cpe1.weight, block.cpe1.bias, norm.weight, norm.bias),
        *(block.in_proj.weight, block.in_proj.bias, block.act_proj.weight, block.act_proj.bias),
        *(block.dwc.weight, block.dwc.bias, attention.qk.weight, attention.qk.bias),
        *(attention.lepe.weight, attention.lepe.bias, block.out_proj.weight, block.out_proj.bias),
    )
    norm = cast("nn.LayerNorm", block.norm2)
    return segments.MlpBranch.apply(
        *(x, block.drop_path.draw(x), norm.eps),
        *(block.cpe2.weight, block.cpe2.bias, norm.weight, norm.bias),
        *(mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias),
    )


def is_prepared(block: "MLLABlock") -> bool:
    """Whether the block comes from `prepare_for_inference`: its in_proj holds both products of its input."""
    return isinstance(block.act_proj, nn.Identity)


def can_infer(block: "MLLABlock", x: Tensor) -> bool:
    """Whether `infer` computes the block for tokens x (B, H, W, C), without gradient."""
    if torch.is_grad_enabled() or block.training:
        return False
    return is_prepared(block) or takes(block, x, "mixer") or takes(block, x, "mlp_branch")


def infer(block: "MLLABlock", x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The block without gradient for tokens x (B, H, W, C), by those kernels that take them, prepared or not."""
    mixes = takes(block, x, "mixer")
    x, y = conv_norm(x, block.cpe1, block.norm1, is_fused=mixes)
    if is_prepared(block):
        inner, gate = block.in_proj(y).chunk(2, dim=-1)
    else:
        inner, gate = block.in_proj(y), block.act_proj(y)
    v = ops().conv_silu(inner, block.dwc.weight, block.dwc.bias, False)[0] if mixes else F.silu(block.dwc(inner))
    gated = block.attn(v, gate, rotary)
    out_proj = block.out_proj
    x = out_proj(x, gated) if isinstance(out_proj, AddedLinear) else x + out_proj(gated)
    is_fused = takes(block, x, "mlp_branch")
    x, y = conv_norm(x, block.cpe2, block.norm2, is_fused=is_fused)
    if block.attn.dim <= WIDEST_FUSED_MLP and takes(block, x, "mlp"):
        mlp = block.mlp
        return ops().mlp(y.to(x.dtype), mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, x)
    return infer_mlp(x, y, block.mlp, is_fused=is_fused)


def conv_norm(x: Tensor, conv: TokenConv, norm: nn.Module, *, is_fused: bool) -> tuple[Tensor, Tensor]:
    """x + conv(x) and its norm, both (B, H, W, C)."""
    if is_fused:
        norm = cast("nn.LayerNorm", norm)
        return ops().conv_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, conv.later_bias)
    x = x + conv(x)
    return x if conv.later_bias is None else x + conv.later_bias.to(x.dtype), norm(x)


def infer_mlp(x: Tensor, y: Tensor, mlp: Mlp, *, is_fused: bool) -> Tensor:
    """x + mlp(y), (B, H, W, C)."""
    is_added = isinstance(mlp.fc2, AddedLinear)
    if is_added and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and mlp.fc1.weight.dtype == x.dtype:
        # In the plain path autocast has left y, a norm's result, in float32.
        hidden = linear_gelu(y.to(x.dtype), mlp.fc1.weight, mlp.fc1.bias)
    else:
        hidden = mlp.fc1(y)
        hidden = ops().gelu(hidden) if is_fused else mlp.act(hidden)
    return mlp.fc2(x, hidden) if is_added else x + mlp.fc2(hidden)
