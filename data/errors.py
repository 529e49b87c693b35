"""Errors in datasets and their settings that a user can mend."""

from contextlib import AbstractContextManager
from pathlib import Path

from utils.config.errors import UserError, file_errors


class DataError(UserError):
    """A dataset is damaged, inconsistent or unreadable, or a setting does not fit it."""


class BrokenImageError(DataError, OSError):
    """An image cannot be read or decoded; the message gives the reason."""


def as_data_error(path: str | Path, action: str = "read") -> AbstractContextManager[None]:
    """Raise the system's errors on a file or folder that is read or "written" as DataErrors."""
    return file_errors(DataError, path, action)
