"""A copy of a model for fast inference: batch norms folded into convolutions, matrix products joined, weights cast."""

from copy import deepcopy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.kernels import dispatch
from models.kernels.dispatch import compute_dtype
from models.kernels.fused_modules import (
    WIDEST_STEM,
    WIDEST_STEM_LAYER,
    Parts,
    conv_settings,
    has_hooks,
    mixer_parts,
    mlp_parts,
    needs_gradient,
    ops,
    stem_parts,
)
from models.kernels.matmul import WIDEST_FUSED_MLP, add_linear, linear_gelu, takes_linear_gelu
from models.layers import ConvLayer, Stem, TokenConv, pad_to_multiple
from models.mlla import MLLABlock, Stage
from models.rope import position_tables

MANY_PIXELS = 2**19  # for the kernel of the stem's layers: 42 images of 224x224; fewer leave multiprocessors idle
# Tokens times the square of their channels up to which kernels of few launches are faster: two images of 224x224 in
# MLLA-T. One image in MLLA-B has more, and took 1.89 ms with them, 1.74 without.
FEW_PRODUCTS = 26_000_000
WIDEST_FEW, WIDEST_FEW_HEAD = 512, 32  # channels of such tokens, and of their heads
NUM_POSITIONS = 1024  # rows and columns of tokens together, for which a prepared stage keeps tables


def halves() -> Any:
    """Return the halves of a block in kernels; imported where they are used, since they need Triton."""
    from models.kernels import inference_halves

    return inference_halves


