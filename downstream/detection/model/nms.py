"""Non-maximum suppression among the candidates of each pyramid level."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from downstream.detection.model.kernel_dispatch import kernel_works


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
    if kernel_works(kernels, boxes, check_suppressing):
        from downstream.detection.model.triton_nms import suppress_with_kernel  # imports Triton

        return suppress_with_kernel(boxes, counts, threshold)
    return suppress_with_torchvision(boxes, scores, threshold)


def waits_for_device(kernels: str, x: Tensor) -> bool:
    """Return whether suppression of boxes on the device of x waits for it."""
    return not kernel_works(kernels, x, check_suppressing)


def suppress_with_torchvision(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return which boxes (B, N, 4) survive suppression by better ones of the same image, (B, N) bool."""
    survives = torch.zeros_like(scores, dtype=torch.bool)
    for own, own_boxes, own_scores in zip(survives, boxes, scores, strict=True):
        own.index_fill_(0, nms(own_boxes, own_scores, threshold), True)
    return survives


def check_suppressing(device: torch.device) -> Tensor:
    """Return where the kernel's results differ from those of torchvision on the CPU."""
    from downstream.detection.model.triton_nms import suppress_with_kernel

    generator, counts = torch.Generator().manual_seed(0), (150, 40)
    centers = torch.randint(0, 60, (2, sum(counts), 2), generator=generator)
    sides = torch.randint(1, 40, (2, sum(counts), 2), generator=generator)
    boxes = torch.cat((centers - sides, centers + sides), dim=2).float() / 2
    boxes[:, counts[0] :] += 1000  # the second level's
    scores = torch.cat([torch.linspace(1, 0, count) for count in counts]).expand(2, -1)
    found = suppress_with_kernel(boxes.to(device), counts, 0.7).cpu()
    return found != suppress_with_torchvision(boxes, scores, 0.7)
