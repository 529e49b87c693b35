"""Files that a command reads and writes: checked before the work begins; a system error becomes one line."""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from utils.config.errors import UserError, file_errors
from utils.logs.atomic_write import write_atomic


class UserFileError(UserError):
    """A file or folder that the user named and that cannot be read or written."""


def user_file(path: Path, action: str) -> AbstractContextManager[None]:
    """Raise the system's errors on a file or folder that is "read" or "written" as UserFileErrors."""
    return file_errors(UserFileError, path, action)


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
    with user_file(target, "written"):
        if not target.parent.is_dir():
            raise UserFileError(f"{target}: there is no folder {target.parent}")
        refuse_special(target)
        if not target.exists() or (force and target.is_file()):
            return
        is_own = bool(creator) and target.is_file() and creator.encode() in target.read_bytes()
    if not is_own:
        raise UserFileError(f"{target}: already exists; name another file, or replace it with --force")


def refuse_special(path: Path) -> None:
    """Raise UserFileError for a device, a pipe or a socket, in whose place a file would be put."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserFileError(f"{path}: is a device, a pipe or a socket; name a file")


def write_result(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file that the user named, atomically; of a link the file that it leads to.

    Raises:
        UserFileError: it cannot be written.
    """
    with user_file(target, "written"):
        write_atomic(Path(os.path.realpath(target)), write)


def check_results(paths: Sequence[Path], *, inputs: Collection[Path] = (), force: bool) -> None:
    """Check that a command may write these files into a folder of results, which need not exist.

    Args:
        paths: of the files.
        inputs: files that the command reads, which it never replaces.
        force: replace files that exist.

    Raises:
        UserFileError: a file exists, a folder of its path is a file, or it cannot be looked for.
    """
    read = {path.resolve() for path in inputs}
    for path in paths:
        with user_file(path, "written"):
            if path.resolve() in read:
                raise UserFileError(f"{path}: is one of the images that are read; name another folder with --output")
            refuse_special(path)
            if path.exists() and not (force and path.is_file()):
                raise UserFileError(f"{path}: already exists; name another --output, or replace it with --force")
            above = next(folder for folder in path.parents if folder.exists())
            if not above.is_dir():
                raise UserFileError(f"{above}: is a file; name a folder with --output")
