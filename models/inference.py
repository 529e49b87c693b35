"""A copy of a model for fast inference: batch norms folded into convolutions, matrix weights cast once."""

from copy import deepcopy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.layers import ConvLayer, TokenConv


def prepare_for_inference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode that computes the same with fewer passes over memory; it cannot be trained.

    Args:
        model: an MLLA, or a network that holds one.
        dtype: of the weights of linear layers and convolutions; norms and the kernels' depthwise weights, which are
            small, stay as they are. Run it under autocast of this dtype; with float32 only batch norms are folded.
    """
    model = deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ConvLayer) and isinstance(module.norm, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, TokenConv):
            module.to(dtype)
    return model
