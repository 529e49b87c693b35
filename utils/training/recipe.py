"""What the published detection and segmentation recipes have their own way of: weight decay and learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: decayed, and not. Not decayed is what has `norm` or `absolute_pos_embed` in its name; biases are."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if "norm" in name or "absolute_pos_embed" in name else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@dataclass(frozen=True)
class WarmupSchedule:
    """Learning rate by step: steps down at milestones, or falls linearly to 0; over the first steps, a factor that
    rises linearly from `warmup_factor` to 1.

    Attributes:
        name: "step" or "linear" ("poly" with power 1).
        base_lr: rate after warm-up.
        total_steps: steps of the run, where linear ends.
        warmup_steps, warmup_factor: length of the warm-up, and its first step's share of the rate.
        milestones, decay_rate: from each of these steps on, "step" multiplies by decay_rate.
    """

    name: str
    base_lr: float
    total_steps: int
    warmup_steps: int = 0
    warmup_factor: float = 1.0
    milestones: Sequence[int] = ()
    decay_rate: float = 0.1

    def lr_at(self, step: int) -> float:
        """The rate that optimizer step `step` (from 0) runs at."""
        if self.name == "linear":
            rate = self.base_lr * max(0.0, 1 - step / self.total_steps)
        else:
            rate = self.base_lr * self.decay_rate ** sum(step >= milestone for milestone in self.milestones)
        if step < self.warmup_steps:
            rate *= 1 - (1 - self.warmup_factor) * (1 - step / self.warmup_steps)
        return rate
