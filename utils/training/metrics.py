"""Accuracy and loss of a classifier, exact for any number of processes: sums and counts, divided once."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.config.errors import UserError
from utils.distributed.process import Process, sum_over_processes
from utils.training.amp import Precision


class Scores(NamedTuple):
    """Top-1 and top-5 accuracy in percent; loss is the mean cross-entropy with the hard labels."""

    acc1: float
    acc5: float
    loss: float
    num_images: int


class NoImagesError(UserError):
    """No image of the validation set can be read."""


class ClassificationMeter:
    """Sums of correct predictions and losses over batches, kept on the device without synchronization."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # correct at 1, correct at 5, loss, images

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, classes), labels (B,)."""
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
        correct = best == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        count = torch.full_like(loss, len(labels))
        self.sums += torch.stack((correct[:, 0].sum(), correct.sum(), loss, count)).double()

    def compute(self) -> Scores:
        """Return the scores over all batches of all processes, the same on each process.

        Raises:
            NoImagesError: there was no image.
        """
        correct1, correct5, loss, count = sum_over_processes(self.sums.clone()).tolist()
        if not count:
            raise NoImagesError("no validation image could be used, see the log; mend the images, or DATA.DATA_PATH")
        return Scores(100 * correct1 / count, 100 * correct5 / count, loss / count, int(count))


@torch.no_grad()
def evaluate(
    models: Mapping[str, nn.Module],
    loader: Iterable[tuple[Tensor, Tensor]],
    process: Process,
    precision: Precision,
) -> dict[str, Scores]:
    """Return the scores of classifiers over the whole dataset, in one pass, exact for any number of processes.

    Args:
        models: in evaluation mode, by name.
        loader: images and labels on the device.
        process: this process.
        precision: of the forward passes.

    Raises:
        NoImagesError: there was no image.
    """
    meters = {name: ClassificationMeter(process.device) for name in models}
    for images, labels in loader:
        for name, meter in meters.items():
            with precision.autocast():
                logits = models[name](images)
            meter.update(logits, labels)
    return {name: meter.compute() for name, meter in meters.items()}
