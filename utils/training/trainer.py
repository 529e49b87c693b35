"""The training loop that all tasks share: steps, evaluation, metrics and checkpoints."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoint.best_weights import is_new_best, score_in
from utils.checkpoint.files import CheckpointWriter, Progress, checkpoints_in
from utils.config.errors import UserError
from utils.config.standard_streams import flush_standard_streams
from utils.distributed.process import Process
from utils.distributed.stop_signal import INTERRUPTED, Cause, StopRequest
from utils.logs.logger import (
    DETAIL,
    EPOCH,
    ProgressBar,
    StepTimer,
    duration,
    errors_logged,
    information_as_details,
    logger,
)
from utils.logs.plots import Panel
from utils.logs.process_clock import StartClock, import_advice, process_seconds
from utils.logs.recorder import RunRecorder, weight_samples
from utils.logs.wandb_logger import WandbLogger
from utils.speed.data_wait import DataWait
from utils.speed.memory import peak_memory_mib
from utils.training.epoch_sums import EpochSums
from utils.training.train_state import TrainState
from utils.training.train_step import NonFiniteLossError, StepResult, TrainStep

WRITE_SECONDS = 5.0  # for a checkpoint that is being written when the process must end
MAX_WAIT = 0.05  # share of an epoch that the steps may wait for data without a warning
MIN_WAIT_SECONDS = 10.0  # of the run's remaining epochs together, below which there is no warning either
MIN_IMAGE_SECONDS = 300.0  # between two images of predictions, which take a few seconds to draw


@dataclass(frozen=True)
class TrainerConfig:
    """Lengths and intervals of a run.

    Attributes:
        total_epochs: epochs of the run; an epoch is the stretch between two evaluations.
        steps_per_epoch: optimizer steps per epoch.
        accumulation_steps: gradient accumulation steps, micro-batches per optimizer step.
        lr_at: learning rate by optimizer step, from 0.
        metric: name of the metric whose highest value marks the best checkpoint.
        metric_label: its name in log lines.
        best_name: names the best checkpoints: max_<best_name>.pth, max_ema_<best_name>.pth.
        best_label: names the metric in the line with its best value so far, which the official code logs; "": none.
        panels: plots in curves.png.
        save_freq: epochs between checkpoints; above 1 all of them are kept.
        save_steps: steps between checkpoints within epochs; 0: none.
        print_freq: steps between log lines.
        stop_on_save_error: end the run when a checkpoint cannot be written.
        save_in_background: continue training while a checkpoint is written.
        image_epochs: epochs between images of predictions, beside the one at the end; 0: none.
    """

    total_epochs: int
    steps_per_epoch: int
    lr_at: Callable[[int], float]
    metric: str
    panels: Sequence[Panel]
    metric_label: str = "score"
    best_name: str = "acc"
    best_label: str = ""
    accumulation_steps: int = 1
    save_freq: int = 1
    save_steps: int = 0
    print_freq: int = 10
    stop_on_save_error: bool = False
    save_in_background: bool = True
    image_epochs: int = 0


class SaveError(UserError):
    """The last checkpoint of a run could not be saved."""


class Trainer:
    """Trains from `state.progress` to the last epoch, or until the run is asked to stop.

    Args:
        config: lengths and intervals.
        state: everything that the next step depends on; saved in checkpoints.
        train_step: called with a list of micro-batches.
        folder: the run's output folder.
        batches: (epoch, first) to an iterator over the epoch's micro-batches of this process from number `first` on,
            ready for `train_step`; their content depends on seed, epoch and number only.
        evaluate: from models, "model" and "EMA", to their metrics, the same on all processes; logs them.
        metadata: saved in checkpoints beside the state, such as the configuration's text and the class names.
        draw_predictions: (model, description of its weights) to the file of its predictions, which it draws; called on
            the first process.
        expect_epoch: called with the number of the next epoch when the evaluation before it begins.
        loading_advice: returns how batches may be loaded faster, for a warning.
        tracker: an experiment tracker that also gets the metrics; on the first process.
        check_folder: called before anything is written to the folder; raises if another run may write there.
        start: counts the seconds until the first step, for a line of the log; None: no such line.
    """

    def __init__(
        self,
        config: TrainerConfig,
        state: TrainState,
        train_step: TrainStep,
        *,
        folder: Path,
        batches: Callable[[int, int], Iterator[Any]],
        evaluate: Callable[[Mapping[str, nn.Module]], Mapping[str, Mapping[str, float]]],
        metadata: Mapping[str, Any],
        draw_predictions: Callable[[nn.Module, str], Path] | None = None,
        expect_epoch: Callable[[int], object] = lambda epoch: None,  # noqa: ARG005
        loading_advice: Callable[[], str] | None = None,
        tracker: WandbLogger | None = None,
        check_folder: Callable[[], object] = lambda: None,
        start: StartClock | None = None,
    ) -> None:
        self.config = config
        self.state = state
        self.train_step = train_step
        self.process: Process = state.process
        self.batches = batches
        self.evaluate = evaluate
        self.metadata = metadata
        self.draw_predictions = draw_predictions
        self.expect_epoch = expect_epoch
        self.loading_advice = loading_advice
        self.tracker = tracker
        self.check_folder = check_folder
        self.start_clock = start
        self.last_image_time = time.monotonic()
        self.folder = folder
        self.writer = CheckpointWriter(folder, in_background=config.save_in_background, keep_all=config.save_freq > 1)
        self.recorder: RunRecorder | None = None
        self.is_on_cpu = self.process.device.type == "cpu"
        self.timer = StepTimer(num_untimed=1) if self.is_on_cpu else StepTimer()
        self.bar_text, self.evaluation_seconds = "", 0.0  # of the last epoch
        self.stop = StopRequest(on_timeout=self.end_at_once, on_interrupt=self.interrupt)
        self.saved = state.progress  # nothing to save before the first step
        self.first_step = self.steps_done(state.progress)

    def run(self) -> bool:
        """Train to the last epoch.

        Returns:
            Whether the run is complete; False when it was asked to stop, and the same command resumes it.

        Raises:
            NonFiniteLossError: on all processes; the checkpoints are from before the step.
            SaveError: on the first process, when the last checkpoint could not be saved.
            OutputError: on the first process, when another run may write to the folder.
        """
        state = self.state
        try:
            with self.stop:
                if self.process.is_main:
                    self.recorder = RunRecorder(self.folder, state.progress.epochs, self.config.panels, self.tracker)
                while state.progress.epochs < self.config.total_epochs and self.train_epoch():
                    self.finish_epoch()
        finally:
            if self.stop.asked is Cause.SIGTERM:
                self.process.has_sigterm.set()
            self.writer.wait()
            if self.recorder is not None:
                self.recorder.close()
        if self.writer.has_failed:
            raise SaveError(f"{self.folder}: the last checkpoint could not be saved, see the log")
        return state.progress.epochs >= self.config.total_epochs

    def train_epoch(self) -> bool:
        """Run the remaining steps of an epoch; return False when the run stops, after saving."""
        config, state = self.config, self.state
        epoch, first = state.progress
        self.sums = EpochSums(self.process.device, state.sums)
        self.data_wait, self.start = DataWait(self.process.device), time.perf_counter()
        self.first = first
        self.train_step.model.train()
        if first < config.steps_per_epoch:
            batches = self.batches(epoch, first * config.accumulation_steps)
        else:  # it was saved before its evaluation, which did not end
            last_step = (epoch + 1) * config.steps_per_epoch - 1
            self.train_step.prepare(last_step, config.lr_at(last_step))  # since checkpoints have the learning rate
            batches = iter(())
        self.timer.start_window()
        lengths, is_main = (epoch, config.total_epochs, config.steps_per_epoch), self.process.is_main
        with ProgressBar(*lengths, done=first, is_main=is_main, text=self.bar_text) as bar:
            for index in range(first, config.steps_per_epoch):
                if self.should_stop():
                    break
                step = epoch * config.steps_per_epoch + index
                micro_batches = self.next_batches(batches, config.accumulation_steps)
                result = self.train_step(micro_batches, step=step, learning_rate=config.lr_at(step))
                if self.process.heartbeat is not None:
                    self.process.heartbeat.watch_device()
                if self.start_clock is not None:
                    self.log_start(self.start_clock)
                self.sums.add(result)
                state.progress = Progress(epoch, index + 1)
                bar.advance()
                self.timer.count_step()
                is_last = index + 1 == config.steps_per_epoch
                is_early = self.is_on_cpu and step == self.first_step + 1  # a CPU may need minutes to the next report
                if is_last or is_early or (index + 1) % config.print_freq == 0:
                    self.report(bar, step, result)
                if config.save_steps and (step + 1) % config.save_steps == 0 and not is_last:
                    self.save_within_epoch(step)
        if not self.should_stop():
            return True
        if self.stop.cause is not Cause.SAVING_FAILED and state.progress != self.saved:
            self.save_within_epoch(epoch * config.steps_per_epoch + state.progress.steps - 1)
        logger.warning(
            "%s: stopped in epoch %d after step %d of %d; run the same command to resume",
            *(self.stop.cause.text, epoch + 1, state.progress.steps, config.steps_per_epoch),
        )
        return False

    def should_stop(self) -> bool:
        """Return whether any process was asked to stop; called by all processes together."""
        if self.config.stop_on_save_error and self.writer.has_failed:
            self.stop.ask(Cause.SAVING_FAILED)
        return self.stop.agreed() is not Cause.NONE

    def end_at_once(self) -> None:
        """End the process, which was asked to stop and has not come to its next step in time; in a thread."""
        self.writer.wait(WRITE_SECONDS)
        newest = next((path.name for _, path in checkpoints_in(self.folder)), None)
        logger.warning(
            "%s: stopped while compiling or evaluating; %s; run the same command to resume",
            *(self.stop.asked.text, f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"),
        )
        flush_standard_streams()
        os._exit(0)

    def interrupt(self, count: int) -> None:
        """Say what Ctrl-C does, or at the second end the process; in a thread."""
        if count == 1:
            logger.warning("Ctrl-C: the run ends after this step, or evaluation, and saves; again: ends at once")
            return
        logger.warning("ended without saving; run the same command to resume from the newest checkpoint, if any")
        flush_standard_streams()
        os._exit(INTERRUPTED)

    def next_batches(self, batches: Iterator[Any], count: int) -> list[Any]:
        """Return the next micro-batches; until then the device may wait for data."""
        with self.data_wait:
            result = [next(batches) for _ in range(count)]
        if self.start_clock is not None:
            self.start_clock.end("first batch")
        return result

    def log_start(self, clock: StartClock) -> None:
        """Log, after the first step, what the time until then was spent on."""
        clock.end("first step")
        logger.info("First step after %s", clock, extra=DETAIL)
        if advice := import_advice(torch):
            logger.info("%s", advice)
        self.start_clock = None

    def report(self, bar: ProgressBar, step: int, result: StepResult) -> None:
        """Log the progress of the epoch. Waits for the device.

        Raises:
            NonFiniteLossError: a step since the last report was not finite.
        """
        self.check_finite(step)
        self.data_wait.collect()
        done = self.state.progress.steps
        terms, _ = self.sums.means(steps=done, num_processes=self.process.num_processes)
        step_seconds = self.timer.end_window()
        bar.report(
            done,
            terms=terms,
            grad_norm=result.grad_norm.item(),
            lr=self.config.lr_at(step),
            rate=self.state.global_batch_size / step_seconds if step_seconds else None,
            step_seconds=self.timer.typical(),
            evaluation_seconds=self.evaluation_seconds,
        )
        self.bar_text = bar.text

    def check_finite(self, step: int) -> None:
        bad_step = self.train_step.check_finite(step)
        if bad_step is None:
            return
        epoch, index = divmod(bad_step, self.config.steps_per_epoch)
        place = f"epoch {epoch + 1}, step {index + 1} (step {bad_step + 1} of the run)"
        fault = f"the loss or gradient is not finite in {place}, learning rate {self.config.lr_at(bad_step):.3e}"
        source = self.state.source
        if source and bad_step == self.first_step:
            raise NonFiniteLossError(
                f"{fault}, the first after resuming from {source}, in which the run has diverged already; a lower "
                f"TRAIN.BASE_LR alone does not mend that: {self.describe_earlier_checkpoint()}"
            )
        remedy = "Lower TRAIN.BASE_LR or TRAIN.CLIP_GRAD, or try AMP_DTYPE bfloat16 or no AMP"
        if source and self.steps_done(self.saved) == self.first_step:  # the next start resumes from it again
            remedy += f". If the run has diverged in {source} already, {self.describe_earlier_checkpoint()}"
        raise NonFiniteLossError(f"{fault}; the run stops, its checkpoints are from before this step. {remedy}")

    def describe_earlier_checkpoint(self) -> str:
        """Return how to resume from before the checkpoint that this run resumed from."""
        for progress, path in checkpoints_in(self.folder):
            if self.steps_done(progress) < self.first_step:
                return f"resume from an earlier checkpoint, and lower the rate: --resume {path}"
        return f"start again with a lower rate and another --tag, since {self.folder} has no earlier checkpoint"

    def steps_done(self, progress: Progress) -> int:
        return progress.epochs * self.config.steps_per_epoch + progress.steps

    def finish_epoch(self) -> None:
        """Evaluate the model and its EMA, record the metrics, and save the checkpoints that are due.

        The state is saved before that: whatever ends the evaluation, the next start begins with the evaluation.
        """
        config, state, process = self.config, self.state, self.process
        epoch = state.progress.epochs
        train_seconds, steps = time.perf_counter() - self.start, config.steps_per_epoch - self.first
        if state.progress != self.saved:
            self.save([state.progress.checkpoint_name])
        terms, grad_norm = self.sums.means(steps=config.steps_per_epoch, num_processes=process.num_processes)
        wait_seconds = self.data_wait.collect()
        self.warn_of_waiting(wait_seconds, train_seconds)
        last_step = (epoch + 1) * config.steps_per_epoch - 1
        metrics = {"epoch": epoch, "step": last_step + 1, "lr": config.lr_at(last_step), "grad_norm": grad_norm}
        metrics |= {f"train_{name}": value for name, value in terms.items()}
        start = time.perf_counter()
        if epoch + 1 < config.total_epochs:
            self.expect_epoch(epoch + 1)
        scores, ema_scores = self.evaluate_both()
        metrics |= {**scores, **{f"ema_{name}": value for name, value in ema_scores.items()}}
        self.evaluation_seconds = time.perf_counter() - start
        speed = {
            "epoch": epoch,
            "steps": steps,  # of this process, where the epoch was interrupted and resumed
            "train_seconds": train_seconds,
            "data_wait_seconds": wait_seconds,
            "eval_seconds": self.evaluation_seconds,
            "images_per_second": steps * state.global_batch_size / train_seconds if steps else None,
            "memory_mib": peak_memory_mib(process.device),
            "process_seconds": process_seconds(),
        }
        state.progress, state.sums = Progress(epoch + 1), {}
        self.sums = EpochSums(process.device, {})
        if self.recorder is not None:
            self.check_folder()
            self.recorder.add(metrics, speed)
        names = self.checkpoint_names(scores, ema_scores)
        self.log_epoch(terms["loss"], scores, ema_scores, train_seconds + self.evaluation_seconds)
        self.save(names)
        if self.recorder is not None:
            self.add_details(epoch, float(scores[config.metric]))
            self.recorder.draw_curves(is_last=epoch + 1 == config.total_epochs)

    def warn_of_waiting(self, wait_seconds: float, train_seconds: float) -> None:
        """Log once how the steps would wait less for data, if that is worth it in the run's remaining time."""
        share, num_epochs = wait_seconds / train_seconds, self.config.total_epochs - self.state.progress.epochs
        if self.loading_advice is None or not self.process.is_main:
            return
        if share > MAX_WAIT and wait_seconds * num_epochs > MIN_WAIT_SECONDS:
            logger.warning("the steps of this epoch waited %.0f%% of the time: %s", 100 * share, self.loading_advice())
            self.loading_advice = None

    def evaluate_both(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Return the metrics of the model, and of its EMA, which are empty if there is none."""
        state, metric = self.state, self.config.metric
        with information_as_details():
            if state.ema is None:
                return self.evaluate({"model": state.model})["model"], {}
            both = self.evaluate({"model": state.model, "EMA": state.ema.on(self.process.device)})
        scores, ema_scores = both["model"], both["EMA"]
        state.ema.scores = {"model": score_in(scores, metric), "EMA": score_in(ema_scores, metric)}
        return scores, ema_scores

    def log_epoch(
        self, loss: float, scores: Mapping[str, float], ema_scores: Mapping[str, float], seconds: float
    ) -> None:
        """Log the line that an epoch leaves on the terminal."""
        config, best = self.config, self.state.best_so_far()
        ema = f", EMA {ema_scores[config.metric]:.2f}" if ema_scores else ""
        logger.info(
            "epoch %d/%d: loss %.3f, %s %.2f%s, %s, best %.2f%s",
            *(self.state.progress.epochs, config.total_epochs, loss, config.metric_label, scores[config.metric], ema),
            *(duration(seconds), best.score, f" (epoch {best.epoch})" if best.epoch else ""),
            extra=EPOCH,
        )

    def add_details(self, epoch: int, score: float) -> None:
        """Record an image of predictions and histograms of weights, every few epochs and at the end.

        `score` is the model's in this epoch's evaluation.
        Between, epochs shorter than MIN_IMAGE_SECONDS are left out: drawing would take a noticeable share of them.
        """
        assert self.recorder is not None
        config, state = self.config, self.state
        is_due = config.image_epochs and (epoch + 1) % config.image_epochs == 0
        is_rare = time.monotonic() - self.last_image_time > MIN_IMAGE_SECONDS
        if epoch + 1 < config.total_epochs and not (is_due and is_rare):
            return
        self.last_image_time = time.monotonic()
        image = None
        if self.draw_predictions is not None:
            with errors_logged("predictions could not be drawn"):
                image = self.draw_predictions(*state.better_model(score))
        with errors_logged("weights could not be sampled"):
            self.recorder.add_details(epoch, weight_samples(state.model), image)

    def checkpoint_names(self, scores: Mapping[str, float], ema_scores: Mapping[str, float]) -> list[str]:
        """Return the names under which an epoch's checkpoint is saved, none for not at all; updates the best scores."""
        config, state = self.config, self.state
        epoch = state.progress.epochs
        names = []
        if epoch % config.save_freq == 0 or epoch == config.total_epochs:
            names.append(state.progress.checkpoint_name)
        if is_new_best(score := score_in(scores, config.metric), state.best):
            state.best, state.best_epochs["model"] = score, epoch
            names.append(f"max_{config.best_name}.pth")
        if ema_scores and is_new_best(score := score_in(ema_scores, config.metric), state.best_ema):
            state.best_ema, state.best_epochs["EMA"] = score, epoch
            names.append(f"max_ema_{config.best_name}.pth")
        if config.best_label:
            logger.info("Max %s: %.3f%%", config.best_label, state.best, extra=DETAIL)
            if ema_scores:
                logger.info("Max EMA %s: %.3f%%", config.best_label, state.best_ema, extra=DETAIL)
        return names

    def save_within_epoch(self, step: int) -> None:
        self.check_finite(step)
        self.save([self.state.progress.checkpoint_name])

    def save(self, names: Sequence[str]) -> None:
        """Save the state under the given names, if any; called by all processes together."""
        if not names:
            return
        state = self.state
        state.sums = self.sums.local()
        content = state.capture(**self.metadata)
        if self.process.is_main:
            self.check_folder()
            self.writer.write(state.progress, names, content)
        self.saved = state.progress
