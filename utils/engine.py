"""The training step, an epoch of them, and evaluation."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from utils.amp import Precision
from utils.distributed import Process, average_buffers, min_over_processes, sum_over_processes, unwrap, without_sync
from utils.ema import ModelEma
from utils.logger import Progress
from utils.losses import training_loss
from utils.lr_schedule import Schedule
from utils.metrics import ClassificationMeter, Scores

Batch = tuple[Tensor, Tensor]
NEVER = 2**62  # a step that no run reaches
SMALLEST_SCALE = 1e-4  # of the loss for float16; about thirty steps in a row have overflowed


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became infinite or NaN; the weights are those from before that step."""


class Loader(Protocol):
    """Batches of (images (B, 3, H, W), labels (B,)) on the device."""

    def __iter__(self) -> Iterator[Batch]: ...

    def set_epoch(self, epoch: int) -> None: ...


class StepResult(NamedTuple):
    """Scalars of one step on the device: mean loss on this process, gradient norm before clipping."""

    loss: Tensor
    grad_norm: Tensor


class TrainStep:
    """One optimizer step: forward, backward, clip, update, EMA. It never waits for the device.

    A step whose loss is not finite leaves the weights unchanged, and so do all later steps: the device itself carries
    the verdict to the fused optimizer. `check_finite` tells the host. A gradient that is not finite counts the same but
    with float16, where the scaler leaves that step out and goes on with a smaller scale.

    Args:
        model: the network, in DDP where there are several processes.
        optimizer: fused, so that it honours `found_inf`.
        precision: autocast and gradient scaler.
        clip_grad: largest global L2 norm of the gradient; 0 leaves it as it is.
        ema: follows the model, and is MESA's teacher; None without EMA.
        mesa_ratio: weight of MESA's term in the steps that ask for it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        *,
        clip_grad: float = 0.0,
        ema: ModelEma | None = None,
        mesa_ratio: float = 0.0,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.max_norm = clip_grad or float("inf")
        self.ema = ema
        self.mesa_ratio = mesa_ratio
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.buffers = [buffer for buffer in unwrap(model).buffers() if buffer.is_floating_point()]
        device = self.parameters[0].device
        self.is_halted = torch.zeros((), dtype=torch.float32, device=device)
        self.alive = torch.ones((), dtype=torch.float32, device=device)  # NaN once halted, which the scaler sees
        self.first_bad_step = torch.full((), NEVER, dtype=torch.int64, device=device)

    def __call__(
        self, micro_batches: Sequence[Batch], *, step: int, learning_rate: float, use_mesa: bool = False
    ) -> StepResult:
        """Update once from the mean gradient of the micro-batches, each (images (B, 3, H, W), targets (B, classes)).

        `step` counts from the start of the run and is what `check_finite` reports.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros_like(self.is_halted)
        for i, (images, targets) in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            with nullcontext() if is_last else without_sync(self.model):
                micro_loss = self.forward(images, targets, use_mesa) / len(micro_batches)
                self.precision.scaler.scale(micro_loss * self.alive).backward()
            loss = loss + micro_loss.detach()

        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm, foreach=True)
        self.note_finiteness(loss, grad_norm, step)
        scaler.step(self.optimizer)
        scaler.update()

        average_buffers(self.buffers)
        if self.ema is not None:
            self.ema.update()
        return StepResult(loss, grad_norm.detach())

    def forward(self, images: Tensor, targets: Tensor, use_mesa: bool) -> Tensor:
        """The loss of one micro-batch, a scalar."""
        with self.precision.autocast():
            teacher_logits = None
            if use_mesa:
                assert self.ema is not None
                with torch.no_grad():
                    teacher_logits = self.ema.module(images)
            return training_loss(self.model(images), targets, teacher_logits, self.mesa_ratio)

    def note_finiteness(self, loss: Tensor, grad_norm: Tensor, step: int) -> None:
        """Halt the optimizer, on the device, if this step is not finite; with float16 the scaler judges gradients."""
        verdict = loss if self.precision.scaler.is_enabled() else loss + grad_norm
        is_bad = ~torch.isfinite(verdict)
        self.first_bad_step = torch.where(is_bad, self.first_bad_step.clamp(max=step), self.first_bad_step)
        self.is_halted = torch.maximum(self.is_halted, is_bad.to(self.is_halted.dtype))
        if self.precision.scaler.is_enabled():
            self.alive = self.alive.masked_fill(is_bad, float("nan"))
        else:
            self.optimizer.found_inf = self.is_halted  # type: ignore[attr-defined]

    def check_finite(self, step: int) -> int | None:
        """The first step on any process that was not finite, or None. Waits for the device and for all processes.

        `step` is the present one: it is to blame where float16 has overflowed too often in a row to recover.
        """
        first = int(min_over_processes(self.first_bad_step.clone()))
        if first == NEVER and self.precision.scaler.get_scale() < SMALLEST_SCALE:
            return step
        return None if first == NEVER else first


