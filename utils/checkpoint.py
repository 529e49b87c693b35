"""Checkpoints: written whole or not at all, and found by epoch."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from utils.logger import logger
from utils.weights_file import CheckpointError, load_checkpoint

KEEP = 3  # newest epochs kept
NAME = re.compile(r"ckpt_epoch_(\d+)\.pth")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write under a temporary name in the same folder, flush to disk, rename: the name always holds a whole file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def link_checkpoint(existing: Path, path: Path) -> None:
    """Give a checkpoint a second name without writing it again, or copy it where the disk knows no links."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(existing)
    except OSError:
        shutil.copyfile(existing, temporary)
    temporary.replace(path)


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """(epoch, path) of the checkpoints in a folder, the highest epoch first."""
    found = [(int(match[1]), path) for path in folder.glob("ckpt_epoch_*.pth") if (match := NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def load_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint of the highest epoch that can be read, or None where there is none; says which it passed over."""
    for _, path in checkpoints_in(folder):
        try:
            content = load_checkpoint(path)
            if not {"model", "optimizer", "epoch"} <= content.keys():
                raise CheckpointError(f"{path}: is not a checkpoint of a run")
            return path, content
        except CheckpointError as error:
            logger.warning("skipped a checkpoint: %s", error)
    return None


def checkpoint_name(epoch: int) -> str:
    return f"ckpt_epoch_{epoch}.pth"


def save_under_names(folder: Path, names: Sequence[str], state: dict[str, Any]) -> None:
    """Write a checkpoint once, give it all the names, then delete the epochs that are no longer kept."""
    save_checkpoint(folder / names[0], state)
    for name in names[1:]:
        link_checkpoint(folder / names[0], folder / name)
    delete_old_checkpoints(folder)


def delete_old_checkpoints(folder: Path) -> None:
    """Delete all but the newest KEEP checkpoints; max_acc.pth and max_ema_acc.pth are not touched."""
    for _, path in checkpoints_in(folder)[KEEP:]:
        path.unlink()
