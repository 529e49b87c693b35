"""Shared by the two make_shapes commands: arguments, and a dataset that is written completely or not at all."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from data.errors import DataError, as_data_error
from utils.config.command_line import Parser, at_least


def shapes_parser(description: str | None, *, train: int, val: int) -> Parser:
    """Return a parser with the folder, the seed and the numbers of images, whose defaults are given."""
    parser = Parser(description)
    parser.add_argument("folder", type=Path, help="new or empty folder, or one that holds the same dataset already")
    parser.add_argument("--train", type=at_least(1), default=train, metavar="NUMBER", help="training images")
    parser.add_argument("--val", type=at_least(1), default=val, metavar="NUMBER", help="validation images")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="NUMBER", help="other images for another seed")
    return parser


def write_dataset(
    folder: Path, settings: Mapping[str, object], write: Callable[[Path], None], *, settings_file: str
) -> None:
    """Render a dataset under a temporary name, then rename it; do nothing if the folder holds it already.

    Args:
        settings: what the images follow from.
        write: writes everything, the settings included, into the folder that it is given.
        settings_file: JSON file in the folder that holds the settings, at its top or under "info".

    Raises:
        DataError: the folder holds something else, or cannot be written.
    """
    with as_data_error(folder, "written"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if not holds(folder / settings_file, settings):
                raise DataError(f"{folder}: holds other files already; name a new or empty folder")
            print(f"{folder} holds this dataset already")
            return
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        if folder.exists():
            folder.rmdir()  # empty
        temporary.rename(folder)
    print(f"{folder}: {settings['train']} training and {settings['val']} validation images")


def holds(path: Path, settings: Mapping[str, object]) -> bool:
    """Return whether a JSON file holds just these settings."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("info", content) == settings
