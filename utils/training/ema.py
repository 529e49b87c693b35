"""Exponential moving average (EMA) of a model's parameters and buffers."""

from collections.abc import Collection
from copy import deepcopy

import torch
from torch import nn


class ModelEma:
    """Exponential moving average of a model: ema = decay * ema + (1 - decay) * model, after each step.

    Floating-point buffers are averaged too; others (batch norm's counters) are copied. `module` is a copy of the model
    in evaluation mode, without gradients.

    Args:
        model: the model to average.
        decay: decay per step.
        force_cpu: keep the EMA weights in CPU memory.
    """

    def __init__(self, model: nn.Module, decay: float, force_cpu: bool = False) -> None:
        self.decay = decay
        self.module = deepcopy(model).eval().requires_grad_(False)
        if force_cpu:
            self.module.to("cpu")
        # The tensors themselves, gathered once: training changes them in place.
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self.ema_tensors = [ema for ema, _ in pairs if ema.is_floating_point()]
        self.sources = [source for _, source in pairs if source.is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]

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
            torch._foreach_lerp_(averages, sources, 1 - self.decay)
        if self.counters:
            copies, originals = (list(tensors) for tensors in zip(*self.counters, strict=True))
            torch._foreach_copy_(copies, originals)

    def on(self, device: torch.device) -> nn.Module:
        """Return the EMA model on a device: `module`, or a copy of it if it is kept on the CPU."""
        return self.module if self.ema_tensors[0].device == device else deepcopy(self.module).to(device)
