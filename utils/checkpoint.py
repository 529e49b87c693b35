"""Checkpoints: written whole or not at all, found by epoch, read without running code from the file."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from utils.logger import logger

KEEP = 3  # newest epochs kept
UNSAFE = re.compile(r"Unsupported (?:global: GLOBAL|class) (\S+)")
NAME = re.compile(r"ckpt_epoch_(\d+)\.pth")


class CheckpointError(ValueError):
    """A weights file that is missing, cannot be read, or does not fit: one line with the path, cause and remedy."""


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


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint or a weights file to the CPU; nothing in it is executed.

    Raises:
        CheckpointError: no such file, a folder, or not a file that PyTorch can read safely.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a checkpoint file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is not its own, or is cut short
        found = UNSAFE.search(str(error))
        reason = f"it holds a {found[1]}, and such objects could run code" if found else "damaged, or not its format"
        raise CheckpointError(f"{path}: cannot be read as a PyTorch weights file: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not weights by name")
    return content


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
