"""The training step: forward, backward, gradient clipping, optimizer and EMA."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.distributed.gradient_exchange import GradientExchange
from utils.distributed.process import min_over_processes
from utils.training.amp import Precision
from utils.training.ema import ModelEma
from utils.training.fused_update import FusedUpdate

ComputeLosses = Callable[[Any, int], Mapping[str, Tensor]]
NEVER = 2**62  # larger than the step of any run
SMALLEST_SCALE = 1e-4  # of float16's loss scale; about thirty consecutive steps have overflowed


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became infinite or NaN; the weights are from before that step."""


class StepResult(NamedTuple):
    """Scalars of one step on the device: this process's loss, gradient norm before clipping, terms of the loss."""

    loss: Tensor
    grad_norm: Tensor
    terms: dict[str, Tensor]


class TrainStep:
    """One optimizer step: forward, backward, clip, update, EMA, without host synchronization.

    A step whose loss is not finite leaves the weights unchanged, and so do all later steps: `found_inf` stays on the
    device, where the fused optimizer reads it. `check_finite` reports it to the host. A gradient that is not finite
    has the same effect, except with float16, where the scaler skips that step and lowers its scale.

    Args:
        model: the network.
        optimizer: a fused optimizer, which honors `found_inf`.
        precision: autocast and gradient scaler.
        compute_losses: (micro-batch, step) to the terms of the loss by name, scalars, whose sum is minimized. Calls
            `model`, under autocast.
        clip_grad: largest global L2 norm of the gradient; 0: no clipping.
        ema: updated after each step; None without EMA.
        exchange: averages gradients and batch statistics over the processes; None for a single process.
        choose_update: called once, before the first step; returns what clips and updates weights and EMA in place of
            torch's functions, or None.
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
        exchange: GradientExchange | None = None,
        choose_update: Callable[[], FusedUpdate | None] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.compute_losses = compute_losses
        self.max_norm = clip_grad or float("inf")
        self.ema = ema
        self.exchange = exchange
        self.choose_update = choose_update
        self.fused_update: FusedUpdate | None = None
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = self.parameters[0].device
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        # NaN after a bad step, so that the scaler skips all later ones.
        self.loss_poison = torch.ones((), dtype=torch.float32, device=device)
        self.first_bad_step = torch.full((), NEVER, dtype=torch.int64, device=device)
        self.step_number = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, micro_batches: Sequence[Any], *, step: int, learning_rate: float) -> StepResult:
        """Update once with the mean gradient of the micro-batches, each an argument of `compute_losses`.

        `step` counts from the start of the run; `check_finite` reports it.
        """
        self.prepare(step, learning_rate)
        return self.run(micro_batches, step)

    def prepare(self, step: int, learning_rate: float) -> None:
        """Set what changes with the step: its number, learning rates and the EMA's decay. Does not wait."""
        if self.choose_update is not None:
            self.fused_update, self.choose_update = self.choose_update(), None
        self.step_number.fill_(step)
        if self.ema is not None:
            self.ema.set_step(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)  # layer-wise decay
        if self.fused_update is not None:
            self.fused_update.set_learning_rates()

    def run(self, micro_batches: Sequence[Any], step: int) -> StepResult:
        """Run the step's work on the device, after `prepare`."""
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for i, micro_batch in enumerate(micro_batches):
            with self.precision.autocast():
                losses = self.compute_losses(micro_batch, step)
            terms = {name: loss / len(micro_batches) for name, loss in losses.items()}
            objective = total_loss(terms) * self.loss_poison
            if self.exchange is not None:
                objective = objective / self.exchange.num_processes  # the exchange adds gradients
                if i == len(micro_batches) - 1:
                    self.exchange.start()
            self.precision.scaler.scale(objective).backward()
            sums = {name: sums.get(name, 0) + term.detach() for name, term in terms.items()}
        if self.exchange is not None:
            self.exchange.finish()
        loss = total_loss(sums)
        return StepResult(loss, self.update(loss), sums)

    def update(self, loss: Tensor) -> Tensor:
        """Clip the gradient, update weights and EMA; return the gradient's norm before clipping."""
        if self.fused_update is not None:
            grad_norm = self.fused_update.grad_norm()
            self.update_found_inf(loss, grad_norm)
            self.fused_update(grad_norm, self.found_inf, self.max_norm)
            return grad_norm
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm, foreach=True)
        self.update_found_inf(loss, grad_norm)
        scaler.step(self.optimizer)
        scaler.update()
        if self.ema is not None:
            self.ema.update()
        return grad_norm.detach()

    def update_found_inf(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Set `found_inf` on the device if this step is not finite; with float16 the scaler checks the gradients.

        In place, since a captured CUDA graph keeps the addresses of its tensors.
        """
        checked = loss if self.precision.scaler.is_enabled() else loss + grad_norm
        is_bad = ~torch.isfinite(checked)
        earliest = torch.minimum(self.first_bad_step, self.step_number)
        self.first_bad_step.copy_(torch.where(is_bad, earliest, self.first_bad_step))
        self.found_inf.copy_(torch.maximum(self.found_inf, is_bad.to(self.found_inf.dtype)))
        if self.precision.scaler.is_enabled():
            self.loss_poison.masked_fill_(is_bad, float("nan"))
        else:
            self.optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]

    def check_finite(self, step: int) -> int | None:
        """Return the first step on any process that was not finite, or None. Waits for the device and all processes.

        `step` is the current one: it is returned if float16 has overflowed too often in a row to recover.
        """
        first = int(min_over_processes(self.first_bad_step.clone()))
        if first == NEVER and self.precision.scaler.get_scale() < SMALLEST_SCALE:
            return step
        return None if first == NEVER else first


def total_loss(terms: Mapping[str, Tensor]) -> Tensor:
    """Return the loss, the sum of its terms."""
    first, *others = terms.values()
    for term in others:
        first = first + term
    return first
