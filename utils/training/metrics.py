"""Accuracy and loss that are exact for any number of processes and any split: sums and counts, divided once."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.distributed.process import sum_over_processes


class Scores(NamedTuple):
    """acc1 and acc5 in percent; loss is the mean cross-entropy with the hard labels."""

    acc1: float
    acc5: float
    loss: float
    num_images: int


class ClassificationMeter:
    """Adds up correct predictions and losses of batches on the device, without waiting for it."""

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
        """Figures over all batches of all processes, the same on each."""
        correct1, correct5, loss, count = sum_over_processes(self.sums.clone()).tolist()
        return Scores(100 * correct1 / count, 100 * correct5 / count, loss / count, int(count))
