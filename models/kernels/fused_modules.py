"""The modules of MLLA whose forward pass Triton kernels compute, and `use_kernels`, which puts them into a model.

Each is a subclass that overrides `forward` only, so names in the state_dict, isinstance, deepcopy and pickle are those
of the eager module. A kernel reads the weights of a module's parts instead of calling them. Whether these are the
original parts, without hooks, is examined at the first call after fusing and whenever one of them has changed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from models.attention import LinearAttention
from models.kernels import dispatch
from models.kernels.dispatch import HEAD_DIMS, compute_dtype, unsupported_reason
from models.kernels.matmul import WIDEST_FUSED_MLP
from models.layers import ConvLayer, DepthwiseConv, Downsample, DropPath, Stem, TokenConv, pad_to_multiple
from models.mlla import MLLABlock

RGB, WIDEST_STEM = 3, 128  # channels of the images that the stem's kernel reads, and at most of its outputs
WIDEST_STEM_LAYER = 48  # channels of the layers after it, in inference; with 64 their kernel lacks registers
UNKNOWN_PARTS = "a part of the module was replaced or has hooks, and must be called"
DROPOUT = "the kernels do not support dropout in MLPs (MODEL.DROP_RATE)"


def ops() -> Any:
    """Return the kernels' operators; imported where they are used, since they need Triton."""
    from models.kernels import ops

    return ops


def autograd() -> Any:
    """Return the autograd functions of the kernels."""
    from models.kernels import autograd

    return autograd


class Parts(NamedTuple):
    """Parts of a module that a kernel reads or leaves out, and what they must be for it to compute the same.

    `reason` says why no kernel supports the module, whatever its parts are.
    """

    types: tuple[tuple[nn.Module, type[nn.Module]], ...]
    has_bias: tuple[tuple[nn.Module, bool], ...] = ()
    settings: tuple[tuple[nn.Module, str, object], ...] = ()
    reason: str = ""

    def are_original(self) -> bool:
        """Return whether no part was replaced, parametrized or hooked."""
        return (
            all(type(part) is kind and not has_hooks(part) for part, kind in self.types)
            and all((part.bias is not None) is has_bias for part, has_bias in self.has_bias)
            and all(getattr(part, name) == value for part, name, value in self.settings)
        )


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling the module does more than compute; kernels, which read weights, would leave that out."""
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks)


class Snapshot:
    """The verdict on a module's parts, and what it rests on: it holds until one of these has changed."""

    def __init__(self, owner: nn.Module, parts: Parts) -> None:
        self.reason = parts.reason or ("" if parts.are_original() else UNKNOWN_PARTS)
        self.modules = [part for part, _ in parts.types]
        self.types = [type(part) for part in self.modules]
        self.children_of = [module._modules for module in (owner, *self.modules) if module._modules]
        self.children = [list(children.values()) for children in self.children_of]
        self.parameters = [(part._parameters, "bias") for part, _ in parts.has_bias]
        self.lacks = [parameters.get(name) is None for parameters, name in self.parameters]
        self.settings = [(part.__dict__, name) for part, name, _ in parts.settings]
        self.values = [settings.get(name) for settings, name in self.settings]
        self.hooks = [
            hooks
            for part in self.modules
            for hooks in (
                part._forward_hooks,
                part._forward_pre_hooks,
                part._backward_hooks,
                part._backward_pre_hooks,
            )
        ]
        self.has_hooks = any(self.hooks)

    def is_current(self) -> bool:
        """Return whether nothing has changed; called in every forward pass, so it compares identities only."""
        return (
            any(self.hooks) is self.has_hooks
            and list(map(type, self.modules)) == self.types
            and [list(children.values()) for children in self.children_of] == self.children
            and [parameters.get(name) is None for parameters, name in self.parameters] == self.lacks
            and [settings.get(name) for settings, name in self.settings] == self.values
        )


