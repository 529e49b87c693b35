"""Parameters and multiply-accumulates of the detector by part, counted as in published tables."""

from copy import deepcopy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from downstream.detection.model.mask_rcnn import MaskRCNN
from downstream.detection.model.roi_heads import BOX_GRID, MASK_GRID
from utils.speed.flops import Part

HEIGHT, WIDTH = 800, 1280
PROPOSALS, MASKS = 1000, 100  # inputs of the heads
# Millions of parameters and GMACs that the official repository prints.
PUBLISHED = {
    f"mask_rcnn_mlla_{size}_{schedule}": published
    for size, published in {"tiny": (44.0, 255.0), "small": (63.0, 319.0), "base": (115.0, 502.0)}.items()
    for schedule in ("1x", "3x")
}


def profile_detector(model: MaskRCNN) -> list[Part]:
    """Return the counts of backbone, neck, heads and total. Nothing is computed: the parts run on the meta device."""
    model = deepcopy(model).to("meta").eval()
    width = model.rpn_head.rpn_conv.in_channels
    counts: list[Part] = []

    def count(name: str, module: nn.Module, *inputs: object) -> object:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            output = module(*inputs)
        parameters = sum(p.numel() for p in module.parameters())
        counts.append(Part(name, parameters, counter.get_total_flops() // 2))
        return output

    maps = count("backbone", model.backbone, torch.empty(1, 3, HEIGHT, WIDTH, device="meta"))
    maps = count("neck", model.neck, maps)
    count("rpn_head", model.rpn_head, maps)
    regions = (torch.empty(n, width, g, g, device="meta") for n, g in ((PROPOSALS, BOX_GRID), (MASKS, MASK_GRID)))
    count("bbox_head", model.roi_head.bbox_head, next(regions))
    count("mask_head", model.roi_head.mask_head, next(regions))
    return [*counts, Part("total", sum(p.parameters for p in counts), sum(p.macs for p in counts))]
