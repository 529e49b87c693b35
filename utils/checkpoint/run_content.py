"""Check of everything that a run's checkpoint holds, before any of it is used.

A file may hold anything: of another program, cut by a disk, or edited. Native code trusts sizes and memory layouts, so
a misfit there would not be an error but a crash.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.checkpoint.rng import check_rng_state
from utils.checkpoint.weight_sets import NUMBERS, find_weight_sets
from utils.checkpoint.weights_file import CheckpointError

REQUIRED = ("optimizer", "epoch")
MAX_COUNT = 10**12  # epochs, steps and images of any run
SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that no run can have written, or not completely: automatic resuming skips it."""


def check_run_content(content: Mapping[str, Any], source: str | Path) -> None:
    """Check types and ranges in a run's checkpoint, as far as they do not depend on the model.

    Raises:
        DamagedCheckpointError: names the first entry that is missing, or is not what it must be.
    """

    def require(is_right: bool, problem: str) -> None:
        if not is_right:
            raise DamagedCheckpointError(f"{source}: not a complete checkpoint of a run ({problem})")

    for key in REQUIRED:
        require(key in content, f"no {key}")
    require(is_state_dict(find_weight_sets(content).model), "no weights of the model")
    for key, (expected, is_right) in ENTRIES.items():
        if key in content:
            require(holds(is_right, content[key]), f"{key} is {described(content[key])}, not {expected}")


def holds(is_right: Callable[[Any], object], value: Any) -> bool:
    """Return whether a check passes; any exception means that it does not."""
    try:
        return bool(is_right(value))
    except Exception:
        return False


def described(value: Any) -> str:
    """Return a value for a message: short ones in full, others by their type."""
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= 40 else f"{text[:40]}..."
    return f"a {type(value).__name__} with other content"


def is_count(value: Any, *, least: int = 0) -> bool:
    return type(value) is int and least <= value <= MAX_COUNT


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def is_finite_scalar(value: Any) -> bool:
    """Return whether this is a finite number, or a tensor of one."""
    return is_finite(value.item() if is_dense(value) and value.numel() == 1 else value)


def is_dense(value: Any) -> bool:
    """Return whether this is a tensor with values in CPU memory, not on the meta device, sparse or quantized."""
    return isinstance(value, Tensor) and value.layout is torch.strided and value.is_cpu and not value.is_quantized


def is_state_dict(value: Any) -> bool:
    return bool(value) and all(isinstance(name, str) and is_dense(tensor) for name, tensor in value.items())


def is_optimizer_state(value: Any) -> bool:
    groups, state = value["param_groups"], value["state"]
    ids = [number for group in groups for number in group["params"]]
    are_ids = all(type(number) is int for number in [*ids, *state]) and len(set(ids)) == len(ids)
    return bool(ids) and are_ids and all(map(is_entry, state.values()))


def is_entry(value: dict[str, Any]) -> bool:
    """Return whether this can be an optimizer's state of one parameter; shapes are compared with the model later."""
    step = value.get("step", 0)
    tensors = [tensor for tensor in value.values() if isinstance(tensor, Tensor)]
    are_numbers = all(is_dense(tensor) and tensor.dtype in NUMBERS for tensor in tensors)
    return is_finite_scalar(step) and float(step) >= 0 and are_numbers


def is_scaler_state(value: Any) -> bool:
    return not value or (
        set(value) == SCALER_KEYS
        and all(map(is_finite, value.values()))
        and value["scale"] > 0
        and is_count(value["growth_interval"], least=1)
        and is_count(value["_growth_tracker"])
    )


def is_rank(value: Any) -> bool:
    check_rng_state(value["rng"])
    return all(isinstance(name, str) and is_finite(number) for name, number in value["sums"].items())


def is_metadata(value: dict[str, Any]) -> bool:
    return all(isinstance(key, str) and isinstance(item, str | int | None) for key, item in value.items())


# By key of a checkpoint: what it holds, and whether a value is that.
ENTRIES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "state_dict_ema": ("weights by name, or None", lambda value: value is None or is_state_dict(value)),
    "optimizer": ("the state of an optimizer", is_optimizer_state),
    "scaler": ("the state of a gradient scaler", is_scaler_state),
    "epoch": ("a number of epochs", lambda value: is_count(value, least=-1)),
    "steps": ("a number of steps", is_count),
    "images_per_step": ("a number of images", lambda value: is_count(value, least=1)),
    "num_train_images": ("a number of images", lambda value: is_count(value, least=1)),
    "max_accuracy": ("a finite number", is_finite_scalar),
    "max_accuracy_e": ("a finite number", is_finite_scalar),
    "best_epochs": (
        "epochs of the model and the EMA",
        lambda value: set(value) <= {"model", "EMA"} and all(is_count(number, least=1) for number in value.values()),
    ),
    "scores": (
        "scores of the model and the EMA",
        lambda value: not value or (set(value) == {"model", "EMA"} and all(map(is_number, value.values()))),
    ),
    "ranks": ("a list of states of processes", lambda value: isinstance(value, list) and all(map(is_rank, value))),
    "origin": ("the origin of a run, or None", lambda value: value is None or is_metadata(value)),
    "versions": ("versions by name", is_metadata),
}
