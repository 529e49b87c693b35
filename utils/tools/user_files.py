"""Files that a command reads and writes: checked before the work begins; a system error becomes one line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from utils.config.errors import UserError


class UserFileError(UserError):
    """A file or folder that the user named and that cannot be read or written."""


@contextmanager
def user_file(path: Path, action: str) -> Iterator[None]:
    """Convert system errors on a user's file; `action` is "read" or "written".

    Raises:
        UserFileError: the file, what failed, and the system's reason.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        name = error.filename if path.is_dir() and error.filename else path  # which file in the folder
        raise UserFileError(f"{name}: cannot be {action}: {error.strerror or error}") from error


def check_output(target: Path, *, suffixes: Sequence[str] = (), force: bool, creator: str = "") -> None:
    """Check that a command may write its result to a file.

    Args:
        suffixes: allowed ends of the file name; none: any.
        force: replace a file that exists.
        creator: what the command writes into its own files, which it replaces without `force`.

    Raises:
        UserFileError: wrong suffix, no folder for the file, or an existing file.
    """
    if suffixes and target.suffix not in suffixes:
        allowed = " or ".join(filter(None, [", ".join(suffixes[:-1]), suffixes[-1]]))
        raise UserFileError(f"{target}: the file name must end in {allowed}")
    if not target.parent.is_dir():
        raise UserFileError(f"{target}: there is no folder {target.parent}")
    if not target.exists() or (force and target.is_file()):
        return
    with user_file(target, "read"):
        is_own = bool(creator) and target.is_file() and creator.encode() in target.read_bytes()
    if not is_own:
        raise UserFileError(f"{target}: already exists; name another file, or replace it with --force")
