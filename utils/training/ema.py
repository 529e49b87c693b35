"""Exponential moving average (EMA) of a model's parameters and buffers."""

from collections.abc import Collection
from copy import deepcopy

import torch
from torch import nn

REACH = 1.0  # points of accuracy, in percent


class ModelEma:
    """Exponential moving average of a model: ema = decay * ema + (1 - decay) * model, after each step.

    With `warmup` step t, from 0, decays by min(decay, (1 + t) / (10 + t)), as `num_updates` does in TensorFlow's
    tf.train.ExponentialMovingAverage: the average is over about the last ninth of the steps so far, until `decay` is
    reached. `set_step` must then be called before each step, also of a captured CUDA graph: the graph reads `weight`.

    Floating-point buffers are averaged too; others (batch norm's counters) are copied. `module` is a copy of the model
    in evaluation mode, without gradients.

    Args:
        model: the model to average.
        decay: decay per step.
        warmup: let the decay rise with the steps.
        force_cpu: keep the EMA weights in CPU memory.
    """

    def __init__(self, model: nn.Module, decay: float, force_cpu: bool = False, *, warmup: bool = False) -> None:
        self.decay = decay
        self.warmup = warmup
        self.module = deepcopy(model).eval().requires_grad_(False)
        if force_cpu:
            self.module.to("cpu")
        # The tensors themselves, gathered once: training changes them in place.
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self.ema_tensors = [ema for ema, _ in pairs if ema.is_floating_point()]
        self.sources = [source for _, source in pairs if source.is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.scores: dict[str, float] = {}  # of "model" and "EMA" in the last evaluation
        # 1 - decay of the current step, a scalar on the device.
        self.weight = self.ema_tensors[0].new_full((), 1 - decay)

    @property
    def is_teacher(self) -> bool:
        """Whether the EMA can teach the model, as MESA has it; changes at evaluations only.

        In the official recipe it always does. With warm-up, which is for short runs, it must have been at most REACH
        points worse than the model in the last evaluation.
        """
        return not self.warmup or (bool(self.scores) and self.scores["EMA"] >= self.scores["model"] - REACH)

    def set_step(self, step: int) -> None:
        """Set the decay of a step of the run, counted from 0. Does not wait for the device."""
        if self.warmup:
            self.weight.fill_(max(1 - self.decay, 9 / (10 + step)))  # 1 - (1 + t) / (10 + t)

    @torch.no_grad()
    def update(self, *, done: Collection[int] = ()) -> None:
        """Update after one step of the model; `done` has the addresses of tensors that are averaged already."""
        pairs = list(zip(self.ema_tensors, self.sources, strict=True))
        if done:
            pairs = [pair for pair in pairs if pair[1].data_ptr() not in done]
        if pairs:
            averages, sources = (list(tensors) for tensors in zip(*pairs, strict=True))
            if averages[0].device != sources[0].device:
                sources = [source.to(averages[0].device) for source in sources]
            if self.warmup:
                differences = torch._foreach_sub(sources, averages)
                torch._foreach_mul_(differences, self.weight)
                torch._foreach_add_(averages, differences)
            else:
                torch._foreach_lerp_(averages, sources, 1 - self.decay)
        if self.counters:
            copies, originals = (list(tensors) for tensors in zip(*self.counters, strict=True))
            torch._foreach_copy_(copies, originals)

    def on(self, device: torch.device) -> nn.Module:
        """Return the EMA model on a device: `module`, or a copy of it if it is kept on the CPU."""
        return self.module if self.ema_tensors[0].device == device else deepcopy(self.module).to(device)