@dataclass(frozen=True)
class EpochSummary:
    """What an epoch of training amounts to; loss is the mean over steps and processes."""

    train_loss: float
    grad_norm: float
    lr: float
    images_per_second: float


def train_one_epoch(
    train_step: TrainStep,
    loader: Loader,
    *,
    epoch: int,
    steps: int,
    accumulation_steps: int,
    schedule: Schedule,
    make_targets: Callable[[Tensor, Tensor], Batch],
    use_mesa: bool,
    process: Process,
    progress: Progress,
    print_freq: int,
) -> EpochSummary:
    """Run the steps of one epoch. The host waits for the device only each print_freq steps, and at the end.

    Raises:
        NonFiniteLossError: on all processes, at the next report after the step it names.
    """
    train_step.model.train()
    loader.set_epoch(epoch)
    batches = iter(loader)
    sums = torch.zeros(3, dtype=torch.float64, device=process.device)  # losses, finite gradient norms, number of those
    num_images, start = 0, time.perf_counter()
    for index in range(steps):
        step = epoch * steps + index
        rate = schedule.rate_of_step(step)
        micro_batches = [make_targets(*next(batches)) for _ in range(accumulation_steps)]
        result = train_step(micro_batches, step=step, learning_rate=rate, use_mesa=use_mesa)
        is_finite = torch.isfinite(result.grad_norm)  # not where float16 overflowed and the scaler skipped the step
        sums += torch.stack((result.loss, torch.where(is_finite, result.grad_norm, 0), is_finite)).double()
        progress.advance()
        num_images += sum(len(images) for images, _ in micro_batches) * process.num_processes
        is_last = index == steps - 1
        if is_last or (index + 1) % print_freq == 0:
            bad_step = train_step.check_finite(step)
            if bad_step is not None:
                raise NonFiniteLossError(describe_bad_step(bad_step, steps, schedule))
            loss_sum, norm_sum, num_norms = sum_over_processes(sums.clone()).tolist()
            loss = loss_sum / (index + 1) / process.num_processes
            seconds = time.perf_counter() - start
            progress.report(
                index + 1,
                loss=loss,
                grad_norm=result.grad_norm.item(),
                lr=rate,
                rate=num_images / seconds,
                seconds=seconds,
            )
    return EpochSummary(loss, norm_sum / max(num_norms, 1), rate, num_images / seconds)


def describe_bad_step(step: int, steps_per_epoch: int, schedule: Schedule) -> str:
    return (
        f"the loss or gradient is not finite in epoch {step // steps_per_epoch + 1}, step {step % steps_per_epoch + 1} "
        f"(step {step + 1} of the run), learning rate {schedule.rate_of_step(step):.3e}; the run stops, its "
        f"checkpoints are from before. Lower TRAIN.BASE_LR or TRAIN.CLIP_GRAD, or try AMP_DTYPE bfloat16 or no AMP"
    )


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
