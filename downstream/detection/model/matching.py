"""Matching of anchors and proposals with ground truths, and sampling for the losses."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

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
    """K sampled candidates, positives first.

    Attributes:
        indices: (K,), index of each candidate.
        gt_indices: (K,), index of the matched ground truth; 0 unless positive.
        is_positive: (K,) bool.
        is_used: (K,) bool; False for empty slots, if there are fewer candidates than slots.
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


def sample(matches: Tensor, count: int, positive_fraction: float) -> Sample:
    """Sample `count` candidates at random: up to count * positive_fraction positives, the rest negatives.

    The number of slots is fixed, so that no host sync is needed to count them.
    """
    slots, max_positives = (min(int(number), len(matches)) for number in (count, count * positive_fraction))
    is_positive, is_negative = matches >= 0, matches == NEGATIVE
    chance = torch.rand(matches.shape, device=matches.device) / 2
    lowest = torch.where(is_positive, chance, 0).topk(max_positives).values[-1]
    is_positive = is_positive & (chance >= lowest)  # surplus positives count as unused
    order = torch.where(is_positive, chance + 2, torch.where(is_negative, chance + 1, 0))
    indices = order.topk(slots).indices
    is_used = is_positive | is_negative
    return Sample(indices, matches[indices].clamp(min=0), is_positive[indices], is_used[indices])
