"""The whole training step as one CUDA graph: forward, backward, clipping, update and EMA in one launch."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.speed.compile import RECORDING, Capture
from utils.speed.streams import on_side_stream
from utils.training.train_step import StepResult, TrainStep

NUM_WARMUP_STEPS = 3  # eager steps of the run, in which libraries choose algorithms and allocate workspaces


class GraphedTrainStep(TrainStep):
    """A TrainStep that is captured as a CUDA graph after a few steps and replayed from then on, with the same results.

    Learning rates and the step number are tensors on the device, filled before each replay. Random numbers continue
    from the generator's state, as without a graph. Another shape of micro-batches, or another variant of the loss (see
    `ClassificationLoss.variant`), is captured again; the previous graph is dropped.

    The tensors of a StepResult are overwritten by the next step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key: Hashable = None
        self.steps_of_key = 0
        self.capture: Capture | None = None
        self.inputs: list[Any] = []
        groups = self.optimizer.param_groups
        self.rates = [torch.zeros((), dtype=torch.float32, device=self.found_inf.device) for _ in groups]

    def __call__(self, micro_batches: Sequence[Any], *, step: int, learning_rate: float) -> StepResult:
        variant = self.compute_losses.variant(step)  # type: ignore[attr-defined]
        key = (variant, [[tuple(tensor.shape) for tensor in batch] for batch in micro_batches])
        if key != self.key:
            self.key, self.steps_of_key, self.capture = key, 0, None
        self.steps_of_key += 1
        if self.steps_of_key <= NUM_WARMUP_STEPS:
            with on_side_stream(self.found_inf.device, RECORDING):
                return super().__call__(micro_batches, step=step, learning_rate=learning_rate)
        self.set_learning_rates(learning_rate)
        if self.capture is None:
            self.record(micro_batches, step)
        for static, batch in zip(self.inputs, micro_batches, strict=True):
            for target, source in zip(static, batch, strict=True):
                target.copy_(source)
        self.step_number.fill_(step)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        assert self.capture is not None
        return self.capture()

    def record(self, micro_batches: Sequence[Sequence[Tensor]], step: int) -> None:
        """Capture the step. Nothing is executed, and the parameter groups are left unchanged."""
        self.inputs = [[tensor.clone(memory_format=torch.preserve_format) for tensor in b] for b in micro_batches]
        self.optimizer.zero_grad(set_to_none=True)
        groups = self.optimizer.param_groups
        settings = [dict(group) for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group.update({"lr": rate, "capturable": True} if "capturable" in group else {"lr": rate})
        try:
            self.capture = Capture(lambda: self.run(self.inputs, step), warmup_calls=0)
        finally:
            for group, previous in zip(groups, settings, strict=True):
                group.update(previous)


def graph_unsupported_reason(train_step: TrainStep, num_processes: int) -> str:
    """Return why a step cannot be one CUDA graph, or an empty string."""
    if train_step.found_inf.device.type != "cuda":
        return "there is no GPU"
    if num_processes > 1:
        return "several processes exchange gradients"
    if train_step.precision.scaler.is_enabled():
        return "the gradient scaler of float16 branches on the host; bfloat16 needs no scaler"
    if train_step.ema is not None and train_step.ema.ema_tensors[0].device != train_step.found_inf.device:
        return "the EMA is kept on the CPU"
    if any(getattr(module, "use_checkpoint", False) for module in train_step.model.modules()):
        return "activation checkpointing reads the generator's state; TRAIN.ACTIVATION_BUDGET saves memory instead"
    if not hasattr(train_step.compute_losses, "variant"):
        return "the loss has no fixed shapes"
    return ""
