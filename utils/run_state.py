"""Everything that the next step of a run depends on, to and from a checkpoint."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.checkpoint import checkpoints_in, load_latest
from utils.distributed import Process, gather_objects
from utils.ema import ModelEma
from utils.logger import logger
from utils.optimizer import matched_state
from utils.weights import Weights, check_classes, classes_in, load_weights, no_weights_error, weights_in
from utils.weights_file import CheckpointError, load_checkpoint


@dataclass
class RunState:
    """A run between two epochs.

    Attributes:
        model: not wrapped in DDP.
        next_epoch: the epoch to run next, from 0.
        best_acc1, best_ema_acc1: highest top-1 so far, of the model and of the average, in percent.
        classes: names of the data's classes by output; None where a checkpoint's are not to be compared with them.
    """

    model: nn.Module
    ema: ModelEma | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    process: Process
    next_epoch: int = 0
    best_acc1: float = 0.0
    best_ema_acc1: float = 0.0
    classes: Sequence[str] | None = None

    def capture(self, **facts: Any) -> dict[str, Any]:
        """The state as a checkpoint's content, `facts` beside it; called by all processes together."""
        return {
            "model": self.model.state_dict(),
            "state_dict_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.next_epoch - 1,
            "max_accuracy": self.best_acc1,
            "max_accuracy_e": self.best_ema_acc1,
            "rng": gather_objects(rng_state(self.process.device)),
            **facts,
        }

    def resume(self, folder: Path, *, explicit: str, auto: bool) -> bool:
        """Go on from the file `explicit` if it is named, else, with `auto`, from the folder's newest whole checkpoint.

        Returns:
            Whether the folder's own run goes on.

        Raises:
            CheckpointError: the checkpoint does not fit, a run would be overwritten, or processes see different files.
        """
        continues = False
        if explicit:
            self.restore(load_checkpoint(explicit), explicit)
            logger.info("resumed from %s", explicit)
        elif auto and (latest := load_latest(folder)) is not None:
            self.restore(latest[1], str(latest[0]))
            logger.info("resumed from %s", latest[0])
            continues = True
        elif not auto and checkpoints_in(folder):
            raise CheckpointError(
                f"TRAIN.AUTO_RESUME False: {folder} holds a run, which would be overwritten; name another --tag"
            )
        epochs = gather_objects(self.next_epoch)
        if len(set(epochs)) > 1:
            raise CheckpointError(f"{folder}: processes see different checkpoints there; next epochs {epochs}")
        return continues

    def restore(self, content: dict[str, Any], source: str) -> None:
        """Take over a checkpoint's content, or only the weights where there is nothing else in it.

        Raises:
            CheckpointError: there are no weights, or they or the optimizer's state do not fit.
        """
        weights = weights_in(content, "model") or weights_in(content, "state_dict_ema")
        if weights is None:
            raise no_weights_error(source, content)
        if self.classes is not None:
            check_classes(classes_in(content), self.classes, source)
        load_weights(self.model, weights, source)
        if self.ema is not None:
            load_weights(self.ema.module, weights_in(content, "state_dict_ema") or weights, source)
        if "optimizer" not in content:
            logger.info("%s holds weights only: optimizer and epoch start afresh", source)
            return
        try:
            self.restore_progress(content, weights, source)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{source}: not a whole checkpoint of a run ({error})") from error

    def restore_progress(self, content: dict[str, Any], weights: Weights, source: str) -> None:
        """Take over all but the weights, whose order tells that of the optimizer's state."""
        self.restore_optimizer(content["optimizer"], weights, source)
        if content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        self.next_epoch = content["epoch"] + 1
        self.best_acc1 = float(content.get("max_accuracy", 0.0))
        self.best_ema_acc1 = float(content.get("max_accuracy_e", 0.0))
        states = content.get("rng", [])
        if len(states) == self.process.num_processes:
            restore_rng_state(states[self.process.rank], self.process.device)
        else:
            logger.warning(
                "%s was written by %d processes, now there are %d: dropout and mixup draw other random numbers",
                *(source, len(states), self.process.num_processes),
            )

    def restore_optimizer(self, saved: dict[str, Any], weights: Weights, source: str) -> None:
        """Take over the optimizer's moments; its settings stay those of the configuration."""
        kind = {"betas", "momentum"} & set(self.optimizer.param_groups[0])
        if kind != {"betas", "momentum"} & set(saved["param_groups"][0]):
            raise CheckpointError(f"{source}: was trained with another TRAIN.OPTIMIZER.NAME; set it as it was then")
        try:
            self.optimizer.load_state_dict(matched_state(saved, weights, self.model, self.optimizer))
        except ValueError as error:
            raise CheckpointError(
                f"{source}: its optimizer state does not fit: {error}; set TRAIN.FREEZE and MODEL.LAYER_DECAY as then"
            ) from error


def seed_everything(seed: int) -> None:
    """Seed this process's random number generators, those of its GPUs too."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of this process's random number generators, in types that load safely."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
    }


def restore_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put this process's random number generators back to `rng_state`'s states."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
