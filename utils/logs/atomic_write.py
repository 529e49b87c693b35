"""Files that are either complete or absent, and additions to files likewise."""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

LEFTOVER = re.compile(r".+\.\d+\.tmp")  # name of a file that a killed process was writing


def write_atomic(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write to a temporary file in the target's folder, flush it to the disk, and rename it to the target.

    The file's mode follows the umask, also where `write` makes a file that its owner alone may read. A process that is
    killed leaves the temporary file, <name>.<pid>.tmp, and the target as it was.

    Raises:
        OSError: the file cannot be written; the temporary file is deleted.
    """
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()  # raises an OSError where libraries raise errors of their own
        mode = temporary.stat().st_mode
        temporary.unlink()
        write(temporary)
        written = temporary.stat()
        if written.st_mode != mode and written.st_nlink == 1:  # a link's other name keeps its mode
            temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def append_atomic(path: Path, content: bytes) -> None:
    """Append to a file, which is made if it is missing, either the whole content or, on a full disk, nothing.

    Raises:
        OSError: the file cannot be written; it is as it was.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(content)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise
