"""A copy of a model for fast inference: batch norms folded into convolutions, matrix products joined, weights cast."""

from copy import deepcopy
from typing import cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.kernels.fused_modules import WIDEST_FUSED_MLP, has_original_mixer, has_original_mlp
from models.layers import AddedLinear, ConvLayer, TokenConv, has_hooks
from models.mlla import MLLABlock


def prepare_for_inference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode that computes the same with fewer passes over memory; it cannot be trained.

    What has hooks, and blocks in which parts were replaced, stay as they are.

    Args:
        model: an MLLA, or a network that holds one.
        dtype: of the weights of linear layers and convolutions; norms and the blocks' depthwise weights, which are
            small, stay as they are. Run it under autocast of this dtype; with float32 nothing is cast.
    """
    model = deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ConvLayer) and can_fold(module):
            module.conv = fuse_conv_bn_eval(module.conv, cast("nn.BatchNorm2d", module.norm))
            module.norm = nn.Identity()
        if isinstance(module, MLLABlock) and has_original_mixer(module) and has_original_mlp(module):
            join_products(module)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, TokenConv):
            module.to(dtype)
    return model


def can_fold(layer: ConvLayer) -> bool:
    """Whether the layer's norm can go into its convolution: nothing in between is watched or replaced."""
    conv, norm = layer.conv, layer.norm
    return type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and not (has_hooks(conv) or has_hooks(norm))


def join_products(block: MLLABlock) -> None:
    """One product for both projections of the block's input; sums with the residual inside of products.

    cuBLAS adds either a bias or a tensor to a product: the bias is added beforehand, where that tensor is written.
    """
    in_proj, act_proj = block.in_proj, block.act_proj
    both = nn.Linear(in_proj.in_features, in_proj.out_features + act_proj.out_features, device=in_proj.weight.device)
    both.weight.data = torch.cat([in_proj.weight, act_proj.weight])
    both.bias.data = torch.cat([in_proj.bias, act_proj.bias])
    block.in_proj, block.act_proj = both.requires_grad_(False), nn.Identity()  # type: ignore[assignment]
    block.out_proj = added_after(block.cpe1, block.out_proj)
    if block.out_proj.out_features > WIDEST_FUSED_MLP:
        block.mlp.fc2 = added_after(block.cpe2, cast("nn.Linear", block.mlp.fc2))


def added_after(conv: TokenConv, proj: nn.Linear) -> AddedLinear:
    added = AddedLinear(proj.in_features, proj.out_features, bias=False, device=proj.weight.device)
    added.weight.data = proj.weight
    conv.later_bias = proj.bias.detach()
    return added.requires_grad_(False)
