"""The block of MLLA as its kernels compute it: in training, and in inference. What it is can be read in `MLLABlock`."""

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from models.attention import LinearAttention
from models.kernels import dispatch
from models.kernels.matmul import linear_gelu
from models.layers import AddedLinear, TokenConv, computed_dtype, has_hooks, ops, segments

if TYPE_CHECKING:
    from models.mlla import MLLABlock

WIDEST_FUSED_MLP = 128  # beyond, the matrix products are too large to keep a hidden layer in registers
UNKNOWN_MIXER = "a part of the block was replaced or has hooks, and must be called"
UNKNOWN_MLP = "they know no MLP with dropout (MODEL.DROP_RATE), with hooks, or with parts that were replaced"


def takes(block: "MLLABlock", x: Tensor, kernel: str) -> bool:
    """Whether the kernels take tokens x (B, H, W, C) through "mixer" or "mlp_branch", the block's halves, or "mlp"."""
    attention = block.attn
    needs: dict[str, dict[str, Any]] = {
        "mixer": {"norm": block.norm1, "head_width": attention.dim // attention.num_heads},
        "mlp_branch": {"norm": block.norm2},
        "mlp": {},
    }
    return dispatch.takes(block.kernels, x, kernel, channels=attention.dim, dtype=computed_dtype(x), **needs[kernel])


def drops_out(block: "MLLABlock") -> bool:
    """Whether there is dropout in the MLP, which the kernels do not know."""
    return block.mlp.drop1.training and block.mlp.drop1.p > 0


def are(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether modules are of just this type and without hooks: kernels read their weights and do not call them."""
    return all(type(module) is kind and not has_hooks(module) for module in modules)


def has_original_mixer(block: "MLLABlock") -> bool:
    """Whether the parts of the block's first half are those it was made of: none replaced, parametrized or hooked."""
    attention = block.attn
    linears = block.in_proj, block.act_proj, block.out_proj
    return (
        are(nn.Linear, *linears, attention.qk)
        and all(linear.bias is not None for linear in linears)
        and are(TokenConv, block.cpe1, block.dwc, attention.lepe)
        and are(nn.LayerNorm, block.norm1)
        and are(LinearAttention, attention)
    )


def has_original_mlp(block: "MLLABlock") -> bool:
    """The same of its second half."""
    mlp = block.mlp
    return (
        are(TokenConv, block.cpe2)
        and are(nn.LayerNorm, block.norm2)
        and are(Mlp, mlp)
        and are(nn.Linear, mlp.fc1, mlp.fc2)
        and are(nn.GELU, mlp.act)
        and mlp.act.approximate == "none"
        and are(nn.Dropout, mlp.drop1, mlp.drop2)
        and are(nn.Identity, mlp.norm)
    )


def can_train(block: "MLLABlock", x: Tensor) -> bool:
    """Whether `train` computes the block for tokens x (B, H, W, C), with a gradient."""
    if not (torch.is_grad_enabled() and takes(block, x, "mixer")):
        return False
    return has_original_mixer(block) or dispatch.fall_back(block.kernels, UNKNOWN_MIXER)


def train(block: "MLLABlock", x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The block for tokens x (B, H, W, C), in autocast's dtype where there is autocast."""
    x = x.to(computed_dtype(x))
    norm, attention = cast("nn.LayerNorm", block.norm1), block.attn
    x = segments().Mixer.apply(
        *(x, *rotary, block.drop_path.draw(x), attention.num_heads, norm.eps),
        *(block.cpe1.weight, block.cpe1.bias, norm.weight, norm.bias),
        *(block.in_proj.weight, block.in_proj.bias, block.act_proj.weight, block.act_proj.bias),
        *(block.dwc.weight, block.dwc.bias, attention.qk.weight, attention.qk.bias),
        *(attention.lepe.weight, attention.lepe.bias, block.out_proj.weight, block.out_proj.bias),
    )
    mlp, norm = block.mlp, cast("nn.LayerNorm", block.norm2)
    fc1, fc2 = cast("nn.Linear", mlp.fc1), cast("nn.Linear", mlp.fc2)
    is_known = has_original_mlp(block) and not drops_out(block)
    if not (takes(block, x, "mlp_branch") and (is_known or dispatch.fall_back(block.kernels, UNKNOWN_MLP))):
        return block.add_mlp(x)
    return segments().MlpBranch.apply(
        *(x, block.drop_path.draw(x), norm.eps, block.cpe2.weight, block.cpe2.bias, norm.weight, norm.bias),
        *(fc1.weight, fc1.bias, fc2.weight, fc2.bias),
    )


def is_prepared(block: "MLLABlock") -> bool:
    """Whether the block comes from `prepare_for_inference`: its in_proj holds both products of its input."""
    return isinstance(block.act_proj, nn.Identity)


def can_infer(block: "MLLABlock", x: Tensor) -> bool:
    """Whether `infer` computes the block for tokens x (B, H, W, C), without gradient."""
    if is_prepared(block):
        return True
    if torch.is_grad_enabled() or block.training or drops_out(block):
        return False
    if not (takes(block, x, "mixer") or takes(block, x, "mlp_branch")):
        return False
    is_known = has_original_mixer(block) and has_original_mlp(block)
    return is_known or dispatch.fall_back(block.kernels, UNKNOWN_MIXER)


@torch.no_grad()
def infer(block: "MLLABlock", x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The block without gradient for tokens x (B, H, W, C), by those kernels that take them, prepared or not."""
    mixes = takes(block, x, "mixer")
    x = x.to(computed_dtype(x)) if mixes else x
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