def prepare_for_inference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy in evaluation mode that computes the same with fewer passes over memory; it cannot be trained.

    Blocks and stems that have hooks, or in which parts were replaced, stay as they are.

    Args:
        model: an MLLA, or a network that holds one.
        dtype: of the weights of linear layers and convolutions; norms and the blocks' depthwise weights, which are
            small, stay as they are. Run it under autocast of this dtype; with float32 nothing is cast.
    """
    model = prepared(deepcopy(model).eval().requires_grad_(False))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, TokenConv):
            module.to(dtype)
    return model


def prepared(module: nn.Module) -> nn.Module:
    """Return the module with everything prepared inside of it, or an InferenceBlock or InferenceStem in its place."""
    if isinstance(module, MLLABlock):
        is_original = mixer_parts(module).are_original() and mlp_parts(module).are_original()
        return InferenceBlock(module) if is_original and not has_hooks(module) else module
    if isinstance(module, ConvLayer):
        fold_norm(module)
    if type(module) is Stage and len(module.blocks):
        module.__class__ = InferenceStage
        cast("InferenceStage", module).keep_tables()
    takes_kernel = isinstance(module, Stem) and InferenceStem.replaces(module)
    for name, child in module.named_children():
        setattr(module, name, prepared(child))
    return InferenceStem(cast("Stem", module)) if takes_kernel else module


def fold_norm(layer: ConvLayer) -> None:
    """Let the convolution take up the batch norm, unless one of them was replaced or has hooks."""
    conv, norm = layer.conv, layer.norm
    if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and not (has_hooks(conv) or has_hooks(norm)):
        layer.conv, layer.norm = fuse_conv_bn_eval(conv, norm), nn.Identity()


class InferenceStem(nn.Module):
    """A stem of folded layers, of which the first three are kernels with bias, ReLU and residual, the last a product.

    Images to tokens as `Stem`.
    """

    is_region = True  # torch.compile makes one graph of it

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        self.kernels = getattr(stem, "kernels", "torch")
        self.conv1, self.conv2, self.conv3 = stem.conv1, stem.conv2, stem.conv3
        self.fuses_conv2 = is_folded(stem.conv2[0], 3, nn.ReLU) and is_folded(stem.conv2[1], 3, nn.Identity)
        self.fuses_conv2 &= not has_hooks(stem.conv2)
        self.ends_in_product = is_folded(stem.conv3[1], 1, nn.Identity) and not has_hooks(stem.conv3)
        self.to(memory_format=torch.channels_last)
        self.eval()

    @staticmethod
    def replaces(stem: Stem) -> bool:
        """Return whether the first layer is the original one, so that the kernel computes it to its end."""
        layer = stem.conv1
        ends = type(layer.norm) is nn.BatchNorm2d and type(layer.act) is nn.ReLU
        return ends and stem_parts(stem).are_original() and not any(map(has_hooks, (stem, layer.norm, layer.act)))

    def forward(self, images: Tensor) -> Tensor:
        x = pad_to_multiple(images, 4)
        conv, dtype = self.conv1.conv, compute_dtype(x)
        width = conv.out_channels
        is_known = dispatch.can_run(self.kernels, x) and width <= WIDEST_STEM and not needs_gradient(images)
        if is_known and dispatch.supports(self.kernels, x, "stem_conv_relu", channels=width, dtype=dtype):
            x = ops().stem_conv_relu(x, conv.weight, conv.bias, dtype)  # (B, E / 2, H / 2, W / 2)
        else:
            x = self.conv1(x.contiguous(memory_format=torch.channels_last))  # (B, E / 2, H / 2, W / 2)
        if is_known and self.supports_layers(images, x):
            first, second = conv_of(self.conv2[0]), conv_of(self.conv2[1])
            x = ops().stem_layer(ops().stem_layer(x, first.weight, first.bias), second.weight, second.bias, x)
        else:
            x = x + self.conv2(x)
        if not self.ends_in_product:
            return self.conv3(x).permute(0, 2, 3, 1)  # (B, H / 4, W / 4, E)
        last = conv_of(self.conv3[1])
        return F.linear(self.conv3[0](x).permute(0, 2, 3, 1), last.weight.flatten(1), last.bias)

    def supports_layers(self, images: Tensor, x: Tensor) -> bool:
        """Return whether a kernel computes the layers of `conv2` for x (B, E / 2, H / 2, W / 2), made from images."""
        width = self.conv1.conv.out_channels
        is_unfit = width > WIDEST_STEM_LAYER or x.shape[0] * x.shape[2] * x.shape[3] < MANY_PIXELS
        if is_unfit or x.dtype == torch.float32 or x.dtype != conv_of(self.conv2[0]).weight.dtype:
            return False
        return self.fuses_conv2 and dispatch.supports(self.kernels, images, "stem_layer", channels=width, dtype=x.dtype)


def conv_of(layer: nn.Module) -> nn.Conv2d:
    return cast("ConvLayer", layer).conv


def is_folded(layer: nn.Module, kernel_size: int, activation: type[nn.Module]) -> bool:
    """Return whether a layer is no more than a convolution of stride 1 with bias, and this activation."""
    if type(layer) is not ConvLayer:
        return False
    conv = layer.conv
    types = (layer, ConvLayer), (conv, nn.Conv2d), (layer.norm, nn.Identity), (layer.act, activation)
    return Parts(types, has_bias=((conv, True),), settings=conv_settings(conv, kernel_size)).are_original()


class InferenceStage(Stage):
    """A stage that keeps the rotary tables of grids up to NUM_POSITIONS; to compute them takes eight launches."""

    cos: Tensor
    sin: Tensor

    def keep_tables(self) -> None:
        device = next(self.parameters()).device
        for name, table in zip(("cos", "sin"), position_tables(NUM_POSITIONS, 0, self.dim, device), strict=True):
            self.register_buffer(name, table, persistent=False)

    def rotary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count = x.shape[1] + x.shape[2]
        if count > NUM_POSITIONS or self.cos.dtype != torch.float32:  # the model may have been cast as a whole
            return super().rotary(x)
        return self.cos[:count], self.sin[:count]  # (H + W, C / 4) each


def are_few_tokens(num_tokens: int, channels: int, heads: int) -> bool:
    """Return whether a block of this width has kernels for so few tokens, in 16 bits."""
    return channels <= min(WIDEST_FEW, heads * WIDEST_FEW_HEAD) and num_tokens * channels**2 <= FEW_PRODUCTS


class InferenceBlock(nn.Module):
    """A block with one product for both projections of its input, and sums with the residual inside of products.

    cuBLAS adds either a bias or a tensor to a product, so a bias is added beforehand, where that tensor is written.
    """

    is_region = True  # torch.compile makes one graph of it
    out_bias: Tensor
    mlp_bias: Tensor | None

    def __init__(self, block: MLLABlock) -> None:
        super().__init__()
        self.kernels = getattr(block, "kernels", "torch")
        self.unsupported_mixer, self.unsupported_mlp = mixer_parts(block).reason, mlp_parts(block).reason
        self.cpe1, self.norm1 = block.cpe1, cast("nn.LayerNorm", block.norm1)
        self.in_proj = joined(block.in_proj, block.act_proj)
        self.dwc, self.attn, self.out_proj = block.dwc, block.attn, without_bias(block.out_proj)
        self.cpe2, self.norm2 = block.cpe2, cast("nn.LayerNorm", block.norm2)
        self.fc1, self.act, fc2 = cast("nn.Linear", block.mlp.fc1), block.mlp.act, cast("nn.Linear", block.mlp.fc2)
        self.adds_mlp = fc2.out_features > WIDEST_FUSED_MLP  # narrower MLPs are one kernel
        self.fc2 = without_bias(fc2) if self.adds_mlp else fc2
        # Buffers, so that they keep their dtype where those of the linear layers are cast.
        self.register_buffer("out_bias", block.out_proj.bias.detach(), persistent=False)
        self.register_buffer("mlp_bias", fc2.bias.detach() if self.adds_mlp else None, persistent=False)
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Map tokens x (B, H, W, C) to (B, H, W, C); `rotary` holds (cos, sin) of `position_tables`."""
        return self.mix_channels(self.mix_tokens(x, rotary))

    def supports_few(self, kernel: str, x: Tensor) -> bool:
        """Return whether the kernels for few tokens compute one half of x (B, H, W, C).

        In a run that has tested other kernels alone they stay unused: a test would hold up an evaluation.
        """
        attention, num_tokens = self.attn, x.shape[0] * x.shape[1] * x.shape[2]
        if compute_dtype(x) == torch.float32 or not are_few_tokens(num_tokens, attention.dim, attention.num_heads):
            return False
        return self.supports(kernel, x, only_tested=True)

    def supports(self, kernel: str, x: Tensor, *, only_tested: bool = False) -> bool:
        """Return whether the kernels of one half, named as its self-test, compute tokens x (B, H, W, C)."""
        is_mixer = kernel in ("inference_mixer", "few_tokens_mixer")
        return dispatch.can_run(self.kernels, x) and dispatch.supports(
            *(self.kernels, x, kernel),
            channels=self.attn.dim,
            head_dim=self.attn.dim // self.attn.num_heads if is_mixer else 32,
            dtype=compute_dtype(x),
            reason=self.unsupported_mixer if is_mixer else self.unsupported_mlp,
            only_tested=only_tested,
        )

    def mix_tokens(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Add the attention branch, (B, H, W, C) -> (B, H, W, C)."""
        norm, attention, in_proj, out = self.norm1, self.attn, self.in_proj, self.out_proj.weight
        few = self.supports_few("few_tokens_mixer", x)
        if few or self.supports("inference_mixer", x):
            lepe = attention.lepe
            return halves().mix_tokens(
                *(x.to(compute_dtype(x)), rotary, attention.num_heads, norm.eps),
                *(self.cpe1.weight, self.cpe1.bias, norm.weight, norm.bias, in_proj.weight, in_proj.bias),
                *(self.dwc.weight, self.dwc.bias, attention.qk.weight, attention.qk.bias),
                *(lepe.weight, lepe.bias, out, self.out_bias),
                few=few,
            )
        x, y = eager_conv_norm(x, self.cpe1, norm, self.out_bias)
        inner, gate = in_proj(y).chunk(2, dim=-1)
        return add_linear(x, attention(F.silu(self.dwc(inner)), gate, rotary), out)

    def mix_channels(self, x: Tensor) -> Tensor:
        """Add the MLP branch, (B, H, W, C) -> (B, H, W, C)."""
        norm, fc1, fc2 = self.norm2, self.fc1, self.fc2
        few = self.supports_few("few_tokens_mlp", x)
        if few or self.supports("inference_mlp", x):
            return halves().mix_channels(
                *(x.to(compute_dtype(x)), norm.eps, self.cpe2.weight, self.cpe2.bias, norm.weight, norm.bias),
                *(fc1.weight, fc1.bias, fc2.weight, self.mlp_bias if self.adds_mlp else fc2.bias),
                few=few,
            )
        x, y = eager_conv_norm(x, self.cpe2, norm, self.mlp_bias)
        if not self.adds_mlp:
            return x + fc2(self.act(fc1(y)))
        if takes_linear_gelu(x, fc1.weight):
            hidden = linear_gelu(y.to(x.dtype), fc1.weight, fc1.bias)  # autocast left y in float32
        else:
            hidden = self.act(fc1(y))
        return add_linear(x, hidden, fc2.weight)


def eager_conv_norm(x: Tensor, conv: TokenConv, norm: nn.Module, later_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x + conv(x) and its norm, both (B, H, W, C); `later_bias` is added to the first after taking the norm."""
    x = x + conv(x)
    return x if later_bias is None else x + later_bias.to(x.dtype), norm(x)


def joined(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """Return one linear layer that gives the outputs of both, one after the other."""
    both = nn.Linear(first.in_features, first.out_features + second.out_features, device=first.weight.device)
    both.weight.data = torch.cat([first.weight, second.weight])
    both.bias.data = torch.cat([first.bias, second.bias])
    return both.requires_grad_(False)


def without_bias(linear: nn.Linear) -> nn.Linear:
    """Return a linear layer of the same weight without bias."""
    bare = nn.Linear(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
    bare.weight.data = linear.weight
    return bare.requires_grad_(False)
