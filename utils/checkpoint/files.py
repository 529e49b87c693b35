"""Checkpoint files of a run: writing them, finding the newest, deleting old ones."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.checkpoint.run_content import check_run_content
from utils.checkpoint.weights_file import CheckpointError, load_checkpoint
from utils.logs.atomic_write import write_atomic
from utils.logs.logger import DETAIL, logger
from utils.logs.output_dir import output_errors, unused_name

KEEP = 3  # newest checkpoints of whole epochs
INDEX = "latest.json"
DELETABLE = "deletable"  # in the index: names of files that this run wrote and deletes when newer ones are there
OWN_KEYS = {"steps", "images_per_step", "ranks", "scaler"}  # in every checkpoint of this project, in no official one
OFFICIAL_KEYS = {"model", "state_dict_ema", "optimizer", "epoch"}
NAME = re.compile(r"ckpt_epoch_(\d+)(?:_step_(\d+))?\.pth")


class Progress(NamedTuple):
    """Progress of a run: complete epochs, and steps of the next one."""

    epochs: int
    steps: int = 0

    @property
    def checkpoint_name(self) -> str:
        """ckpt_epoch_N.pth at the end of epoch N, ckpt_epoch_N_step_S.pth after S steps of it; N counts from 0."""
        return f"ckpt_epoch_{self.epochs}_step_{self.steps}.pth" if self.steps else f"ckpt_epoch_{self.epochs - 1}.pth"


def describe(progress: Progress) -> str:
    """Return the progress with epochs counted from 1, as in the log; the names of checkpoints count from 0."""
    epochs, steps = progress
    return f"after step {steps} of epoch {epochs + 1}" if steps else f"after epoch {epochs}"


def progress_in(content: Mapping[str, Any]) -> Progress:
    """Return the progress stored in a checkpoint.

    "epoch" is the index of the last complete epoch; in files of the official code it is the number of complete epochs.
    """
    return Progress(content["epoch"] + (0 if is_official(content) else 1), content.get("steps", 0))


def is_official(content: Mapping[str, Any]) -> bool:
    """Return whether the official code wrote a run's checkpoint."""
    return content.keys() >= OFFICIAL_KEYS and not OWN_KEYS & content.keys()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, so that the name always holds a complete file.

    Raises:
        OSError, RuntimeError: it cannot be written; the file that had this name is kept.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, torch would write the temporary name into the archive
            torch.save(state, file)

    try:
        write_atomic(path, write)
    except RuntimeError as error:
        # Where a write fails, torch cannot close the archive either, and raises that on top of the reason.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def link_checkpoint(existing: Path, path: Path) -> None:
    """Give a checkpoint a second name: a hard link, or a copy where the file system has no links."""

    def link(temporary: Path) -> None:
        try:
            temporary.hardlink_to(existing)
        except OSError:
            shutil.copyfile(existing, temporary)

    write_atomic(path, link)


def flush_names(folder: Path) -> None:
    """Flush the renames and deletions in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints_in(folder: Path) -> list[tuple[Progress, Path]]:
    """Return (progress, path) of the checkpoints in a folder, the newest first."""
    checkpoints = []
    for path in folder.glob("ckpt_epoch_*.pth"):
        if match := NAME.fullmatch(path.name):
            epoch, steps = int(match[1]), match[2]
            checkpoints.append((Progress(epoch, int(steps)) if steps else Progress(epoch + 1), path))
    return sorted(checkpoints, reverse=True)


def readable_checkpoints(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (path, content) of a folder's checkpoints, the newest first; damaged ones are skipped with a warning."""
    for named, path in checkpoints_in(folder):
        try:
            content = load_checkpoint(path)
            check_run_content(content, path)
            # The official ckpt_epoch_N.pth holds N complete epochs, ours N + 1.
            possible = (named, Progress(named.epochs - 1)) if is_official(content) else (named,)
            if (stored := progress_in(content)) not in possible:
                raise CheckpointError(f"{path}: contains {stored.checkpoint_name}, another than its name says")
        except CheckpointError as error:
            logger.warning("skipped a checkpoint: %s", error)
        else:
            yield path, content


def save_under_names(
    folder: Path, progress: Progress, names: Sequence[str], state: dict[str, Any], *, keep_all: bool = False
) -> None:
    """Write a checkpoint once under several names, note it in the index, then delete this run's old checkpoints.

    Of whole epochs the newest KEEP are kept, or with `keep_all` all; of those within an epoch only the newest of all.
    max_*.pth and files that this run did not write are not touched.
    """
    save_checkpoint(folder / names[0], state)
    for name in names[1:]:
        link_checkpoint(folder / names[0], folder / name)
    old = update_index(folder, progress, keep_all=keep_all) if progress.checkpoint_name in names else []
    flush_names(folder)  # before older ones are deleted
    for path in old:
        path.unlink(missing_ok=True)


