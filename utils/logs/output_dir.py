"""A run's output folder: its lock and its configuration."""

import os
import socket
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from types import TracebackType

from filelock import BaseFileLock, FileLock, Timeout

from utils.config.errors import UserError, file_errors
from utils.config.yaml_file import read_yaml
from utils.logs.atomic_write import LEFTOVER, write_atomic
from utils.logs.logger import logger, start_logging

LOCK_SECONDS = 10.0  # how long to wait for a run that is about to end


class OutputError(UserError):
    """The output folder cannot be written, or another run uses it."""


def output_errors(folder: Path) -> AbstractContextManager[None]:
    """Raise the system's errors on the output folder as OutputErrors."""
    return file_errors(OutputError, folder, "written", "make room there, or change OUTPUT (--output)")


def open_output_dir(output: str, name: str, tag: str, *, rank: int) -> Path:
    """Make <output>/<name>/<tag> and start this process's log in it.

    Raises:
        OutputError: it cannot be made or written, or its path is not UTF-8.
    """
    folder = Path(output) / name / tag
    if os.fsencode(folder.absolute()).decode("utf-8", "replace") != str(folder.absolute()):
        raise OutputError(f"{folder}: TensorBoard cannot write to a path that is not UTF-8; change OUTPUT (--output)")
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        start_logging(folder, rank)
    return folder


class OutputLock:
    """Lock of this process on an output folder, held until its context ends, or the process however that ends.

    Args:
        folder: the output folder.
        lock: on run.lock in it, held.
    """

    def __init__(self, folder: Path, lock: BaseFileLock) -> None:
        self.folder = folder
        self.path = Path(lock.lock_file)
        self.lock = lock
        self.identity = self.identity_of_file()

    def __enter__(self) -> "OutputLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.release()

    def identity_of_file(self) -> tuple[int, int] | None:
        """Return what identifies the file at the lock's path, which changes with a new file; None without one."""
        try:
            stat = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return stat.st_dev, stat.st_ino

    def check(self) -> None:
        """Check that the file is the one that is locked: of another or none another run may hold the lock.

        Raises:
            OutputError: it was deleted or replaced, or the folder was moved away.
        """
        with output_errors(self.folder):
            if self.identity_of_file() != self.identity:
                raise OutputError(
                    f"{self.path}: was deleted or moved away while this run held it, so another run may write there "
                    f"now; this run ends without writing. Its checkpoints are where the folder is now"
                )


def lock_output_dir(folder: Path) -> OutputLock:
    """Lock an output folder against a second run, and delete what a killed run left unfinished in it.

    The holder is named in a file of its own, since filelock may truncate run.lock when another process tries to lock.

    Returns:
        The lock, already held; leaving its context releases it.

    Raises:
        OutputError: another run holds it, and still does after LOCK_SECONDS, or the folder cannot be written.
    """
    holder = folder / "run_holder.txt"
    with output_errors(folder):
        try:
            lock = FileLock(folder / "run.lock").acquire(LOCK_SECONDS, 0.2).lock
        except Timeout as error:
            name = holder.read_text().strip() if holder.is_file() else "another process"
            raise OutputError(f"{folder}: a run writes here already, {name}; stop it, or use another --tag") from error
        holder.write_text(f"pid {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        for leftover in folder.glob("*.tmp"):
            if LEFTOVER.fullmatch(leftover.name) and leftover.is_file():
                leftover.unlink()
    return OutputLock(folder, lock)


def save_config(folder: Path, text: str) -> None:
    """Write config.yaml, which --cfg can read again; a different one that is there already is renamed.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / "config.yaml"
    with output_errors(folder):
        backup = None
        if path.exists() and path.read_bytes() != text.encode():
            backup = path.rename(unused_name(folder, "config_{}.yaml"))
        write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    if backup:
        logger.warning(
            "the configuration changed; the previous one is kept as %s: %s", backup, differences(backup, path)
        )


def differences(previous: Path, current: Path) -> str:
    """Return the differences of two configuration files as "SECTION.KEY previous -> current; ..."."""
    try:
        old, new = read_yaml(previous), read_yaml(current)
    except UserError:  # damaged by hand or by the disk
        return "the previous one cannot be read"
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return "; ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in changed)


def unused_name(folder: Path, pattern: str) -> Path:
    """Return the first of pattern.format(1), pattern.format(2), ... that does not exist."""
    number = 1
    while (path := folder / pattern.format(number)).exists():
        number += 1
    return path
