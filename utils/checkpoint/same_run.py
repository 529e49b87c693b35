"""Whether the run in an output folder is the one that a command describes, or would be continued by mistake."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.checkpoint.weights import MAX_CLASSES_SHOWN, classes_in, listed
from utils.checkpoint.weights_file import CheckpointError
from utils.config.errors import UserError
from utils.config.yaml_file import parse_yaml
from utils.logs.logger import logger

DATA_KEYS = ("DATA.DATASET", "DATA.DATA_PATH")


def settings_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings by dotted key that a run stores in its checkpoints; empty if there are none."""
    text = content.get("config")
    try:
        return parse_yaml(text, "checkpoint") if isinstance(text, str) else {}
    except UserError:
        return {}


def check_same_run(
    content: Mapping[str, Any],
    path: Path,
    settings: Mapping[str, Any],
    *,
    classes: Sequence[str],
    num_train_images: int,
) -> None:
    """Refuse to continue a run with other classes, from other pretrained weights, or on other data.

    Data that only moved, with the same classes and number of images, is accepted.

    Args:
        content: of the run's newest checkpoint.
        path: its file.
        settings: of this command, by dotted key.
        classes: names of the data's classes.
        num_train_images: size of the data's training set.

    Raises:
        CheckpointError: it is another run.
    """
    saved, stored = settings_of(content), classes_in(dict(content))
    is_resumable = stored is None or len(stored) == len(classes)
    difference = ""
    if stored is not None and stored != list(classes):
        difference = f"on other classes, {described(stored)}, where the data has {described(classes)}"
    elif settings["MODEL.PRETRAINED"] and (changed := changed_paths(saved, settings, ("MODEL.PRETRAINED",))):
        difference = f"that started from other weights, {changed}"
    elif changed := changed_paths(saved, settings, DATA_KEYS):
        if content.get("num_train_images") == num_train_images:
            logger.info("the data moved, %s; its classes and number of images are the same", changed)
        else:
            difference = f"on other data, {changed}"
    if difference:
        remedy = f"; to continue that run all the same, --resume {path}" if is_resumable else ""
        raise CheckpointError(f"{path.parent}: contains a run {difference}; for a new run name another --tag{remedy}")


def described(classes: Sequence[str]) -> str:
    return f"{len(classes)} ({listed(classes, MAX_CLASSES_SHOWN)})"


def changed_paths(saved: Mapping[str, Any], settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return "KEY 'old', now 'new'" of those keys whose values differ, also as paths; unknown old values do not."""
    pairs = [(key, saved[key], settings[key]) for key in keys if key in saved and key in settings]
    return " and ".join(f"{key} {a!r}, now {b!r}" for key, a, b in pairs if a != b and not is_same_path(a, b))


def is_same_path(first: str, second: str) -> bool:
    return bool(first and second) and Path(first).resolve() == Path(second).resolve()
