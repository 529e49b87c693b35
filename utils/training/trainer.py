"""The run loop that all tasks share: steps, evaluation, figures and checkpoints, from any step on to the end."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoint.files import CheckpointWriter, Progress
from utils.distributed.process import Process, sum_over_processes
from utils.distributed.stop_signal import Cause, StopRequest
from utils.logs.logger import ProgressBar, logger
from utils.logs.plots import Panel
from utils.logs.recorder import RunRecorder, weight_samples
from utils.logs.wandb_logger import WandbLogger
from utils.speed.memory import peak_memory_mib
from utils.training.train_state import TrainState
from utils.training.train_step import NonFiniteLossError, StepResult, TrainStep

PICTURE_SECONDS = 300.0  # between pictures at least, which take a few seconds


@dataclass(frozen=True)
class TrainerConfig:
    """What a run does, apart from the task.

    Attributes:
        total_epochs: an epoch is the stretch between two evaluations.
        steps_per_epoch: optimizer steps.
        accumulation_steps: micro-batches a step.
        lr_at: learning rate by step of the run, from 0.
        metric: name of the figure whose highest value marks the best checkpoint.
        best_name: what that checkpoint is called: max_<best_name>.pth, max_ema_<best_name>.pth.
        panels: what curves.png shows.
        save_freq: epochs between checkpoints.
        save_steps: steps between checkpoints within epochs; 0: none.
        print_freq: steps between lines in the log.
        stop_on_save_error: whether the run ends where a checkpoint cannot be written.
        save_in_background: whether training goes on while one is written.
        picture_epochs: epochs between pictures of what the model predicts, beside the one at the end; 0: none.
    """

    total_epochs: int
    steps_per_epoch: int
    lr_at: Callable[[int], float]
    metric: str
    panels: Sequence[Panel]
    best_name: str = "acc"
    accumulation_steps: int = 1
    save_freq: int = 1
    save_steps: int = 0
    print_freq: int = 10
    stop_on_save_error: bool = False
    save_in_background: bool = True
    picture_epochs: int = 0


class EpochSums:
    """Sums over an epoch's steps, on the device: terms of the loss, and gradient norms where they were finite."""

    def __init__(self, device: torch.device, former: Mapping[str, float]) -> None:
        self.sums = {name: torch.tensor(v, dtype=torch.float64, device=device) for name, v in former.items()}

    def add(self, result: StepResult) -> None:
        is_finite = torch.isfinite(result.grad_norm)  # not where float16 overflowed and the scaler skipped the step
        items = {**result.terms, "loss": result.loss}
        items |= {"grad_norm": torch.where(is_finite, result.grad_norm, 0), "num_norms": is_finite}
        self.sums = {name: self.sums.get(name, 0) + value.double() for name, value in items.items()}

    def of_this_process(self) -> dict[str, float]:
        return {name: value.item() for name, value in self.sums.items()}

    def means(self, *, steps: int, num_processes: int) -> tuple[dict[str, float], float]:
        """Means over steps and processes, the same on each: the loss, then its terms where it has several; and that of
        the gradient norm.
        """
        totals = sum_over_processes(torch.stack(list(self.sums.values()))).tolist()
        sums = dict(zip(self.sums, totals, strict=True))
        grad_norm = sums.pop("grad_norm") / max(sums.pop("num_norms"), 1)
        loss = sums.pop("loss")
        terms = {"loss": loss, **(sums if len(sums) > 1 else {})}
        return {name: value / steps / num_processes for name, value in terms.items()}, grad_norm


