"""What the folder of a run says of it, while it goes on or afterwards: figures by epoch, and configuration."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.config.yaml_file import read_yaml
from utils.logs.plots import Panel
from utils.logs.recorder import read_records

# Figures of all tasks in the order in which they are shown, model and average in one diagram.
SHOWN = {
    "acc1": "validation top-1 accuracy, %",
    "box_AP": "validation box AP, %",
    "mask_AP": "validation mask AP, %",
    "miou": "validation mean IoU, %",
    "pixel_accuracy": "validation pixel accuracy, %",
    "train_loss": "training loss",
    "loss": "validation loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "images_per_second": "images a second in training",
}
NEITHER_BEST = {"step", "steps", "lr", "grad_norm", "memory_mib", "images_per_second"}


class OutputDirError(ValueError):
    """A folder that holds no run, or none that can be read: one line with the remedy."""


class RunMetrics(NamedTuple):
    """A run: a record an epoch with the numbers of metrics.jsonl and speed.jsonl, and its settings by dotted key."""

    folder: Path
    records: list[dict[str, Any]]
    config: dict[str, Any]

    @property
    def planned_epochs(self) -> int | None:
        """Evaluations until its end, where its configuration says it."""
        if "TRAIN.EVAL_STEPS" in self.config:
            return int(self.config["TRAIN.STEPS"] // self.config["TRAIN.EVAL_STEPS"])
        if "TRAIN.EPOCHS" in self.config:
            return int(self.config["TRAIN.EPOCHS"] + self.config.get("TRAIN.COOLDOWN_EPOCHS", 0))
        return None


class Extremes(NamedTuple):
    """A figure's best value, the epoch (from 1) where it had it first, and its last; best is None where none is."""

    best: float | None
    best_epoch: int | None
    last: float


def read_run(folder: Path) -> RunMetrics:
    """Lines that are cut short, as by a run that writes them now, are left out; of an epoch's lines the last counts.

    Raises:
        OutputDirError: no figures there, or none yet.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        inside = [str(found.parent) for found in sorted(folder.glob("**/metrics.jsonl"))[:3]]
        hint = f"in it are {', '.join(inside)}" if inside else "name the folder of a run, <output>/<MODEL.NAME>/<tag>"
        raise OutputDirError(f"{folder}: holds no metrics.jsonl; {hint}")
    records: dict[int, dict[str, Any]] = {}
    for record in read_records(path):
        if isinstance(record["epoch"], int):
            records[record["epoch"]] = numbers_in(record)
    if not records:
        raise OutputDirError(f"{path}: no epoch is complete yet")
    for record in read_records(folder / "speed.jsonl"):
        if record["epoch"] in records:
            records[record["epoch"]] |= numbers_in(record)
    config = folder / "config.yaml"
    return RunMetrics(
        folder, [records[epoch] for epoch in sorted(records)], read_yaml(config) if config.is_file() else {}
    )


def numbers_in(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if type(value) in (int, float)}


def names_in(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the figures, in the order of their first appearance."""
    return list({name: None for record in records for name in record if name != "epoch"})


def panels_of(names: Sequence[str], keys: Sequence[str] = ()) -> list[Panel]:
    """Diagrams of `keys`, or of what is SHOWN, as far as `names` holds them; each with the average's curve."""
    panels = []
    for key in keys or SHOWN:
        curves = {name: label for name, label in ((key, "model"), (f"ema_{key}", "EMA")) if name in names}
        if curves:
            panels.append(Panel(SHOWN.get(key, key), curves))
    return panels


def extremes(records: Sequence[Mapping[str, Any]], name: str) -> Extremes | None:
    """Of a figure; lower is better of losses, higher of scores. None where it has no finite value."""
    found = [(record[name], record["epoch"] + 1) for record in records if math.isfinite(record.get(name, math.nan))]
    if not found:
        return None
    last = found[-1][0]
    if name in NEITHER_BEST or name.endswith("seconds"):
        return Extremes(None, None, last)
    sign = 1 if is_loss(name) else -1
    best, epoch = min(found, key=lambda pair: sign * pair[0])
    return Extremes(best, epoch, last)


def is_loss(name: str) -> bool:
    return name.endswith("loss") or (name.startswith("train_") and not name.endswith("_seconds"))


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Keys whose values are not the same in all configurations, with the values; "" where a key is missing."""
    for name in sorted({name for config in configs for name in config}):
        values = [config.get(name, "") for config in configs]
        if any(value != values[0] for value in values):
            yield name, values