class FusedModule(nn.Module):
    """Base of the modules that kernels compute; `kernels` is "auto" or "triton".

    Attributes:
        snapshots: of the parts that a function lists.
        reasons: why kernels do not support these parts, or "", as of the last `before_compiled_call`.
    """

    kernels: str
    snapshots: dict[Callable[[Any], Parts], Snapshot]
    reasons: dict[str, str]
    part_lists: tuple[Callable[[Any], Parts], ...]  # of the class

    def unsupported(self, find_parts: Callable[[Any], Parts]) -> str:
        """Return why kernels do not support the parts that `find_parts` lists, or ""; remembered until one changes."""
        if torch.compiler.is_compiling():
            if self.reasons:
                return self.reasons[find_parts.__name__]
            parts = find_parts(self)
            return parts.reason or ("" if parts.are_original() else UNKNOWN_PARTS)
        snapshot = self.snapshots.get(find_parts)
        if snapshot is None or not snapshot.is_current():
            snapshot = Snapshot(self, find_parts(self))
            self.snapshots = {**self.snapshots, find_parts: snapshot}  # a new one: replicas share the old dictionary
        return snapshot.reason

    def before_compiled_call(self) -> None:
        """Examine the parts outside of the compiled code, which depends on the result; to trace this takes long."""
        reasons = {find_parts.__name__: self.unsupported(find_parts) for find_parts in self.part_lists}
        if reasons != self.reasons:
            self.reasons = reasons

    def autograd_calls(self) -> tuple[Callable[..., Any], ...]:
        """List the calls of autograd functions that torch.compile need not look into."""
        if dispatch.missing_triton(next(self.parameters()).device.type):
            return ()
        return autograd().mixer, autograd().mlp_branch, autograd().wide_conv

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this module: its snapshots and, as nn.Module does, its compiled call."""
        return {**super().__getstate__(), "snapshots": {}, "reasons": {}}


def mixer_parts(block: MLLABlock) -> Parts:
    """List the parts of a block's first half, around attention."""
    attention = block.attn
    linears = block.in_proj, block.act_proj, block.out_proj
    convs = block.cpe1, block.dwc, attention.lepe
    return Parts(
        (
            *((linear, nn.Linear) for linear in (*linears, attention.qk)),
            *((conv, TokenConv) for conv in convs),
            (block.norm1, nn.LayerNorm),
            (attention, LinearAttention),
            (block.drop_path, DropPath),
        ),
        has_bias=tuple((part, True) for part in (*linears, *convs, block.norm1)),
        reason=unsupported_reason(attention.dim, attention.dim // attention.num_heads, block.norm1),
    )


def mlp_parts(block: MLLABlock) -> Parts:
    """List the parts of a block's second half."""
    mlp = block.mlp
    return Parts(
        (
            *((block.cpe2, TokenConv), (block.norm2, nn.LayerNorm), (block.drop_path, DropPath), (mlp, Mlp)),
            *((mlp.fc1, nn.Linear), (mlp.act, nn.GELU), (mlp.norm, nn.Identity), (mlp.fc2, nn.Linear)),
            *((mlp.drop1, nn.Dropout), (mlp.drop2, nn.Dropout)),
        ),
        has_bias=tuple((part, True) for part in (block.cpe2, block.norm2, mlp.fc1, mlp.fc2)),
        settings=((mlp.act, "approximate", "none"),),
        reason=unsupported_reason(block.attn.dim, HEAD_DIMS[0], block.norm2),
    )


class FusedMLLABlock(FusedModule, MLLABlock):
    """A block of which kernels compute both halves, or the one whose parts are original."""

    part_lists = mixer_parts, mlp_parts

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if not dispatch.can_run(self.kernels, x):
            return super().forward(x, rotary)
        dtype, attention = compute_dtype(x), self.attn
        head_dim = attention.dim // attention.num_heads
        if self.supports("mixer", x, dtype, self.unsupported(mixer_parts), head_dim):
            x = self.fused_mixer(x.to(dtype), rotary)
        else:
            x = self.mix_tokens(x, rotary)
        dropout = self.mlp.drop1
        drops_out = dropout.training and dropout.p > 0
        if self.supports("mlp_branch", x, dtype, DROPOUT if drops_out else self.unsupported(mlp_parts)):
            return self.fused_mlp(x.to(dtype))
        return self.mix_channels(x)

    def supports(self, kernel: str, x: Tensor, dtype: torch.dtype, reason: str = "", head_dim: int = 32) -> bool:
        """Return whether a kernel computes tokens x (B, H, W, C) in a dtype; `reason`: why not the block's parts."""
        return dispatch.supports(
            self.kernels, x, kernel, channels=self.attn.dim, head_dim=head_dim, dtype=dtype, reason=reason
        )

    def fused_mixer(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Compute `mix_tokens` in the dtype of x, which is autocast's where there is autocast."""
        norm, attention = cast("nn.LayerNorm", self.norm1), self.attn
        if torch.is_grad_enabled() or self.training:
            return autograd().mixer(
                *(x, *rotary, self.drop_path.draw(x), attention.num_heads, norm.eps),
                *(self.cpe1.weight, self.cpe1.bias, norm.weight, norm.bias),
                *(self.in_proj.weight, self.in_proj.bias, self.act_proj.weight, self.act_proj.bias),
                *(self.dwc.weight, self.dwc.bias, attention.qk.weight, attention.qk.bias),
                *(attention.lepe.weight, attention.lepe.bias, self.out_proj.weight, self.out_proj.bias),
            )
        x, y = conv_norm(x, self.cpe1, norm)
        gated = fused_attention(attention, conv_silu(self.in_proj(y), self.dwc), self.act_proj(y), rotary)
        return x + self.out_proj(gated)

    def fused_mlp(self, x: Tensor) -> Tensor:
        """Compute `mix_channels` in the dtype of x."""
        norm, fc1, fc2 = cast("nn.LayerNorm", self.norm2), cast("nn.Linear", self.mlp.fc1), self.mlp.fc2
        if torch.is_grad_enabled() or self.training:
            return autograd().mlp_branch(
                *(x, self.drop_path.draw(x), norm.eps, self.cpe2.weight, self.cpe2.bias, norm.weight, norm.bias),
                *(fc1.weight, fc1.bias, fc2.weight, fc2.bias),
            )
        x, y = conv_norm(x, self.cpe2, norm)
        if self.attn.dim <= WIDEST_FUSED_MLP and self.supports("mlp", x, x.dtype):
            return ops().mlp(y, fc1.weight, fc1.bias, fc2.weight, fc2.bias, x)
        return x + fc2(ops().gelu(fc1(y)))


def conv_norm(x: Tensor, conv: TokenConv, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return x + conv(x) and its norm, both (B, H, W, C)."""
    return ops().conv_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)


def conv_silu(x: Tensor, conv: TokenConv) -> Tensor:
    """Return SiLU(conv(x)), (B, H, W, C), without gradient."""
    return ops().conv_silu(x, conv.weight, conv.bias, False)[0]


def fused_attention(attention: LinearAttention, v: Tensor, gate: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Compute `LinearAttention.forward` without gradient; of q and k only their projection reaches memory."""
    lepe = attention.lepe
    inputs = attention.qk(v), v, gate, lepe.weight, lepe.bias, *rotary
    return ops().linear_attention_inference(*inputs, attention.num_heads)


def conv_settings(
    conv: nn.Conv2d, kernel_size: int, *, stride: int = 1, groups: int = 1
) -> tuple[tuple[nn.Module, str, object], ...]:
    """List what the kernels take for granted of a convolution; its padding keeps the size up to the stride."""
    values = {"kernel_size": kernel_size, "stride": stride, "padding": kernel_size // 2, "dilation": 1}
    pairs: dict[str, object] = {name: (value, value) for name, value in values.items()}
    return tuple((conv, name, value) for name, value in {**pairs, "groups": groups, "padding_mode": "zeros"}.items())


def stem_parts(stem: Stem) -> Parts:
    """List the parts of a stem that its kernel computes; norm and activation of the layer are called."""
    layer, conv = stem.conv1, stem.conv1.conv
    settings = (conv, "in_channels", RGB), *conv_settings(conv, kernel_size=3, stride=2)
    return Parts(((layer, ConvLayer), (conv, nn.Conv2d)), has_bias=((conv, False),), settings=settings)


class FusedStem(FusedModule, Stem):
    """A stem whose first convolution is a kernel, which reads images of any strides and dtype."""

    part_lists = (stem_parts,)

    def forward(self, images: Tensor) -> Tensor:
        x = pad_to_multiple(images, 4)
        layer, dtype = self.conv1, compute_dtype(x)
        width = layer.conv.out_channels
        if not (
            dispatch.can_run(self.kernels, x)
            and width <= WIDEST_STEM
            and not needs_gradient(images)
            and not self.unsupported(stem_parts)
            and dispatch.supports(self.kernels, x, "stem_conv", channels=width, dtype=dtype)
        ):
            return super().forward(images)
        x = layer.act(layer.norm(ops().stem_conv(x, layer.conv.weight, dtype)))  # (B, E / 2, H / 2, W / 2)
        x = x + self.conv2(x)
        return self.conv3(x).permute(0, 2, 3, 1)  # (B, H / 4, W / 4, E)


def needs_gradient(*tensors: Tensor) -> bool:
    """Return whether autograd will ask for a gradient of one of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def downsample_parts(downsample: Downsample) -> Parts:
    """List the parts of a downsampling that its kernel computes; the norm of the last layer is called."""
    widen, depthwise, narrow = layers_of(downsample)
    types: list[tuple[nn.Module, type[nn.Module]]] = [(downsample.conv, nn.Sequential)]
    for layer, conv in ((widen, nn.Conv2d), (depthwise, DepthwiseConv), (narrow, nn.Conv2d)):
        types += [(layer, ConvLayer), (layer.conv, conv)]
    for layer in (widen, depthwise):
        types += [(layer.norm, nn.Identity), (layer.act, nn.ReLU)]
    return Parts(
        (*types, (narrow.act, nn.Identity)),
        has_bias=tuple((layer.conv, True) for layer in (widen, depthwise, narrow)),
        settings=(
            *conv_settings(widen.conv, kernel_size=1),
            *conv_settings(depthwise.conv, kernel_size=3, stride=2, groups=widen.conv.out_channels),
            *conv_settings(narrow.conv, kernel_size=1),
        ),
    )


def layers_of(downsample: Downsample) -> tuple[ConvLayer, ConvLayer, ConvLayer]:
    widen, depthwise, narrow = (cast("ConvLayer", layer) for layer in downsample.conv)
    return widen, depthwise, narrow


class FusedDownsample(FusedModule, Downsample):
    """A downsampling whose wide tokens kernels compute."""

    part_lists = (downsample_parts,)

    def forward(self, tokens: Tensor) -> Tensor:
        dtype = compute_dtype(tokens)
        widen, depthwise, narrow = layers_of(self)
        width = widen.conv.out_channels
        if not (
            dispatch.can_run(self.kernels, tokens)
            and not self.unsupported(downsample_parts)
            and dispatch.supports(self.kernels, tokens, "wide_conv", channels=width, dtype=dtype)
        ):
            return super().forward(tokens)
        x = pad_to_multiple(tokens.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).to(dtype)  # (B, H, W, C), both even
        x = autograd().wide_conv(
            *(x, widen.conv.weight.flatten(1), widen.conv.bias, depthwise.conv.weight, depthwise.conv.bias)
        )  # (B, H / 2, W / 2, 8 C)
        x = F.linear(x, narrow.conv.weight.flatten(1), narrow.conv.bias)  # (B, H / 2, W / 2, 2 C)
        return narrow.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


FUSED_TYPES: dict[type[nn.Module], type[FusedModule]] = {
    MLLABlock: FusedMLLABlock,
    Stem: FusedStem,
    Downsample: FusedDownsample,
}
EAGER_TYPES = {fused: eager for eager, fused in FUSED_TYPES.items()}


def use_kernels(model: nn.Module, mode: str = "auto") -> nn.Module:
    """Let Triton kernels compute the blocks, stem and downsamplings inside a model, in place, and return it.

    Args:
        model: an MLLA, or a network that holds one.
        mode: "auto" uses kernels where they can run and have passed their self-test, "triton" raises
            KernelsUnavailableError in the forward pass where they cannot, and "torch" makes all modules eager again.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in dispatch.MODES:
        raise ValueError(f"kernels {mode!r}: known are {', '.join(dispatch.MODES)}")
    for module in model.modules():
        eager = EAGER_TYPES.get(type(module), type(module))  # type: ignore[arg-type]
        if eager in FUSED_TYPES:
            for name in ("kernels", "snapshots", "reasons"):
                vars(module).pop(name, None)
            module.__class__ = eager
            if mode != "torch":
                module.__class__ = FUSED_TYPES[eager]
                vars(module).update(kernels=mode, snapshots={}, reasons={})
    return model
