"""Segmentation metrics from one confusion matrix of counts: exact for any number of processes."""

from typing import NamedTuple

import torch
from torch import Tensor

from data.errors import DataError
from downstream.segmentation.model.losses import IGNORED
from utils.distributed.process import sum_over_processes


class SegmentationScores(NamedTuple):
    """Metrics in percent. A class that is neither labeled nor predicted is NaN, and means skip it.

    Attributes:
        mean_iou: mean of `class_iou` over classes.
        mean_accuracy: mean of `class_accuracy` over classes.
        pixel_accuracy: share of labeled pixels that are right.
        class_iou: intersection over union of each class.
        class_accuracy: share of each class's pixels that are right.
        num_pixels: number of labeled pixels.
    """

    mean_iou: float
    mean_accuracy: float
    pixel_accuracy: float
    class_iou: list[float]
    class_accuracy: list[float]
    num_pixels: int


class ConfusionMatrix:
    """Counts of pixels by true (row) and predicted (column) class, on the device, without host sync."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add predicted and true classes of equally many pixels, any integer types; IGNORED labels do not count."""
        counted = labels != IGNORED
        pairs = labels.long() * self.num_classes + predictions.long()
        pairs = torch.where(counted, pairs, self.num_classes**2).flatten()  # ignored pixels get a cell of their own
        counts = torch.bincount(pairs, minlength=self.num_classes**2 + 1)[:-1]
        self.counts += counts.view(self.num_classes, self.num_classes)

    def compute(self) -> SegmentationScores:
        """Return the scores over all pixels of all processes; every process must call it, and gets the same.

        Raises:
            DataError: no pixel is labeled.
        """
        counts = sum_over_processes(self.counts.clone()).cpu().double()
        if not counts.any():
            raise DataError("no labeled pixel to evaluate: every mask holds only ignored pixels")
        right, labeled, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        iou = 100 * right / (labeled + predicted - right)  # 0 / 0 is NaN
        accuracy = 100 * right / labeled
        return SegmentationScores(
            mean_iou=iou.nanmean().item(),
            mean_accuracy=accuracy.nanmean().item(),
            pixel_accuracy=(100 * right.sum() / counts.sum()).item(),
            class_iou=iou.tolist(),
            class_accuracy=accuracy.tolist(),
            num_pixels=int(counts.sum()),
        )


def scores_table(scores: SegmentationScores, classes: list[str]) -> str:
    """Return a text table: IoU and accuracy of each class, then the means."""
    width = max(12, *map(len, classes))
    lines = [f"{'class':<{width}}  {'IoU':>6}  {'acc.':>6}"]
    for name, iou, accuracy in zip(classes, scores.class_iou, scores.class_accuracy, strict=True):
        lines.append(f"{name:<{width}}  {iou:>6.2f}  {accuracy:>6.2f}".replace("nan", "  -"))
    lines.append(f"{'mean':<{width}}  {scores.mean_iou:>6.2f}  {scores.mean_accuracy:>6.2f}")
    lines.append(f"{'pixels right':<{width}}  {'':>6}  {scores.pixel_accuracy:>6.2f}")
    return "\n".join(lines)
