"""Which ground truth an anchor or proposal stands for, and which of them the losses see."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

NEGATIVE, UNUSED = -1, -2  # in place of a ground truth's index


class Thresholds(NamedTuple):
    """IoU with the best ground truth: positive from `positive` on, negative below `negative`, in between unused.

    A ground truth whose best IoU is `low_quality` or more also gets every candidate that reaches that best.
    """

    positive: float
    negative: float
    low_quality: float


RPN_THRESHOLDS = Thresholds(0.7, 0.3, 0.3)
ROI_THRESHOLDS = Thresholds(0.5, 0.5, 0.5)


class Sample(NamedTuple):
    """K chosen candidates, positives first.

    Attributes:
        indices: (K,) of the candidates.
        gt_indices: (K,) of the ground truths that they stand for; 0 but for positives.
        is_positive: (K,) bool.
        is_used: (K,) bool; False where there were fewer candidates than places.
    """

    indices: Tensor
    gt_indices: Tensor
    is_positive: Tensor
    is_used: Tensor


def assign(candidates: Tensor, is_valid: Tensor, gt_boxes: Tensor, thresholds: Thresholds) -> Tensor:
    """The index of the ground truth that each candidate stands for, NEGATIVE or UNUSED.

    Args:
        candidates: (N, 4).
        is_valid: (N,) bool; the others are UNUSED.
        gt_boxes: (G, 4); G may be 0, then every valid candidate is negative.

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
    """Choose `count` candidates at random, up to count * positive_fraction positives and the rest negatives.

    The number of places is fixed, so that the host need not know how many there are.
    """
    places, most_positives = (min(int(number), len(matches)) for number in (count, count * positive_fraction))
    is_positive, is_negative = matches >= 0, matches == NEGATIVE
    chance = torch.rand(matches.shape, device=matches.device) / 2
    lowest = torch.where(is_positive, chance, 0).topk(most_positives).values[-1]
    is_positive = is_positive & (chance >= lowest)  # those beyond their share count as unused
    order = torch.where(is_positive, chance + 2, torch.where(is_negative, chance + 1, 0))
    indices = order.topk(places).indices
    is_used = is_positive | is_negative
    return Sample(indices, matches[indices].clamp(min=0), is_positive[indices], is_used[indices])
