"""The training step, and evaluation of a classifier."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.distributed.process import (
    Process,
    average_buffers,
    min_over_processes,
    no_sync,
    trained_buffers,
    unwrap,
)
from utils.training.amp import Precision
from utils.training.ema import ModelEma
from utils.training.metrics import ClassificationMeter, Scores

Batch = tuple[Tensor, Tensor]
ComputeLosses = Callable[[Any, int], Mapping[str, Tensor]]
NEVER = 2**62  # a step that no run reaches
SMALLEST_SCALE = 1e-4  # of the loss for float16; about thirty steps in a row have overflowed


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became infinite or NaN; the weights are those from before that step."""


class StepResult(NamedTuple):
    """Scalars of one step on the device: loss of this process, gradient norm before clipping, terms of the loss."""

    loss: Tensor
    grad_norm: Tensor
    terms: dict[str, Tensor]


class TrainStep:
    """One optimizer step: forward, backward, clip, update, EMA. It never waits for the device.

    A step whose loss is not finite leaves the weights unchanged, and so do all later steps: the device itself carries
    the verdict to the fused optimizer. `check_finite` tells the host. A gradient that is not finite counts the same but
    with float16, where the scaler leaves that step out and goes on with a smaller scale.

    Args:
        model: the network, in DDP where there are several processes.
        optimizer: fused, so that it honours `found_inf`.
        precision: autocast and gradient scaler.
        compute_losses: (micro-batch, step) to the terms of the loss by name, scalars; their sum is minimized. It calls
            `model`, under autocast.
        clip_grad: largest global L2 norm of the gradient; 0 leaves it as it is.
        ema: follows the model; None without EMA.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        *,
        compute_losses: ComputeLosses,
        clip_grad: float = 0.0,
        ema: ModelEma | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.compute_losses = compute_losses
        self.max_norm = clip_grad or float("inf")
        self.ema = ema
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.buffers = trained_buffers(unwrap(model))
        device = self.parameters[0].device
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self.loss_poison = torch.ones((), dtype=torch.float32, device=device)  # NaN once halted, which the scaler sees
        self.first_bad_step = torch.full((), NEVER, dtype=torch.int64, device=device)
        self.step_number = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, micro_batches: Sequence[Any], *, step: int, learning_rate: float) -> StepResult:
        """Update once from the mean gradient of the micro-batches, each what `compute_losses` takes.

        `step` counts from the start of the run and is what `check_finite` reports.
        """
        self.set_learning_rates(learning_rate)
        self.step_number.fill_(step)
        return self.run(micro_batches, step)

    def set_learning_rates(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)  # layer-wise decay

    def run(self, micro_batches: Sequence[Any], step: int) -> StepResult:
        """The step's work on the device, once rates and step number are set."""
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for i, micro_batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            with nullcontext() if is_last else no_sync(self.model):
                with self.precision.autocast():
                    losses = self.compute_losses(micro_batch, step)
                terms = {name: loss / len(micro_batches) for name, loss in losses.items()}
                self.precision.scaler.scale(total_loss(terms) * self.loss_poison).backward()
            sums = {name: sums.get(name, 0) + term.detach() for name, term in terms.items()}
        loss = total_loss(sums)

        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm, foreach=True)
        self.update_found_inf(loss, grad_norm)
        scaler.step(self.optimizer)
        scaler.update()

        average_buffers(self.buffers)
        if self.ema is not None:
            self.ema.update()
        return StepResult(loss, grad_norm.detach(), sums)

    def update_found_inf(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Halt the optimizer, on the device, if this step is not finite; with float16 the scaler judges gradients.

        In place: a recorded step finds its state where it was.
        """
        verdict = loss if self.precision.scaler.is_enabled() else loss + grad_norm
        is_bad = ~torch.isfinite(verdict)
        earliest = torch.minimum(self.first_bad_step, self.step_number)
        self.first_bad_step.copy_(torch.where(is_bad, earliest, self.first_bad_step))
        self.found_inf.copy_(torch.maximum(self.found_inf, is_bad.to(self.found_inf.dtype)))
        if self.precision.scaler.is_enabled():
            self.loss_poison.masked_fill_(is_bad, float("nan"))
        else:
            self.optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]

    def check_finite(self, step: int) -> int | None:
        """The first step on any process that was not finite, or None. Waits for the device and for all processes.

        `step` is the present one: it is to blame where float16 has overflowed too often in a row to recover.
        """
        first = int(min_over_processes(self.first_bad_step.clone()))
        if first == NEVER and self.precision.scaler.get_scale() < SMALLEST_SCALE:
            return step
        return None if first == NEVER else first


def total_loss(terms: Mapping[str, Tensor]) -> Tensor:
    """The loss: the sum of its terms, a scalar."""
    first, *others = terms.values()
    for term in others:
        first = first + term
    return first


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Batch], process: Process, precision: Precision) -> Scores:
    """Top-1, top-5 and loss over the whole data set, exact for any number of processes."""
    was_training = model.training
    model.eval()
    meter = ClassificationMeter(process.device)
    for images, labels in loader:
        with precision.autocast():
            logits = model(images)
        meter.update(logits, labels)
    model.train(was_training)
    return meter.compute()
