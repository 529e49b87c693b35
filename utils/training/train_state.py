"""State of a training run, saved in and restored from checkpoints."""

import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from utils.checkpoint.best_weights import describe_choice, is_ema_better
from utils.checkpoint.files import Progress, checkpoints_in, describe, progress_in, readable_checkpoints
from utils.checkpoint.rng import restore_rng_state, rng_state
from utils.checkpoint.run_content import DamagedCheckpointError, check_run_content
from utils.checkpoint.same_run import settings_of
from utils.checkpoint.weight_sets import MODEL_KEYS, Weights, find_weight_sets
from utils.checkpoint.weights import check_classes, classes_in, fitting_weights, no_weights_error
from utils.checkpoint.weights_file import CheckpointError, load_checkpoint
from utils.distributed.process import Process, gather_objects
from utils.logs.logger import logger
from utils.training.ema import ModelEma
from utils.training.optimizer import MomentError, matched_state

START = Progress(0)
VERSIONS = {"torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()}


class Best(NamedTuple):
    """The best score of a run so far, whether the EMA has it, and its epoch, from 1; 0 if that is not known."""

    score: float
    is_ema: bool
    epoch: int


@dataclass
class TrainState:
    """Everything that the next step of a run depends on.

    Attributes:
        model: the model.
        global_batch_size: images per optimizer step, over all processes.
        num_train_images, steps_per_epoch: of the data, to compare with a checkpoint's; 0: not compared.
        progress: completed epochs, and completed steps of the next one.
        best, best_ema: best value so far of the task's metric, of the model and of its EMA.
        best_epochs: the epochs, from 1, of these values, by "model" and "EMA"; without those that are not known.
        sums: this process's sums over the completed steps of the unfinished epoch, by name.
        origin: fingerprint of the file that --resume named when the run began.
        classes: names of the data's classes by output; None: a checkpoint's class names are not compared.
        source: file that the state was restored from, if any; `pretrained`: weights that the run in it started from.
    """

    model: nn.Module
    ema: ModelEma | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    process: Process
    global_batch_size: int = 1
    num_train_images: int = 0
    steps_per_epoch: int = 0
    progress: Progress = START
    best: float = 0.0
    best_ema: float = 0.0
    best_epochs: dict[str, int] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    origin: dict[str, Any] | None = None
    classes: Sequence[str] | None = None
    source: str = ""
    pretrained: str = ""

    def capture(self, **metadata: Any) -> dict[str, Any]:
        """Return a checkpoint's content, the state and `metadata`; called by all processes together."""
        ranks = gather_objects({"rng": rng_state(self.process.device), "sums": self.sums})
        return {
            "model": self.model.state_dict(),
            "state_dict_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.progress.epochs - 1,  # index of the last completed one
            "steps": self.progress.steps,
            "images_per_step": self.global_batch_size,
            **({"num_train_images": self.num_train_images} if self.num_train_images else {}),
            "max_accuracy": self.best,
            "max_accuracy_e": self.best_ema,
            "best_epochs": dict(self.best_epochs),
            "scores": dict(self.ema.scores) if self.ema else None,
            "ranks": ranks,
            "origin": self.origin,
            "versions": VERSIONS,
            **metadata,
        }

    def better_model(self, score: float | None = None) -> tuple[nn.Module, str]:
        """Return the better of model and EMA in the last evaluation, in evaluation mode, and its description.

        Without an EMA there is no record of that evaluation: `score` is the model's, if it is known.
        """
        if self.ema is None:
            return self.model.eval(), describe_choice("model", {} if score is None else {"model": score})
        if is_ema_better(self.ema.scores):
            return self.ema.on(self.process.device), describe_choice("EMA", self.ema.scores)
        return self.model.eval(), describe_choice("model", self.ema.scores)

    def best_so_far(self) -> Best:
        """Return the best score of all evaluations of the model and its EMA."""
        is_ema = self.ema is not None and is_ema_better({"model": self.best, "EMA": self.best_ema})
        score, name = (self.best_ema, "EMA") if is_ema else (self.best, "model")
        return Best(score, is_ema, self.best_epochs.get(name, 0))

    def resume(
        self,
        folder: Path,
        *,
        explicit: str,
        auto: bool,
        check: Callable[[Mapping[str, Any], Path], None] = lambda *_: None,
    ) -> bool:
        """Resume from the file `explicit` if it is named, else, with `auto`, from the folder's newest valid checkpoint.

        If the folder's run itself began from `explicit`, the command is being repeated: the folder's run resumes.
        `check` is called with content and path of the folder's checkpoint, and raises if it is of another run.

        Returns:
            Whether the folder's own run is resumed.

        Raises:
            CheckpointError: the checkpoint does not fit, a run would be overwritten, or processes see different files.
        """
        origin = fingerprint(explicit) if explicit else None
        continues = auto and self.resume_folder(folder, origin, check)
        if continues:
            began = f", of a run that began from {explicit}" if explicit else ""
            logger.info("resumed from %s, %s%s", self.source, describe(self.progress), began)
        elif explicit:
            self.restore(load_checkpoint(explicit), explicit)
            self.origin = origin
            logger.info("resumed from %s", explicit)
        elif not auto and checkpoints_in(folder):
            raise CheckpointError(
                f"TRAIN.AUTO_RESUME False: {folder} contains a run, which would be overwritten; name another --tag"
            )
        points = gather_objects(tuple(self.progress))
        if len(set(points)) > 1:
            raise CheckpointError(f"{folder}: processes see different checkpoints there, at (epochs, steps) {points}")
        return continues

    def resume_folder(
        self, folder: Path, origin: dict[str, Any] | None, check: Callable[[Mapping[str, Any], Path], None]
    ) -> bool:
        """Resume from a folder's newest checkpoint that is whole, if its run has this origin; skip damaged ones."""
        for path, content in readable_checkpoints(folder):
            if origin is not None and content.get("origin") != origin:
                return False
            try:
                check(content, path)
                self.restore(content, str(path))
            except DamagedCheckpointError as error:
                logger.warning("skipped a checkpoint: %s", error)
            else:
                return True
        return False

    def restore(self, content: dict[str, Any], source: str) -> None:
        """Restore a checkpoint's content, or only the weights of a file that has nothing else.

        Nothing is changed before all of it is known to fit.

        Raises:
            DamagedCheckpointError: the content is no run's checkpoint.
            CheckpointError: there are no weights, or they or the optimizer's state do not fit this run.
        """
        sets = find_weight_sets(content)
        weights = sets.model or sets.ema
        if weights is None:
            raise no_weights_error(source, content)
        has_run = "optimizer" in content
        if has_run:
            check_run_content(content, source)
        elif sets.model is None:
            if empty := [key for key in MODEL_KEYS if key in content]:
                raise CheckpointError(f"{source}: has no weights under {empty[0]}, only the EMA's; see --pretrained")
            logger.warning("%s has no weights but the EMA's: the model starts from them", source)
        if self.classes is not None:
            check_classes(classes_in(content), self.classes, source)
        fitting = fitting_weights(self.model, weights, source)
        fitting_ema = fitting_weights(self.ema.module, sets.ema or weights, source) if self.ema is not None else {}
        optimizer_state = self.fitting_optimizer_state(content["optimizer"], weights, source) if has_run else {}
        if has_run:
            self.check_same_steps(content, source)
        self.source, self.pretrained = source, settings_of(content).get("MODEL.PRETRAINED", "")
        self.model.load_state_dict(fitting)
        if self.ema is not None:
            self.ema.module.load_state_dict(fitting_ema)
        if not has_run:
            logger.info("%s contains weights only: optimizer and epoch are re-initialized", source)
            return
        self.optimizer.load_state_dict(optimizer_state)
        self.restore_progress(content, source)

    def restore_progress(self, content: dict[str, Any], source: str) -> None:
        """Restore everything but weights and optimizer."""
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        self.progress = progress_in(content)
        self.best = float(content.get("max_accuracy", 0.0))
        self.best_ema = float(content.get("max_accuracy_e", 0.0))
        self.best_epochs = dict(content.get("best_epochs", {}))
        if self.ema is not None:
            self.ema.scores = dict(content.get("scores") or {})
        self.origin = content.get("origin")
        self.restore_ranks(content.get("ranks", []), source)
        versions = content.get("versions", VERSIONS)
        if changed := [
            f"{name} {versions.get(name)} -> {VERSIONS[name]}"
            for name in VERSIONS
            if versions.get(name) != VERSIONS[name]
        ]:
            logger.warning(
                "%s was written with other versions, results may differ in the last bits: %s",
                source,
                ", ".join(changed),
            )

    def restore_ranks(self, ranks: list[dict[str, Any]], source: str) -> None:
        """Restore this process's sums and random number generators."""
        process = self.process
        self.sums = {}
        if len(ranks) == process.num_processes:
            self.sums = ranks[process.rank]["sums"]
            restore_rng_state(ranks[process.rank]["rng"], process.device)
        elif not ranks:  # written by another program
            logger.warning("%s contains no states of random number generators; they start from SEED", source)
        else:
            if process.is_main:  # its sums now stand for all processes
                for rank in ranks:
                    self.sums = {name: self.sums.get(name, 0.0) + value for name, value in rank["sums"].items()}
            logger.warning(
                "%s was written by %d processes, now there are %d: order and augmentation of the images stay the same; "
                "dropout, drop path and mixup draw other random numbers, and sums are rounded differently",
                *(source, len(ranks), process.num_processes),
            )

    def check_same_steps(self, content: Mapping[str, Any], source: str) -> None:
        """Compare the size of a step and of an epoch; others move the schedule, and repeat or lose an epoch's images.

        Raises:
            CheckpointError: the checkpoint is from within an epoch.
        """
        steps = progress_in(content).steps
        compared = {
            "global batch size": (
                *(content.get("images_per_step"), self.global_batch_size),
                "set DATA.BATCH_SIZE or TRAIN.ACCUMULATION_STEPS",
            ),
            "number of training images": (
                *(content.get("num_train_images"), self.num_train_images),
                "restore the training images",
            ),
        }
        for name, (saved, current, remedy) in compared.items():
            if not saved or not current or saved == current:
                continue
            if steps:
                raise CheckpointError(
                    f"{source}: was saved within an epoch with {name} {saved}, now it is {current}; {remedy} for "
                    f"{saved} again, or --resume the end of an epoch"
                )
            logger.warning(
                "%s: %s changed from %d to %d; learning rates and steps per epoch change",
                *(source, name, saved, current),
            )
        if self.steps_per_epoch and steps > self.steps_per_epoch:
            raise CheckpointError(
                f"{source}: was saved after step {steps} of an epoch, which now has {self.steps_per_epoch} steps; "
                f"restore the settings and the training images that it was saved with, or --resume the end of an epoch"
            )

    def fitting_optimizer_state(self, saved: dict[str, Any], weights: Weights, source: str) -> dict[str, Any]:
        """Return a saved optimizer's moments with this optimizer's settings, which stay as configured."""
        kind = {"betas", "momentum"} & set(self.optimizer.param_groups[0])
        if kind != {"betas", "momentum"} & set(saved["param_groups"][0]):
            raise CheckpointError(f"{source}: was trained with another TRAIN.OPTIMIZER.NAME; set the same one")
        try:
            return matched_state(saved, weights, self.model, self.optimizer)
        except MomentError as error:
            raise DamagedCheckpointError(f"{source}: not a complete checkpoint of a run ({error})") from error
        except ValueError as error:
            raise CheckpointError(
                f"{source}: its optimizer state does not fit: {error}; set TRAIN.FREEZE and MODEL.LAYER_DECAY as before"
            ) from error


def fingerprint(source: str) -> dict[str, Any]:
    """Return what identifies a version of a file: path, size and time; for a URL or a released name, only itself."""
    path = Path(source)
    stat = path.stat() if path.is_file() else None
    return {
        "source": str(path.resolve()) if stat else source,
        "bytes": stat.st_size if stat else None,
        "modified_ns": stat.st_mtime_ns if stat else None,
    }


def seed_everything(seed: int) -> None:
    """Seed this process's random number generators, including its GPU's."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
