"""Class names and labels in text files."""

from pathlib import Path

from data.errors import DataError
from utils.config.errors import file_errors

CLASS_FILE = "classes.txt"
MAX_CLASSES = 1_000_000  # larger labels are mistakes, and lists of that many names would fill the memory


def read_lines(path: Path, remedy: str = "") -> list[str]:
    """Return the lines of a text file, without a byte order mark.

    Bytes that are not UTF-8 are kept, as Python keeps those in file names.

    Raises:
        DataError: the file cannot be read, or is a pipe or a device, which may have no end.
    """
    with file_errors(DataError, path, "read", remedy):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DataError(f"{path}: is a pipe or a device; name a file")
        text = path.read_text(encoding="utf-8", errors="surrogateescape").removeprefix("\ufeff")
    return text.splitlines()


def check_label(label: int, where: str) -> int:
    """Return a label.

    Raises:
        DataError: it is no number of a class.
    """
    if not 0 <= label < MAX_CLASSES:
        raise DataError(f"{where}: label {label} is not the number of a class; labels count from 0")
    return label


def class_names(folder: Path, count: int) -> list[str]:
    """Return the lines of classes.txt if it exists, except blank ones, else the numbers below `count`."""
    if (path := folder / CLASS_FILE).is_file():
        names = [line.strip() for line in read_lines(path) if line.strip()]
        if len(names) < count:
            raise DataError(f"{path}: {len(names)} names for {count} classes; it needs a line for each class")
        return names
    return [str(label) for label in range(count)]
