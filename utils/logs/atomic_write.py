"""Files that are there whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_atomic(target: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, flush to disk, rename."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(target: Path, creator: str, *, force: bool) -> None:
    """Whether a command may write its result there: over nothing, over its own former result, or with --force.

    Args:
        creator: what the command writes into its files, to know them by.

    Raises:
        OSError: it may not, or there is no folder for it.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: there is no folder {target.parent}")
    if target.is_dir() or (target.exists() and not force and creator.encode() not in target.read_bytes()):
        raise FileExistsError(f"{target}: is there already; name another file, or replace it with --force")
