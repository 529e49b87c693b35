"""Scores of a segmentation from one confusion matrix: counts, exact for any number of processes and any split."""

from typing import NamedTuple

import torch
from torch import Tensor

from downstream.segmentation.model.losses import IGNORED
from utils.distributed.process import sum_over_processes


class SegmentationScores(NamedTuple):
    """In percent; of a class that is neither in the labels nor predicted nothing is known (NaN), and means leave it
    out.

    Attributes:
        mean_iou: mean over classes of `class_iou`.
        mean_accuracy: mean over classes of `class_accuracy`.
        pixel_accuracy: labeled pixels that are right.
        class_iou: intersection over union, one for each class.
        class_accuracy: pixels of a class that are right, one for each class.
        num_pixels: labeled ones.
    """

    mean_iou: float
    mean_accuracy: float
    pixel_accuracy: float
    class_iou: list[float]
    class_accuracy: list[float]
    num_pixels: int


class ConfusionMatrix:
    """Counts pixels by true (row) and predicted (column) class, on the device, without waiting for it."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add predicted and true classes of as many pixels, any integer types; pixels labeled IGNORED do not count."""
        counted = labels != IGNORED
        pairs = labels.long() * self.num_classes + predictions.long()
        pairs = torch.where(counted, pairs, self.num_classes**2).flatten()  # ignored ones to a cell of their own
        counts = torch.bincount(pairs, minlength=self.num_classes**2 + 1)[:-1]
        self.counts += counts.view(self.num_classes, self.num_classes)

    def compute(self) -> SegmentationScores:
        """Scores over all pixels of all processes, the same on each; called by all together.

        Raises:
            ValueError: no pixel was labeled.
        """
        counts = sum_over_processes(self.counts.clone()).cpu().double()
        if not counts.any():
            raise ValueError("no labeled pixel to evaluate: every mask holds only ignored pixels")
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
    """IoU and accuracy of each class, then the means, in columns."""
    width = max(12, *map(len, classes))
    lines = [f"{'class':<{width}}  {'IoU':>6}  {'acc.':>6}"]
    for name, iou, accuracy in zip(classes, scores.class_iou, scores.class_accuracy, strict=True):
        lines.append(f"{name:<{width}}  {iou:>6.2f}  {accuracy:>6.2f}".replace("nan", "  -"))
    lines.append(f"{'mean':<{width}}  {scores.mean_iou:>6.2f}  {scores.mean_accuracy:>6.2f}")
    lines.append(f"{'pixels right':<{width}}  {'':>6}  {scores.pixel_accuracy:>6.2f}")
    return "\n".join(lines)
