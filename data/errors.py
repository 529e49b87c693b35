"""Errors in datasets and their settings that a user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.config.errors import UserError


class DataError(UserError):
    """A dataset is damaged, inconsistent or unreadable, or a setting does not fit it."""


class BrokenImageError(DataError, OSError):
    """An image cannot be read or decoded; the message gives the reason."""


@contextmanager
def as_data_error(path: str | Path) -> Iterator[None]:
    """Turn the operating system's error on a user's file or folder into a DataError that names it.

    Raises:
        DataError: the block raised an OSError, or a UnicodeDecodeError. A UserError passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
