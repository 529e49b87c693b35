"""Any value of any key, from YAML, --opts and flags, gives a configuration or one line that names key and value."""

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

import config as classification
from downstream.detection import config as detection
from downstream.segmentation import config as segmentation
from main import Classification
from utils.config.errors import ConfigError
from utils.training.derived import derive

TASKS = {"classification": classification, "detection": detection, "segmentation": segmentation}
NUMBERS = [0, 1, 2, 7, -1, 0.5, -0.0, 1e-9, 5e-324, 1e308, -1e308, 2**31, 2**63, 10**400, math.inf, math.nan]
OBJECTS = [
    None,
    True,
    [],
    {},
    [[1]],
    {"A": 1},
    [None],
    [0, 0],
    [1e308, 1e308],
    [1, 2, 3, 4],
    [9] * 10_001,
    b"x",
    object(),
]
TEXTS = [
    "",
    " ",
    "abc",
    "no",
    "\0",
    "é\udce9",
    "x" * 3000,
    "../../x",
    "/",
    "a,b",
    "timm:",
    "rand-n999",
    "1e999",
    "9" * 5000,
]
YAML = [
    "!!bool abc",
    "!!int 'x'",
    "!!timestamp abc",
    "!!set {a}",
    "!!python/name:os",
    "&a [*a]",
    "*a",
    "{",
    "[",
    "=",
    "<<",
]
YAML += [
    "2024-13-45",
    "1_000",
    "1:30",
    "0x" + "f" * 5000,
    "|\n  text",
    "'\\0'",
    "@",
    "`",
    "- 1",
    "? 1",
    "%",
    "~",
    ".inf",
    "{a: 1}",
]
NUM_DRAWS = 3  # values for each key and way of setting it


def outcome(load: Callable[[], Any], key: str) -> Any:
    """Return the configuration, or None after a check of the error's line."""
    error = None
    try:
        return load()
    except ConfigError as caught:
        error = caught
    line = str(error)
    assert "\n" not in line
    assert len(line) < 600
    assert key in line or str(error.key) in line or "not a YAML file: " in line
    return None


def ways(task: Any, key: str, draw: random.Random) -> Iterator[Callable[[], Any]]:
    """Yield functions that load a configuration with a drawn value of a key."""
    named = [] if key == "MODEL.NAME" else ["MODEL.NAME", "x"]  # segmentation has no default
    for value in draw.sample(NUMBERS + OBJECTS + TEXTS, NUM_DRAWS):
        yield partial(task.load_config, "SEED: 0\n", named, flags={key: value})
    for value in draw.sample(NUMBERS[:-3] + OBJECTS[:-1] + TEXTS + YAML, NUM_DRAWS):
        yield partial(task.load_config, "SEED: 0\n", [*named, key, str(value)])
    *sections, leaf = key.split(".")
    start = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(sections)) + "  " * len(sections)
    for text in draw.sample(YAML + TEXTS, NUM_DRAWS):
        yield partial(task.load_config, f"{start}{leaf}: {text}\n", named)


@pytest.mark.parametrize("name", TASKS)
def test_any_value_of_any_key(name: str) -> None:
    task, draw = TASKS[name], random.Random(0)
    accepted = refused = 0
    for key in task.SCHEMA:
        for load in ways(task, key, draw):
            loaded = outcome(load, key)
            accepted += loaded is not None
            refused += loaded is None
            if loaded is not None and name == "classification":
                check_schedule(loaded)
    assert min(accepted, refused) > 50  # both happen


def check_schedule(config: Any) -> None:
    """What a run derives from an accepted configuration is finite."""
    lengths = {"total_epochs": config.TRAIN.EPOCHS, "steps_per_epoch": 1251}
    derived = derive(config, num_processes=8, lr_batch_size=512, ema_batch_size=4096, **lengths)
    assert math.isfinite(Classification().schedule(config, derived).lr_at(0))
