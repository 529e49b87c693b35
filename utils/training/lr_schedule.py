"""Learning rates as pure functions of the step, so that resuming at any step needs no state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CLASSIFICATION_BATCH_SIZE = 512  # global batch size that the learning rates of classification are given for
LINEAR_END = 0.01  # share of the base rate at which the linear schedule ends


@dataclass(frozen=True)
class ClassificationSchedule:
    """Schedule of the classification recipe: linear warm-up, then cosine, linear or step decay.

    Attributes:
        name: "cosine", "linear" or "step".
        base_lr, warmup_lr, min_lr: rates after warm-up, at step 0, and at the end of cosine.
        warmup_steps: steps of warm-up.
        total_steps: steps of the whole schedule; in later ones, cosine and linear keep their last rate, step decays on.
        decay_steps, decay_rate: the step schedule multiplies by decay_rate every decay_steps.
    """

    name: str
    base_lr: float
    warmup_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int
    decay_steps: int = 1
    decay_rate: float = 1.0

    def rate_at(self, t: int) -> float:
        """Return the learning rate at time t.

        Cosine and step count t from 0, not from the end of warm-up (as timm's schedulers do without warmup_prefix);
        linear falls from the end of warm-up to 1% of the base rate.
        """
        if t < self.warmup_steps:
            return self.warmup_lr + (self.base_lr - self.warmup_lr) * t / self.warmup_steps
        if self.name == "step":
            return self.base_lr * self.decay_rate ** (t // self.decay_steps)
        if self.name == "linear":
            progress = min((t - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
            return self.base_lr * (1 - (1 - LINEAR_END) * progress)
        progress = min(t / self.total_steps, 1.0)
        return self.min_lr + (self.base_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2

    def lr_at(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, from 0: at t = step - 1, and at t = 0 for the first."""
        return self.rate_at(max(step - 1, 0))


@dataclass(frozen=True)
class DenseSchedule:
    """Schedule of the published detection and segmentation recipes: step decay at milestones, or linear decay to 0.

    During warm-up, the rate is multiplied by a factor that rises linearly from `warmup_factor` to 1.

    Attributes:
        name: "step" or "linear" ("poly" with power 1).
        base_lr: rate after warm-up.
        total_steps: steps of the run, where "linear" ends.
        warmup_steps, warmup_factor: length of the warm-up, and the factor of its first step.
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
        """Return the learning rate of optimizer step `step`, from 0."""
        if self.name == "linear":
            rate = self.base_lr * max(0.0, 1 - step / self.total_steps)
        else:
            rate = self.base_lr * self.decay_rate ** sum(step >= milestone for milestone in self.milestones)
        if step < self.warmup_steps:
            rate *= 1 - (1 - self.warmup_factor) * (1 - step / self.warmup_steps)
        return rate
