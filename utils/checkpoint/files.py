"""Checkpoints: written whole or not at all, and found by progress."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.checkpoint.weights_file import CheckpointError, load_checkpoint
from utils.logs.logger import logger

KEEP = 3  # newest ends of epochs kept
INDEX = "latest.json"
NAME = re.compile(r"ckpt_epoch_(\d+)(?:_step_(\d+))?\.pth")


class Progress(NamedTuple):
    """How far a run is: whole epochs, and steps of the one after them."""

    epochs: int
    steps: int = 0

    @property
    def checkpoint_name(self) -> str:
        """ckpt_epoch_N.pth at the end of epoch N, ckpt_epoch_N_step_S.pth after S steps in it; N counts from 0."""
        return f"ckpt_epoch_{self.epochs}_step_{self.steps}.pth" if self.steps else f"ckpt_epoch_{self.epochs - 1}.pth"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write under a temporary name in the same folder, flush to disk, rename: the name always holds a whole file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # Where a write failed, torch's closing of the archive fails too, and hides the reason.
        reason = error.__context__ if isinstance(error, RuntimeError) else None
        raise reason if isinstance(reason, OSError) else error from None
    temporary.replace(path)
    flush_names(path.parent)


def flush_names(folder: Path) -> None:
    """Bring renames and deletions in a folder to the disk, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_checkpoint(existing: Path, path: Path) -> None:
    """Give a checkpoint a second name without writing it again, or copy it where the disk knows no links."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(existing)
    except OSError:
        shutil.copyfile(existing, temporary)
    temporary.replace(path)


def checkpoints_in(folder: Path) -> list[tuple[Progress, Path]]:
    """(progress, path) of the checkpoints in a folder, the furthest first."""
    found = []
    for path in folder.glob("ckpt_epoch_*.pth"):
        if match := NAME.fullmatch(path.name):
            epoch, steps = int(match[1]), match[2]
            found.append((Progress(epoch, int(steps)) if steps else Progress(epoch + 1), path))
    return sorted(found, reverse=True)


def load_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The furthest checkpoint that can be read, or None where there is none; says which it passed over."""
    for _, path in checkpoints_in(folder):
        try:
            content = load_checkpoint(path)
            if not {"model", "optimizer", "epoch"} <= content.keys():
                raise CheckpointError(f"{path}: is not a checkpoint of a run")
            return path, content
        except CheckpointError as error:
            logger.warning("skipped a checkpoint: %s", error)
    return None


def save_under_names(folder: Path, progress: Progress, names: Sequence[str], state: dict[str, Any]) -> None:
    """Write a checkpoint once, give it all the names, note it in the index, then delete those that are not kept."""
    save_checkpoint(folder / names[0], state)
    for name in names[1:]:
        link_checkpoint(folder / names[0], folder / name)
    if progress.checkpoint_name in names:
        temporary = folder / (INDEX + ".tmp")
        facts = {"checkpoint": progress.checkpoint_name, "epochs": progress.epochs, "steps": progress.steps}
        temporary.write_text(json.dumps(facts) + "\n")
        temporary.replace(folder / INDEX)
    flush_names(folder)
    delete_old_checkpoints(folder)


def delete_old_checkpoints(folder: Path) -> None:
    """Delete all but the newest KEEP ends of epochs, and what was saved within epochs before the newest checkpoint;
    max_*.pth are not touched.
    """
    found = checkpoints_in(folder)
    ends = [path for progress, path in found if not progress.steps]
    within = [path for progress, path in found[1:] if progress.steps]
    for path in ends[KEEP:] + within:
        path.unlink(missing_ok=True)


def copy_to_cpu(content: Any) -> Any:
    """Nested dicts and lists with their tensors copied to the CPU's memory, so that training may change them."""
    if isinstance(content, Tensor):
        copy = torch.empty_like(content, device="cpu", pin_memory=content.is_cuda)
        return copy.copy_(content, non_blocking=True)
    if isinstance(content, dict):
        return {key: copy_to_cpu(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(copy_to_cpu, content))
    return content


class CheckpointWriter:
    """Writes a run's checkpoints: a copy is made at once, a thread brings it to the disk while training goes on.

    Where one cannot be written, the former ones stay, the log says so, and `has_failed` is True until one can be.

    Args:
        folder: the run's.
        in_background: False to wait for the disk.
    """

    def __init__(self, folder: Path, *, in_background: bool) -> None:
        self.folder = folder
        self.in_background = in_background
        self.thread: threading.Thread | None = None
        self.has_failed = False

    def write(self, progress: Progress, names: Sequence[str], state: dict[str, Any]) -> None:
        """Write a checkpoint, after the one before it is done."""
        self.wait()
        if not self.in_background:
            self.bring_to_disk(progress, names, state)
            return
        state = copy_to_cpu(state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        # A daemon, so that Ctrl-C need not wait; what it leaves half written is under a temporary name.
        self.thread = threading.Thread(
            target=self.bring_to_disk, args=(progress, names, state), name="checkpoint", daemon=True
        )
        self.thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk, or has failed to get there."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def bring_to_disk(self, progress: Progress, names: Sequence[str], state: dict[str, Any]) -> None:
        start = time.perf_counter()
        try:
            save_under_names(self.folder, progress, names, state)
        except (OSError, RuntimeError) as error:  # torch.save has RuntimeErrors of its own for a full disk
            self.has_failed = True
            newest = next((path.name for _, path in checkpoints_in(self.folder)), "none")
            logger.error(
                "%s could not be saved (%s); the newest checkpoint is %s. Make room in %s, or make it writable",
                *(names[0], getattr(error, "strerror", None) or error, newest, self.folder),
            )
        else:
            if self.has_failed:
                logger.info("%s was saved, saving works again", names[0])
            self.has_failed = False
            logger.info("saved %s in %.2f s", names[0], time.perf_counter() - start)