def update_index(folder: Path, progress: Progress, *, keep_all: bool) -> list[Path]:
    """Note the newest checkpoint in the index, and return those that are to be deleted now."""
    name = progress.checkpoint_name
    deletable = {*read_index(folder).get(DELETABLE, []), *([] if keep_all and not progress.steps else [name])}
    checkpoints = [(other, path) for other, path in checkpoints_in(folder) if path.name in deletable]
    ends = [path for other, path in checkpoints if not other.steps]
    within = [path for other, path in checkpoints if other.steps and other != progress]
    old = ends[KEEP:] + within
    index = {"checkpoint": name, "epochs": progress.epochs, "steps": progress.steps}
    if kept := [path.name for _, path in checkpoints if path not in old]:
        index[DELETABLE] = kept
    write_atomic(folder / INDEX, lambda path: path.write_text(json.dumps(index) + "\n"))
    return old


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of the index, empty if there is none or it is damaged."""
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def move_replaced_checkpoints(folder: Path, progress: Progress, *, continues: bool, source: str = "") -> None:
    """Move checkpoints that this run will write again, or that cannot be read, to a folder replaced_<n>.

    The official ckpt_epoch_N.pth holds N complete epochs, ours N + 1. If the run resumes from such a file in the
    folder, all are moved, and that one stays under the name that it has here.

    Args:
        folder: the output folder.
        progress: where this run starts; later checkpoints are moved.
        continues: False if the folder's run is replaced by another; its best checkpoints are then linked there too.
        source: file that this run resumes from, if any.

    Raises:
        OutputError: they cannot be moved.
    """
    if not continues:
        with output_errors(folder):
            (folder / INDEX).unlink(missing_ok=True)  # its checkpoints are another run's
    checkpoints = checkpoints_in(folder)
    official_number = Progress(progress.epochs + 1) if progress.epochs else None
    renumbered = [p for other, p in checkpoints if other == official_number and p.resolve() == Path(source).resolve()]
    later = [path for other, path in checkpoints if (renumbered or other > progress) and path not in renumbered]
    best = [] if continues else list(folder.glob("max_*.pth"))
    if not (later or best or renumbered):
        return
    target = unused_name(folder, "replaced_{}")
    with output_errors(folder):
        target.mkdir()
        for path in later:
            path.rename(target / path.name)
        for path in renumbered:  # at every moment one name is there to resume from
            link_checkpoint(path, folder / progress.checkpoint_name)
            path.rename(target / path.name)
        for path in best:
            link_checkpoint(path, target / path.name)
    logger.warning("%s already has checkpoints; what this run replaces is kept in %s", folder, target)


def copy_to_cpu(content: Any) -> Any:
    """Copy the tensors in nested dicts and lists to CPU memory, so that training may change the originals."""
    if isinstance(content, Tensor):
        copy = torch.empty_like(content, device="cpu", pin_memory=content.is_cuda)
        return copy.copy_(content, non_blocking=True)
    if isinstance(content, dict):
        return {key: copy_to_cpu(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(copy_to_cpu, content))
    return content


def version_of(path: Path) -> tuple[int, int] | None:
    """Return what tells one version of a file from another, None if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


class CheckpointWriter:
    """Writes a run's checkpoints: copies the state at once, and writes it in a thread while training continues.

    A checkpoint that cannot be written is an error in the log, the last ones are kept, and `has_failed` is True until
    the next success. A best one (max_*.pth) stays in memory and is written before the next checkpoint, so that whatever
    a run resumes from, its best weights are there.

    Args:
        folder: the run's output folder.
        in_background: False to wait for the disk.
        keep_all: keep the checkpoints of all epochs that are written, not only the newest.
    """

    def __init__(self, folder: Path, *, in_background: bool, keep_all: bool = False) -> None:
        self.folder = folder
        self.in_background = in_background
        self.keep_all = keep_all
        self.thread: threading.Thread | None = None
        self.has_failed = False
        self.unsaved_best: dict[str, dict[str, Any]] = {}  # state by name

    def write(self, progress: Progress, names: Sequence[str], state: dict[str, Any]) -> None:
        """Write a checkpoint, once the last one is done."""
        self.wait()
        if not self.in_background:
            self.save(progress, names, state)
            return
        state = copy_to_cpu(state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        # A daemon, so that Ctrl-C need not wait; it leaves at most a temporary file.
        self.thread = threading.Thread(target=self.save, args=(progress, names, state), name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the last checkpoint is written, or has failed, for at most `timeout` seconds."""
        if self.thread is not None:
            self.thread.join(timeout)

    def save(self, progress: Progress, names: Sequence[str], state: dict[str, Any]) -> None:
        start = time.perf_counter()
        before = version_of(self.folder / names[0])
        try:
            self.save_unsaved_best(names)
            save_under_names(self.folder, progress, names, state, keep_all=self.keep_all)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeErrors of its own for a full disk
            self.has_failed = True
            if best := [name for name in names if name.startswith("max_")]:
                state = state if self.in_background else copy_to_cpu(state)
                self.unsaved_best |= dict.fromkeys(best, state)
            newest = next((path.name for _, path in checkpoints_in(self.folder)), "none")
            others = ", ".join([*names[1:], INDEX])  # links, and a note
            problem = "could not be saved"
            if version_of(self.folder / names[0]) != before:
                problem = f"was saved, but {others} could not be written"
            logger.error(
                "%s %s (%s); the newest checkpoint is %s. Make room in %s, or make it writable",
                *(names[0], problem, getattr(error, "strerror", None) or error, newest, self.folder),
            )
        else:
            if self.has_failed:
                logger.info("%s was saved; saving works again", names[0])
            self.has_failed = False
            self.unsaved_best.clear()
            seconds = time.perf_counter() - start
            logger.info("saved %s (%s) in %.2f s", names[0], describe(progress), seconds, extra=DETAIL)

    def save_unsaved_best(self, names: Sequence[str]) -> None:
        """Write the best checkpoints that could not be written before, without those that `names` replaces."""
        for name in list(self.unsaved_best):
            if name not in names:
                save_checkpoint(self.folder / name, self.unsaved_best[name])
                del self.unsaved_best[name]
