"""Pixel-wise cross-entropy of UperNet's two heads."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.segmentation.model.upernet import SegmentationLogits, resize

IGNORED = 255  # label of pixels without a class


class SegmentationLoss(NamedTuple):
    """Scalar losses: total = decode + auxiliary, which includes the auxiliary head's weight."""

    total: Tensor
    decode: Tensor
    auxiliary: Tensor


def pixel_cross_entropy(logits: Tensor, labels: Tensor, *, average: str = "all") -> Tensor:
    """Return the mean cross-entropy of logits (B, classes, h, w), resized to labels (B, H, W), in float32 or float64.

    Args:
        logits: any h and w.
        labels: class indices, int64, or IGNORED.
        average: divide by "all" pixels, ignored ones included, as for the published models: a crop with few labeled
            pixels weighs less; or by the "labelled" pixels alone.
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
    """Return both heads' losses for labels (B, H, W); see `pixel_cross_entropy`."""
    decode = pixel_cross_entropy(logits.decode, labels, average=average)
    auxiliary = torch.zeros_like(decode)
    if logits.auxiliary is not None:
        auxiliary = auxiliary_weight * pixel_cross_entropy(logits.auxiliary, labels, average=average)
    return SegmentationLoss(decode + auxiliary, decode, auxiliary)
