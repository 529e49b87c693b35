"""Records of a run: metrics.jsonl, speed.jsonl, curves.png, TensorBoard's events, and Weights & Biases."""

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from utils.logs.atomic_write import append_atomic, write_atomic
from utils.logs.logger import errors_logged
from utils.logs.output_dir import output_errors
from utils.logs.plots import Panel, plot_curves
from utils.logs.tensorboard import EventFile
from utils.logs.wandb_logger import WandbLogger

CURVES_SECONDS = 60.0
IMAGE_SIDE = 1024  # pixels
MAX_PARTS = 12  # of a model, that have a histogram
MAX_VALUES = 10_000  # per part


class RunRecorder:
    """Records a run's metrics by epoch.

    metrics.jsonl holds what the configuration determines, to the last bit, however often the run was interrupted;
    speed.jsonl what depends on the machine; TensorBoard both. Whatever fails is an error in the log, and training
    continues.

    Args:
        folder: the run's output folder.
        start_epoch: records of this epoch and later ones are dropped, since these epochs run again.
        panels: plots in curves.png.
        wandb: logger of Weights & Biases, or None.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, start_epoch: int, panels: Sequence[Panel], wandb: WandbLogger | None = None
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.panels = panels
        self.wandb = wandb
        with output_errors(folder):
            self.drop_from(start_epoch)
            self.tensorboard = EventFile(folder, purge_step=start_epoch)
        self.last_drawn = time.monotonic()
        self.unsaved: list[dict[str, Any]] = []  # records of metrics.jsonl that a full disk refused

    def drop_from(self, start_epoch: int) -> None:
        """Move records of epochs that run again to metrics_replaced.jsonl."""
        records = read_records(self.path)
        replaced = [record for record in records if record["epoch"] >= start_epoch]
        append_records(self.path.with_name("metrics_replaced.jsonl"), replaced)
        kept = [record for record in records if record["epoch"] < start_epoch]
        write_atomic(self.path, lambda path: path.write_text("".join(map(json_line, kept))))

    def add(self, metrics: dict[str, Any], speed: dict[str, Any]) -> None:
        """Record an epoch's metrics; both dictionaries have its number as "epoch"."""
        self.unsaved.append(metrics)
        with self.errors_logged():
            append_records(self.path, self.unsaved)
            self.unsaved = []
        with self.errors_logged():
            append_records(self.path.with_name("speed.jsonl"), [speed])
            for name, value in {**metrics, **speed}.items():
                if name != "epoch" and value is not None:
                    self.tensorboard.add_scalar(name, value, metrics["epoch"])
        if self.wandb is not None:
            self.wandb.add({**metrics, **speed})

    def add_details(self, epoch: int, weights: Mapping[str, np.ndarray], predictions: Path | None) -> None:
        """Record histograms of weights by part, and the image file of predictions, at most IMAGE_SIDE pixels wide."""
        with self.errors_logged():
            for name, values in weights.items():
                self.tensorboard.add_histogram(f"weights/{name}", values, epoch)
            if predictions is not None:
                with Image.open(predictions) as image:
                    small = image.convert("RGB")
                small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
                self.tensorboard.add_image("predictions", np.asarray(small), epoch)
        if self.wandb is not None and predictions is not None:
            self.wandb.add_image("predictions", predictions, epoch)

    def draw_curves(self, *, is_last: bool) -> None:
        """Draw curves.png again: after the last epoch, else once a minute."""
        if is_last or time.monotonic() - self.last_drawn > CURVES_SECONDS:
            self.last_drawn = time.monotonic()
            with self.errors_logged():
                plot_curves(read_records(self.path), self.panels, self.path.with_name("curves.png"))

    def errors_logged(self) -> AbstractContextManager[None]:
        return errors_logged(f"{self.path.parent}: metrics could not be written")

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the objects with an epoch from a file of one JSON object per line, without lines that a kill cut short."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and type(record.get("epoch")) is int]


def append_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append a line of JSON per record; without records no file is made."""
    if records:
        append_atomic(path, "".join(map(json_line, records)).encode())


def json_line(record: Mapping[str, Any]) -> str:
    """Return a line of JSON, which has no NaN and no infinity: those become null."""
    is_lost = {name: isinstance(value, float) and not math.isfinite(value) for name, value in record.items()}
    return json.dumps({name: None if is_lost[name] else value for name, value in record.items()}) + "\n"


def weight_samples(model: nn.Module) -> dict[str, np.ndarray]:
    """Return up to MAX_VALUES finite weights per part, evenly spaced, by the part's name.

    Parts are the model's children; those of a list or a sequence of modules, such as stages, count on their own. The
    first MAX_PARTS that have weights are taken.
    """
    parts: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        is_list = isinstance(child, nn.ModuleList | nn.Sequential)
        parts |= {f"{name}.{i}": part for i, part in child.named_children()} if is_list else {name: child}
    samples = {name: values for name, part in parts.items() if len(values := sample(part))}
    return dict(list(samples.items())[:MAX_PARTS])


@torch.no_grad()
def sample(part: nn.Module) -> np.ndarray:
    parameters = list(part.parameters())
    stride = -(-sum(parameter.numel() for parameter in parameters) // MAX_VALUES)
    chosen = [parameter.detach().flatten()[::stride].float() for parameter in parameters]
    values = torch.cat(chosen)[:MAX_VALUES].cpu().numpy() if chosen else np.zeros(0, dtype=np.float32)
    return values[np.isfinite(values)]
