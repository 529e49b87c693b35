"""Non-maximum suppression among the candidates of each pyramid level."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from models.kernels.dispatch import can_run

KERNEL_MODES = ("triton",)  # of MODEL.KERNELS; not "auto", before the kernel's tests have passed on a GPU


def suppress_in_levels(
    boxes: Tensor, scores: Tensor, counts: Sequence[int], threshold: float, *, kernels: str = "torch"
) -> Tensor:
    """Return which boxes survive suppression by better ones of the same image and level, (B, N) bool.

    Args:
        boxes: (B, N, 4) float32, level by level. Boxes of different levels do not overlap.
        scores: (B, N), in descending order within each level.
        counts: boxes of each level; the sum is N.
        threshold: a box is suppressed by better ones that survive and whose IoU with it is larger.
        kernels: MODEL.KERNELS. The Triton kernel does not wait for the GPU, as torchvision's function does.
    """
    if kernels in KERNEL_MODES and can_run(kernels, boxes):
        from downstream.detection.model.triton_nms import suppress_with_kernel  # imports Triton

        return suppress_with_kernel(boxes, counts, threshold)
    survives = torch.zeros_like(scores, dtype=torch.bool)
    for own, own_boxes, own_scores in zip(survives, boxes, scores, strict=True):
        own.index_fill_(0, nms(own_boxes, own_scores, threshold), True)
    return survives
