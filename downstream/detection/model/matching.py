"""Matching of anchors and proposals with ground truths, and sampling for the losses."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from downstream.detection.model.kernel_dispatch import kernel_works
from downstream.detection.model.structures import Objects, Target, join_targets

NEGATIVE, UNUSED = -1, -2  # instead of a ground truth's index


class Thresholds(NamedTuple):
    """Thresholds of a candidate's IoU with its best ground truth.

    Attributes:
        positive: least IoU of a positive candidate.
        negative: IoU below which a candidate is negative; candidates in between are unused.
        low_quality: a ground truth whose best IoU is at least this gets every candidate with that best IoU.
    """

    positive: float
    negative: float
    low_quality: float


RPN_THRESHOLDS = Thresholds(0.7, 0.3, 0.3)
ROI_THRESHOLDS = Thresholds(0.5, 0.5, 0.5)


class Sample(NamedTuple):
    """K sampled candidates of an image or of each, positives first.

    Attributes:
        indices: (..., K), index of each candidate.
        gt_indices: (..., K), index of the matched ground truth; 0 unless positive.
        is_positive: (..., K) bool.
        is_used: (..., K) bool; False for empty slots, if there are fewer candidates than slots.
    """

    indices: Tensor
    gt_indices: Tensor
    is_positive: Tensor
    is_used: Tensor


def assign(candidates: Tensor, is_valid: Tensor, gt_boxes: Tensor, thresholds: Thresholds) -> Tensor:
    """Return the index of each candidate's ground truth, NEGATIVE or UNUSED.

    Args:
        candidates: (N, 4).
        is_valid: (N,) bool; invalid candidates are UNUSED.
        gt_boxes: (G, 4); if G is 0, every valid candidate is negative.

    Returns:
        (N,) int64.
    """
    if not len(gt_boxes):
        return torch.where(is_valid, NEGATIVE, UNUSED)
    overlaps = box_iou(gt_boxes, candidates).masked_fill(~is_valid, -1.0)  # (G, N)
    best, matches = overlaps.max(dim=0)  # (N,)
    matches = matches.masked_fill(best < thresholds.positive, UNUSED)
    matches = matches.masked_fill((best < thresholds.negative) & is_valid, NEGATIVE)
    best_of_gt = overlaps.max(dim=1, keepdim=True).values  # (G, 1)
    is_low_quality = (overlaps == best_of_gt) & (best_of_gt >= thresholds.low_quality)
    numbers = torch.arange(len(gt_boxes), device=candidates.device)[:, None]
    last = torch.where(is_low_quality, numbers, -1).max(dim=0).values  # (N,); of several ground truths, the last
    return torch.where(last >= 0, last, matches)


def assign_images(
    candidates: Tensor, is_valid: Tensor, objects: Objects, thresholds: Thresholds, *, kernels: str = "torch"
) -> Tensor:
    """Return what `assign` returns for each image, (B, N) int64.

    Args:
        candidates: (N, 4) of all images, or (B, N, 4).
        is_valid: (B, N) bool.
        objects: the ground truths.
        thresholds: for the IoU.
        kernels: MODEL.KERNELS.
    """
    if kernel_works(kernels, is_valid, check_matching):
        from downstream.detection.model.triton_matching import match_with_kernels  # imports Triton

        return match_with_kernels(candidates, is_valid, objects.boxes, objects.starts, thresholds)
    own_boxes = objects.boxes.split([*objects.counts, 1])
    own = candidates.expand(*is_valid.shape, 4)
    return torch.stack([assign(*parts, thresholds) for parts in zip(own, is_valid, own_boxes, strict=False)])


def check_matching(device: torch.device) -> Tensor:
    """Return where the kernels' results differ from those of `assign` on the CPU."""
    generator = torch.Generator().manual_seed(0)
    corners, sides = (torch.randint(*span, (600, 2), generator=generator) for span in ((0, 40), (5, 25)))
    candidates = torch.cat((corners, corners + sides), dim=1).float()
    is_valid = torch.rand(3, 600, generator=generator) < 0.8
    objects = join_targets(
        [Target(candidates[i * i : 5 * i] + 2, corners[i * i : 5 * i, 0], corners) for i in range(3)]
    )
    expected = assign_images(candidates, is_valid, objects, RPN_THRESHOLDS)
    moved = objects._replace(boxes=objects.boxes.to(device), starts=objects.starts.to(device))
    return (
        assign_images(candidates.to(device), is_valid.to(device), moved, RPN_THRESHOLDS, kernels="triton").cpu()
        != expected
    )


def sample(matches: Tensor, count: int, positive_fraction: float) -> Sample:
    """Sample `count` candidates of each image at random: up to count * positive_fraction positives, the rest negatives.

    The number of slots is fixed, so that no host sync is needed to count them.

    Args:
        matches: (..., N), see `assign`.
        count: slots, K = min(count, N).
        positive_fraction: largest share of positives.
    """
    slots, max_positives = (min(int(number), matches.shape[-1]) for number in (count, count * positive_fraction))
    is_positive, is_negative = matches >= 0, matches == NEGATIVE
    chance = torch.rand(matches.shape, device=matches.device) / 2
    lowest = torch.where(is_positive, chance, 0).topk(max_positives).values[..., -1:]
    is_positive = is_positive & (chance >= lowest)  # surplus positives count as unused
    order = torch.where(is_positive, chance + 2, torch.where(is_negative, chance + 1, 0))
    indices = order.topk(slots).indices
    chosen = (x.gather(-1, indices) for x in (matches.clamp(min=0), is_positive, is_positive | is_negative))
    return Sample(indices, *chosen)
