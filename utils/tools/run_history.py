"""Metrics by epoch and configuration of a run, read from its folder during the run or afterwards."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.checkpoint.best_weights import is_new_best
from utils.config.errors import UserError
from utils.config.yaml_file import read_yaml
from utils.logs.plots import Panel
from utils.logs.recorder import read_records
from utils.tools.user_files import user_file

# Metrics of all tasks in the order of their plots; the model and its EMA share a plot.
METRIC_TITLES = {
    "acc1": "validation top-1 accuracy, %",
    "box_AP": "validation box AP, %",
    "mask_AP": "validation mask AP, %",
    "miou": "validation mean IoU, %",
    "pixel_accuracy": "validation pixel accuracy, %",
    "train_loss": "training loss",
    "loss": "validation loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "images_per_second": "images per second in training",
}
WITHOUT_BEST = {"step", "steps", "lr", "grad_norm", "memory_mib", "images_per_second"}


class RunFolderError(UserError):
    """A folder that holds no run, or metrics that the runs do not have."""


class RunMetrics(NamedTuple):
    """One record per epoch with the numbers of metrics.jsonl and speed.jsonl, and the settings by dotted key."""

    folder: Path
    records: list[dict[str, Any]]
    config: dict[str, Any]

    @property
    def metric(self) -> str:
        """Key of the score that tells which weights are better."""
        return next((key for key in ("box_AP", "miou") if key in self.records[-1]), "acc1")

    @property
    def planned_epochs(self) -> int | None:
        """Number of evaluations in the whole run, if its configuration is known."""
        if "TRAIN.EVAL_STEPS" in self.config:
            return int(self.config["TRAIN.STEPS"] // self.config["TRAIN.EVAL_STEPS"])
        if "TRAIN.EPOCHS" in self.config:
            return int(self.config["TRAIN.EPOCHS"] + self.config.get("TRAIN.COOLDOWN_EPOCHS", 0))
        return None


class BestAndLast(NamedTuple):
    """A metric's best value, the last epoch (from 1) that reached it, as in max_*.pth, and its last value.

    `best` and `best_epoch` are None for metrics without a best value, such as the learning rate.
    """

    best: float | None
    best_epoch: int | None
    last: float


def read_run(folder: Path) -> RunMetrics:
    """Read a run, finished or not.

    Incomplete lines, of a run that is being written, are skipped; the last line of an epoch counts.

    Raises:
        RunFolderError: the folder holds no metrics, or none yet.
        UserFileError: a file in it cannot be read.
        ConfigError: config.yaml is not a YAML file of sections and keys.
    """
    path = folder / "metrics.jsonl"
    records: dict[int, dict[str, Any]] = {}
    with user_file(folder, "read"):
        if not path.is_file():
            runs = [str(file.parent) for file in sorted(folder.glob("**/metrics.jsonl"))[:3]]
            hint = f"in it are {', '.join(runs)}" if runs else "name the folder of a run, <output>/<MODEL.NAME>/<tag>"
            raise RunFolderError(f"{folder}: holds no metrics.jsonl; {hint}")
        for record in read_records(path):
            if isinstance(record["epoch"], int):
                records[record["epoch"]] = numbers_in(record)
        if not records:
            raise RunFolderError(f"{path}: no epoch is complete yet")
        for record in read_records(folder / "speed.jsonl"):
            if record["epoch"] in records:
                records[record["epoch"]] |= numbers_in(record)
        config = folder / "config.yaml"
        return RunMetrics(
            folder, [records[epoch] for epoch in sorted(records)], read_yaml(config) if config.is_file() else {}
        )


def numbers_in(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if type(value) in (int, float)}


def metric_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of all metrics, in the order of their first appearance."""
    return list({name: None for record in records for name in record if name != "epoch"})


def select_panels(names: Sequence[str], keys: Sequence[str] = ()) -> list[Panel]:
    """Return one plot for each of `keys` (by default of METRIC_TITLES) that is in `names`, with the EMA's curve."""
    panels = []
    for key in keys or METRIC_TITLES:
        curves = {name: label for name, label in ((key, "model"), (f"ema_{key}", "EMA")) if name in names}
        if curves:
            title = METRIC_TITLES.get(key, key)
            panels.append(Panel(title, curves, is_score=title.endswith("%")))
    return panels


def best_and_last(records: Sequence[Mapping[str, Any]], name: str) -> BestAndLast | None:
    """Return a metric's best (lowest loss, highest score) and last value, or None if no value is finite."""
    values = [(record[name], record["epoch"] + 1) for record in records if math.isfinite(record.get(name, math.nan))]
    if not values:
        return None
    last = values[-1][0]
    if name in WITHOUT_BEST or name.endswith("seconds"):
        return BestAndLast(None, None, last)
    sign = -1 if is_loss(name) else 1
    best, epoch = values[0]
    for value, number in values[1:]:
        if is_new_best(sign * value, sign * best):
            best, epoch = value, number
    return BestAndLast(best, epoch, last)


def is_loss(name: str) -> bool:
    return name.endswith("loss") or (name.startswith("train_") and not name.endswith("_seconds"))


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the keys whose values differ between configurations, with the values; "" where a key is missing."""
    for name in sorted({name for config in configs for name in config}):
        values = [config.get(name, "") for config in configs]
        if any(value != values[0] for value in values):
            yield name, values
