"""The three tasks, told apart by the keys of their configurations."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import config as classification
from downstream.detection import config as detection
from downstream.segmentation import config as segmentation
from utils.config.errors import ConfigError
from utils.config.schema import Schema, read_source


class TaskConfig(NamedTuple):
    """Keys of a task's configuration, the folder of the project's own, how one is read, and the predict command."""

    schema: Schema
    own: Path
    load: Callable[..., Any]
    predict: str


TASKS = {
    "classification": TaskConfig(
        classification.SCHEMA, classification.OWN, classification.load_config, "python -m utils.predict"
    ),
    "detection": TaskConfig(
        detection.SCHEMA, detection.OWN, detection.load_config, "python -m downstream.detection.predict"
    ),
    "segmentation": TaskConfig(
        segmentation.SCHEMA, segmentation.OWN, segmentation.load_config, "python -m downstream.segmentation.predict"
    ),
}


def task_with_keys(names: Iterable[str]) -> str:
    """Return the task that lacks the fewest of these keys; the first of TASKS where several do."""
    return min(TASKS, key=lambda task: len({*names} - {*TASKS[task].schema}))


def task_of(source: str, opts: Sequence[str] = ()) -> str:
    """Return the task of a configuration: a YAML file by path or name, or YAML text.

    Args:
        source: the file or the text.
        opts: alternating keys and values, as typed after --opts.
    """
    missing = dict.fromkeys(TASKS, math.inf)
    for name, task in TASKS.items():
        with contextlib.suppress(ConfigError):  # which `load` raises again
            keys = {key for key, _, _ in read_source(task.schema, source, task.own)}
            missing[name] = len({*keys, *opts[::2]} - {*task.schema})
    return min(missing, key=missing.__getitem__)
