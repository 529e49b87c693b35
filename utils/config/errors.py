"""Errors that a user can mend. The entry point prints them as one line; every other exception keeps its traceback.

This module imports nothing of the project, so that any package may raise them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake in what the user gave: one line that names the key or file, what is allowed, and the remedy."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


class ConfigError(UserError):
    """A mistake in a configuration file, in --opts or in a flag.

    Attributes:
        key: the dotted key at fault, such as "TRAIN.EPOCHS"; None where it is not a single key's.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def shown(value: Any) -> str:
    """Return a value as messages show it: cut to MAX_SHOWN characters."""
    try:
        return cut(repr(value))
    except (RecursionError, ValueError):  # Python refuses to write very long integers
        return f"of type {type(value).__name__}"


def cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


# Parts of the RuntimeErrors that torch raises for memory that it cannot get.
ALLOCATION_ERRORS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Storage size calculation overflowed",
    "integer multiplication overflow",
)
MAX_REASON = 200  # characters
MAX_SHOWN = 80  # characters of a value


def memory_reason(error: BaseException) -> str | None:
    """Return in one line what an error says of memory that ran out; None for other errors."""
    text = str(error)
    if not isinstance(error, MemoryError) and not any(part in text for part in ALLOCATION_ERRORS):
        return None
    last = text.strip().splitlines()[-1:]  # a loader worker's error comes with its traceback
    return last[0][-MAX_REASON:] if last else type(error).__name__


@contextmanager
def file_errors(kind: type[UserError], path: str | Path, action: str, remedy: str = "") -> Iterator[None]:
    """Convert the system's errors on a user's file or folder into one line.

    Args:
        kind: type of the error.
        path: the file, or a folder; then the error names the file in it, if the system does.
        action: "read" or "written".
        remedy: what the user can do, if the reason does not say it.

    Raises:
        kind: the block raised an OSError or a UnicodeDecodeError. A UserError passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        name = getattr(error, "filename", None) if os.path.isdir(path) else None  # noqa: PTH112, since Path.is_dir may raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        end = f"; {remedy}" if remedy else ""
        raise kind(f"{name or path}: cannot be {action}: {reason}{end}") from error
