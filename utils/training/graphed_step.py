"""The whole training step as one CUDA graph: forward, backward, gradient exchange, update and EMA in one launch."""

import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from utils.distributed.process import gather_objects
from utils.logs.logger import logger
from utils.speed.compile import RECORDING, Capture
from utils.speed.streams import on_side_stream
from utils.training.train_step import StepResult, TrainStep, total_loss

NUM_WARMUP_STEPS = 3  # eager steps of the run, in which libraries choose algorithms and allocate workspaces


class GraphedTrainStep(TrainStep):
    """A TrainStep that is captured as a CUDA graph after a few steps and replayed from then on, with the same bits.

    Learning rates, the EMA's decay and the step number are tensors on the device, filled before each step. Random
    numbers continue from the generator's state, as without a graph. Another shape of micro-batches, or another variant
    of the loss (see `ClassificationLoss.variant`), is captured again; the previous graph is dropped.

    All processes capture in the same step. If one of them cannot, all continue without a graph, and the log says why.

    The tensors of a StepResult are overwritten by the next step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key: Hashable = None
        self.steps_of_key = 0
        self.is_recordable = True
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
        self.prepare(step, learning_rate)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self.capture is None and self.steps_of_key > NUM_WARMUP_STEPS and self.is_recordable:
            self.record(micro_batches, step)
        if self.capture is None:
            with self.rates_on_device(), on_side_stream(self.found_inf.device, RECORDING):
                return self.run(micro_batches, step)
        for static, batch in zip(self.inputs, micro_batches, strict=True):
            for target, source in zip(static, batch, strict=True):
                target.copy_(source)
        return self.capture()

    def compile_ahead(self, micro_batch: Any, step: int) -> None:
        """Let torch.compile compile what a step calls, by a forward and backward pass without consequences.

        Only the random number generators move on. `micro_batch` may have any values.
        """
        kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with on_side_stream(self.found_inf.device, RECORDING):
            with self.precision.autocast():
                losses = self.compute_losses(micro_batch, step)
            torch.autograd.grad(total_loss(losses), self.parameters, allow_unused=True)
            for buffer, value in kept:
                buffer.copy_(value)

    def record(self, micro_batches: Sequence[Sequence[Tensor]], step: int) -> None:
        """Capture the step on all processes; nothing is executed. If one process fails, none has a graph."""
        self.agree("")  # no process begins to capture before all have finished their earlier steps
        self.inputs = [[tensor.clone(memory_format=torch.preserve_format) for tensor in b] for b in micro_batches]
        self.optimizer.zero_grad(set_to_none=True)
        error = ""
        try:
            with self.rates_on_device():
                self.capture = Capture(lambda: self.run(self.inputs, step), warmup_calls=0)
        except RuntimeError as failure:  # also out of memory: the graph keeps what it allocates
            error = " ".join(str(failure).split())[:200] or type(failure).__name__
        if self.fused_update is not None:
            self.fused_update.send_addresses()  # of the captured gradients
        error = self.agree(error)
        if error:
            logger.warning("The step runs without a CUDA graph, which could not be captured: %s", error)
            self.capture, self.is_recordable, self.inputs = None, False, []
            self.optimizer.zero_grad(set_to_none=True)
            if self.precision.scaler.is_enabled():
                self.precision.scaler._per_optimizer_states.clear()  # of a step that may have ended in the middle
            torch.cuda.empty_cache()

    def agree(self, error: str) -> str:
        """Return the error of any process that takes part in the step, or an empty string; waits for all of them."""
        errors = [error] if self.exchange is None else gather_objects(error)
        return next(filter(None, errors), "")

    @contextmanager
    def rates_on_device(self) -> Iterator[None]:
        """Let the optimizer read learning rates from the device inside the context, with and without a graph.

        They are rounded to float32 there, so that a step has the same result in both.
        """
        groups = self.optimizer.param_groups
        settings = [dict(group) for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group.update({"lr": rate, "capturable": True} if "capturable" in group else {"lr": rate})
        try:
            yield
        finally:
            for group, previous in zip(groups, settings, strict=True):
                group.update(previous)


class SideStreamStep(TrainStep):
    """A TrainStep on the stream of captures, for losses of which a part is captured (see shape_graphs.py).

    A capture must not wait for another stream. It would, if autograd still held gradient accumulators of parameters
    that were created there: they live as long as any loss of an earlier micro-batch.
    """

    def run(self, micro_batches: Sequence[Any], step: int) -> StepResult:
        with on_side_stream(self.found_inf.device, RECORDING):
            return super().run(micro_batches, step)


def graph_unsupported_reason(train_step: TrainStep) -> str:
    """Return why a step cannot be one CUDA graph, or an empty string."""
    if reason := part_unsupported_reason(train_step):
        return reason
    if train_step.exchange is not None and "expandable_segments:True" in allocator_settings():
        return "NCCL cannot be captured with expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF"
    if train_step.ema is not None and train_step.ema.ema_tensors[0].device != train_step.found_inf.device:
        return "the EMA is kept on the CPU"
    if not hasattr(train_step.compute_losses, "variant"):
        return "the loss has no fixed shapes"
    return ""


def part_unsupported_reason(train_step: TrainStep) -> str:
    """Return why no part of a step's forward and backward pass can be a CUDA graph, or an empty string."""
    if train_step.found_inf.device.type != "cuda":
        return "there is no GPU"
    if any(getattr(module, "use_checkpoint", False) for module in train_step.model.modules()):
        return "activation checkpointing reads the generator's state; TRAIN.ACTIVATION_BUDGET saves memory instead"
    return ""


def allocator_settings() -> str:
    """Return the settings of PyTorch's GPU allocator from the environment, by their old and new name."""
    return " ".join(os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
