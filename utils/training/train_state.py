"""State of a training run, saved in and restored from checkpoints."""

import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.checkpoint.best_weights import describe_choice, is_ema_better
from utils.checkpoint.files import Progress, checkpoints_in, load_latest, progress_in
from utils.checkpoint.same_run import settings_of
from utils.checkpoint.weight_sets import Weights, find_weight_sets
from utils.checkpoint.weights import check_classes, classes_in, load_weights, no_weights_error
from utils.checkpoint.weights_file import CheckpointError, load_checkpoint
from utils.distributed.process import Process, gather_objects
from utils.logs.logger import logger
from utils.training.ema import ModelEma
from utils.training.optimizer import matched_state

START = Progress(0)
VERSIONS = {"torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()}


@dataclass
class TrainState:
    """Everything that the next step of a run depends on.

    Attributes:
        model: the model.
        global_batch_size: images per optimizer step, over all processes.
        progress: completed epochs, and completed steps of the next one.
        best, best_ema: best value so far of the task's metric, of the model and of its EMA.
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
    progress: Progress = START
    best: float = 0.0
    best_ema: float = 0.0
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
            "max_accuracy": self.best,
            "max_accuracy_e": self.best_ema,
            "scores": dict(self.ema.scores) if self.ema else None,
            "ranks": ranks,
            "origin": self.origin,
            "versions": VERSIONS,
            **metadata,
        }

    def better_model(self) -> tuple[nn.Module, str]:
        """Return the better of model and EMA in the last evaluation, in evaluation mode, and its description."""
        if self.ema is None:
            return self.model.eval(), describe_choice("model", {})
        if is_ema_better(self.ema.scores):
            return self.ema.on(self.process.device), describe_choice("EMA", self.ema.scores)
        return self.model.eval(), describe_choice("model", self.ema.scores)

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
        continues = False
        origin = fingerprint(explicit) if explicit else None
        latest = load_latest(folder) if auto else None
        if latest is not None and (origin is None or latest[1].get("origin") == origin):
            check(latest[1], latest[0])
            self.restore(latest[1], str(latest[0]))
            logger.info("resumed from %s%s", latest[0], f", a run that began from {explicit}" if explicit else "")
            continues = True
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

    def restore(self, content: dict[str, Any], source: str) -> None:
        """Restore a checkpoint's content, or only the weights of a file that has nothing else.

        Raises:
            CheckpointError: there are no weights, or they or the optimizer's state do not fit.
        """
        sets = find_weight_sets(content)
        weights = sets.model or sets.ema
        if weights is None:
            raise no_weights_error(source, content)
        self.source, self.pretrained = source, settings_of(content).get("MODEL.PRETRAINED", "")
        if sets.model is None:
            logger.warning("%s has no weights but the EMA's: the model starts from them", source)
        if self.classes is not None:
            check_classes(classes_in(content), self.classes, source)
        load_weights(self.model, weights, source)
        if self.ema is not None:
            load_weights(self.ema.module, sets.ema or weights, source)
        if "optimizer" not in content:
            logger.info("%s contains weights only: optimizer and epoch are re-initialized", source)
            return
        try:
            self.restore_progress(content, weights, source)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{source}: not a complete checkpoint of a run ({error})") from error

    def restore_progress(self, content: dict[str, Any], weights: Weights, source: str) -> None:
        """Restore everything but the weights, whose order gives the order of the optimizer's state."""
        self.restore_optimizer(content["optimizer"], weights, source)
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        self.progress = progress_in(content)
        self.best = float(content.get("max_accuracy", 0.0))
        self.best_ema = float(content.get("max_accuracy_e", 0.0))
        if self.ema is not None:
            self.ema.scores = dict(content.get("scores") or {})
        self.origin = content.get("origin")
        self.check_global_batch_size(content.get("images_per_step", self.global_batch_size), source)
        ranks, process = content.get("ranks", []), self.process
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

    def check_global_batch_size(self, saved: int, source: str) -> None:
        """Compare the global batch size: another one moves the schedule, and within an epoch repeats or loses images.

        Raises:
            CheckpointError: the checkpoint is from within an epoch.
        """
        if saved == self.global_batch_size:
            return
        if self.progress.steps:
            raise CheckpointError(
                f"{source}: was saved within an epoch with global batch size {saved}, now it is "
                f"{self.global_batch_size}; set DATA.BATCH_SIZE or TRAIN.ACCUMULATION_STEPS for {saved} again, or "
                f"--resume the end of an epoch"
            )
        logger.warning(
            "%s: global batch size changed from %d to %d; learning rates and steps per epoch change",
            *(source, saved, self.global_batch_size),
        )

    def restore_optimizer(self, saved: dict[str, Any], weights: Weights, source: str) -> None:
        """Restore the optimizer's moments; its settings stay as configured."""
        kind = {"betas", "momentum"} & set(self.optimizer.param_groups[0])
        if kind != {"betas", "momentum"} & set(saved["param_groups"][0]):
            raise CheckpointError(f"{source}: was trained with another TRAIN.OPTIMIZER.NAME; set the same one")
        try:
            self.optimizer.load_state_dict(matched_state(saved, weights, self.model, self.optimizer))
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


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of this process's random number generators, in types that load safely."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
    }


def restore_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore this process's random number generators from `rng_state`'s result."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
