"""Parameters and multiply-accumulates of a model and its parts; an estimate of the FLOPs of its training."""

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TOKEN_PIXELS = 16 * 16  # see training_flops


class Part(NamedTuple):
    """Part of a model: its number of parameters, and its multiply-accumulates (half its FLOPs) per image."""

    name: str
    parameters: int
    macs: int


def profile(model: nn.Module, image_size: int | tuple[int, int], in_chans: int = 3) -> list[Part]:
    """Return the parts of a model (its children, and those of its lists), then "total".

    PyTorch's counter counts the MACs of convolutions and matrix multiplications. The model runs on the meta device, so
    any size costs the same.

    Args:
        model: not changed.
        image_size: side of the image, or (height, width).
        in_chans: channels of the image.
    """
    model = deepcopy(model).to("meta").eval()
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, in_chans, height, width, device="meta"))
    flops = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}

    parts = []
    for name, child in model.named_children():
        is_list = isinstance(child, nn.ModuleList)
        inner = [(f"{name}.{key}", module) for key, module in child.named_children()] if is_list else [(name, child)]
        for path, module in inner:
            macs = flops.get(f"{type(model).__name__}.{path}", 0) // 2
            parts.append(Part(path, sum(p.numel() for p in module.parameters()), macs))
    total = Part("total", sum(p.numel() for p in model.parameters()), flops["Global"] // 2)
    return [part for part in parts if part.parameters] + [total]


def profile_table(parts: Sequence[Part], paper: tuple[float, float] | None = None) -> str:
    """Format parts as a table; `paper` is the paper's total, in millions of parameters and in GMACs."""
    lines = [f"{'part':<14}{'parameters':>14}{'GMACs':>10}"]
    lines += [f"{part.name:<14}{part.parameters:>14,}{part.macs / 1e9:>10.3f}" for part in parts]
    if paper is not None:
        lines.append(f"{'paper':<14}{f'{paper[0]:g} M':>14}{paper[1]:>10.1f}")
    return "\n".join(lines)


def training_flops(num_parameters: int, image_size: tuple[int, int], num_images: int) -> float:
    """Estimate the FLOPs of training a vision network, as 6 per parameter and token.

    A network with stages of strides 4 to 32 does as much as if all of its layers had the tokens of stride 16: within
    20% for MLLA, Swin, ConvNeXt and ResNet-50. The factor is of Kaplan et al., "Scaling Laws for Neural Language
    Models": 2 in the forward and 4 in the backward pass.

    Args:
        num_parameters: of the network.
        image_size: height and width in pixels.
        num_images: how many it is trained on, repetitions included.
    """
    height, width = image_size
    return 6.0 * num_parameters * (height * width / TOKEN_PIXELS) * num_images
