"""Exponential moving average of a model's parameters and buffers."""

from copy import deepcopy

import torch
from torch import nn


class ModelEma:
    """A copy of a model that follows it: average = decay * average + (1 - decay) * model, after each step.

    Floating-point buffers are averaged too; others (batch norm's counters) are copied. The copy is in evaluation mode
    and takes no gradient.

    Args:
        model: the model to follow, not wrapped in DDP.
        decay: per step.
        force_cpu: keep the average in the CPU's memory.
    """

    def __init__(self, model: nn.Module, decay: float, force_cpu: bool = False) -> None:
        self.decay = decay
        self.module = deepcopy(model).eval().requires_grad_(False)
        if force_cpu:
            self.module.to("cpu")
        # The tensors themselves, gathered once: training changes them in place.
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self.averages = [average for average, _ in pairs if average.is_floating_point()]
        self.sources = [source for _, source in pairs if source.is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model by one step."""
        sources = self.sources
        if self.averages[0].device != sources[0].device:
            sources = [source.to(self.averages[0].device) for source in sources]
        torch._foreach_lerp_(self.averages, sources, 1 - self.decay)
        for copy, original in self.counters:
            copy.copy_(original)

    def on(self, device: torch.device) -> nn.Module:
        """The average on a device: itself, or a copy where it is kept on the CPU."""
        return self.module if self.averages[0].device == device else deepcopy(self.module).to(device)