class Trainer:
    """Trains from `state.progress` to the end of the plan, or until it is asked to stop.

    Args:
        plan: lengths and intervals.
        state: what the next step depends on; saved in checkpoints.
        train_step: called with a list of micro-batches.
        folder: the run's.
        batches: (epoch, first) to the epoch's micro-batches of this process from number `first` on, ready for
            `train_step`; what they hold depends on nothing but seed, epoch and number.
        evaluate: (model, "model" or "EMA") to figures by name, the same on all processes; logs them.
        facts: kept in checkpoints beside the state, such as the configuration's text and the names of classes.
        illustrate: draws what a model predicts into the folder, and names the file; called on the first process.
        tracker: where figures go besides; on the first process.
    """

    def __init__(
        self,
        plan: TrainerConfig,
        state: TrainState,
        train_step: TrainStep,
        *,
        folder: Path,
        batches: Callable[[int, int], Iterator[Any]],
        evaluate: Callable[[nn.Module, str], Mapping[str, float]],
        facts: Mapping[str, Any],
        illustrate: Callable[[nn.Module], Path] | None = None,
        tracker: WandbLogger | None = None,
    ) -> None:
        self.plan = plan
        self.state = state
        self.train_step = train_step
        self.process: Process = state.process
        self.batches = batches
        self.evaluate = evaluate
        self.facts = facts
        self.illustrate = illustrate
        self.tracker = tracker
        self.last_picture = time.monotonic()
        self.folder = folder
        self.writer = CheckpointWriter(folder, in_background=plan.save_in_background)
        self.recorder: RunRecorder | None = None
        self.stop = StopRequest()
        self.saved = state.progress  # nothing to save before the first step

    def run(self) -> bool:
        """Train to the end.

        Returns:
            Whether the run is complete; False where it was asked to stop, and the same command goes on.

        Raises:
            NonFiniteLossError: on all processes; the checkpoints are from before.
            OSError: on the first process, where the last checkpoint could not be saved.
        """
        state = self.state
        try:
            with self.stop:
                if self.process.is_main:
                    self.recorder = RunRecorder(self.folder, state.progress.epochs, self.plan.panels, self.tracker)
                while state.progress.epochs < self.plan.total_epochs and self.train_epoch():
                    self.finish_epoch()
        finally:
            self.writer.wait()
            if self.recorder is not None:
                self.recorder.close()
        if self.writer.has_failed:
            raise OSError(f"{self.folder}: the last checkpoint could not be saved, see the log")
        return state.progress.epochs >= self.plan.total_epochs

    def train_epoch(self) -> bool:
        """The steps that are left of an epoch; False where the run is to stop, after saving."""
        plan, state = self.plan, self.state
        epoch, first = state.progress
        self.sums = EpochSums(self.process.device, state.sums)
        self.data_seconds, self.start = 0.0, time.perf_counter()
        self.first = first
        self.train_step.model.train()
        batches = self.batches(epoch, first * plan.accumulation_steps)
        with ProgressBar(
            epoch, plan.total_epochs, plan.steps_per_epoch, done=first, is_main=self.process.is_main
        ) as bar:
            for index in range(first, plan.steps_per_epoch):
                if self.should_stop():
                    break
                step = epoch * plan.steps_per_epoch + index
                micro_batches = self.take(batches, plan.accumulation_steps)
                result = self.train_step(micro_batches, step=step, learning_rate=plan.lr_at(step))
                self.sums.add(result)
                state.progress = Progress(epoch, index + 1)
                bar.advance()
                is_last = index + 1 == plan.steps_per_epoch
                if is_last or (index + 1) % plan.print_freq == 0:
                    self.report(bar, step, result)
                if plan.save_steps and (step + 1) % plan.save_steps == 0 and not is_last:
                    self.save_within_epoch(step)
        if not self.should_stop():
            return True
        if self.stop.cause is not Cause.SAVING_FAILED and state.progress != self.saved:
            self.save_within_epoch(epoch * plan.steps_per_epoch + state.progress.steps - 1)
        logger.warning(
            "%s: stopped in epoch %d after step %d of %d; the same command goes on from there",
            *(self.stop.cause.text, epoch + 1, state.progress.steps, plan.steps_per_epoch),
        )
        return False

    def should_stop(self) -> bool:
        """Whether a process was asked to stop; called by all together."""
        if self.plan.stop_on_save_error and self.writer.has_failed:
            self.stop.ask(Cause.SAVING_FAILED)
        return self.stop.agreed() is not Cause.NONE

    def take(self, batches: Iterator[Any], count: int) -> list[Any]:
        start = time.perf_counter()
        taken = [next(batches) for _ in range(count)]
        self.data_seconds += time.perf_counter() - start
        return taken

    def report(self, bar: ProgressBar, step: int, result: StepResult) -> None:
        """Say how training goes; waits for the device.

        Raises:
            NonFiniteLossError: a step since the last report was not finite.
        """
        self.check_finite(step)
        done = self.state.progress.steps
        seconds = time.perf_counter() - self.start
        terms, _ = self.sums.means(steps=done, num_processes=self.process.num_processes)
        bar.report(
            done,
            terms=terms,
            grad_norm=result.grad_norm.item(),
            lr=self.plan.lr_at(step),
            rate=(done - self.first) * self.state.images_per_step / seconds,
            seconds=seconds,
        )

    def check_finite(self, step: int) -> None:
        bad_step = self.train_step.check_finite(step)
        if bad_step is None:
            return
        epoch, index = divmod(bad_step, self.plan.steps_per_epoch)
        raise NonFiniteLossError(
            f"the loss or gradient is not finite in epoch {epoch + 1}, step {index + 1} (step {bad_step + 1} of the "
            f"run), learning rate {self.plan.lr_at(bad_step):.3e}; the run stops, its checkpoints are from "
            f"before. Lower TRAIN.BASE_LR or TRAIN.CLIP_GRAD, or try AMP_DTYPE bfloat16 or no AMP"
        )

    def finish_epoch(self) -> None:
        """Evaluate model and average, write down figures, and save what is due."""
        plan, state, process = self.plan, self.state, self.process
        epoch = state.progress.epochs
        train_seconds, steps = time.perf_counter() - self.start, plan.steps_per_epoch - self.first
        terms, grad_norm = self.sums.means(steps=plan.steps_per_epoch, num_processes=process.num_processes)
        last_step = (epoch + 1) * plan.steps_per_epoch - 1
        metrics = {"epoch": epoch, "step": last_step + 1, "lr": plan.lr_at(last_step), "grad_norm": grad_norm}
        metrics |= {f"train_{name}": value for name, value in terms.items()}
        start = time.perf_counter()
        scores = self.evaluate(state.model, "model")
        metrics |= scores
        average: Mapping[str, float] = {}
        if state.ema is not None:
            average = self.evaluate(state.ema.on(process.device), "EMA")
            metrics |= {f"ema_{name}": value for name, value in average.items()}
        speed = {
            "epoch": epoch,
            "steps": steps,  # since the start, where the epoch was interrupted
            "train_seconds": train_seconds,
            "data_wait_seconds": self.data_seconds,
            "eval_seconds": time.perf_counter() - start,
            "images_per_second": steps * state.images_per_step / train_seconds,
            "memory_mib": peak_memory_mib(process.device),
        }
        state.progress, state.sums = Progress(epoch + 1), {}
        self.sums = EpochSums(process.device, {})
        if self.recorder is not None:
            self.recorder.add(metrics, speed)
        self.save(self.names_due(scores, average))
        if self.recorder is not None:
            self.add_details(epoch)
            self.recorder.draw_curves(is_last=epoch + 1 == plan.total_epochs)

    def add_details(self, epoch: int) -> None:
        """A picture and histograms, each few epochs and at the end; in between not where epochs are so short that
        drawing would take a share of them that matters.
        """
        assert self.recorder is not None
        plan, state = self.plan, self.state
        is_due = plan.picture_epochs and (epoch + 1) % plan.picture_epochs == 0
        is_rare = time.monotonic() - self.last_picture > PICTURE_SECONDS
        if epoch + 1 < plan.total_epochs and not (is_due and is_rare):
            return
        self.last_picture = time.monotonic()
        picture = None
        try:
            if self.illustrate is not None:
                picture = self.illustrate(state.ema.on(self.process.device) if state.ema else state.model.eval())
        except (OSError, RuntimeError, ValueError) as error:  # such as a GPU's memory: a picture is not worth a run
            logger.error("predictions could not be drawn (%s)", " ".join(str(error).split()))
        self.recorder.add_details(epoch, weight_samples(state.model), picture)

    def names_due(self, scores: Mapping[str, float], average: Mapping[str, float]) -> list[str]:
        """What to call the checkpoint of an epoch's end, if anything; notes the best figures."""
        plan, state = self.plan, self.state
        names = []
        if state.progress.epochs % plan.save_freq == 0 or state.progress.epochs == plan.total_epochs:
            names.append(state.progress.checkpoint_name)
        if scores[plan.metric] >= state.best:
            state.best = scores[plan.metric]
            names.append(f"max_{plan.best_name}.pth")
        if average and average[plan.metric] >= state.best_ema:
            state.best_ema = average[plan.metric]
            names.append(f"max_ema_{plan.best_name}.pth")
        return names

    def save_within_epoch(self, step: int) -> None:
        self.check_finite(step)
        self.save([self.state.progress.checkpoint_name])

    def save(self, names: Sequence[str]) -> None:
        """Write the state under the names, none for nothing; called by all processes together."""
        if not names:
            return
        state = self.state
        state.sums = self.sums.of_this_process()
        content = state.capture(**self.facts)
        if self.process.is_main:
            self.writer.write(state.progress, names, content)
        self.saved = state.progress
