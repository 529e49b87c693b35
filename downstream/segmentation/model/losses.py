"""Pixel-wise cross-entropy of UperNet's two heads."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.segmentation.model.upernet import SegmentationLogits, resize

IGNORED = 255  # label of pixels that count nowhere


class SegmentationLoss(NamedTuple):
    """Scalars; total = decode + auxiliary, and the auxiliary head's weight is in its loss already."""

    total: Tensor
    decode: Tensor
    auxiliary: Tensor


def pixel_cross_entropy(logits: Tensor, labels: Tensor, *, average: str = "all") -> Tensor:
    """Mean cross-entropy of logits (B, classes, h, w), resized to the labels (B, H, W), in float32 or wider.

    Args:
        logits: of any size.
        labels: class indices (int64), IGNORED where a pixel has none.
        average: over which pixels the sum is divided: "all", ignored ones included, as the published segmentors were
            trained, so that a crop with few labeled pixels weighs less; or "labelled", without them.
    """
    logits = resize(logits, labels.shape[1:])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if average == "all":
        return total / labels.numel()
    return total / (labels != IGNORED).sum().clamp(min=1)


def segmentation_loss(
    logits: SegmentationLogits, labels: Tensor, *, auxiliary_weight: float = 0.4, average: str = "all"
) -> SegmentationLoss:
    """Both heads' losses for labels (B, H, W); see `pixel_cross_entropy`."""
    decode = pixel_cross_entropy(logits.decode, labels, average=average)
    auxiliary = torch.zeros_like(decode)
    if logits.auxiliary is not None:
        auxiliary = auxiliary_weight * pixel_cross_entropy(logits.auxiliary, labels, average=average)
    return SegmentationLoss(decode + auxiliary, decode, auxiliary)
