"""Image files by name, of a dataset or for a predict command, and the files that the command writes."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data.errors import BrokenImageError, DataError, as_data_error
from data.sources.file_tree import find_files
from utils.config.errors import MissingFileError
from utils.logs.logger import logger
from utils.tools.user_files import check_results

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def files_by_name(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return the files below a folder by their path in it without suffix.

    Raises:
        MissingFileError: there is no such folder.
        DataError: the folder holds no such files, or two of one name.
    """
    with as_data_error(folder):
        if not folder.is_dir():
            raise MissingFileError(f"{folder}: no such folder; downstream/segmentation/README.md shows what is needed")
        tree = find_files(folder, tuple(suffixes))
    if tree.dangling:
        raise MissingFileError(
            f"{folder}: dangling links, {len(tree.dangling)} in all, such as {tree.dangling[0]}; mend or remove them"
        )
    files: dict[str, Path] = {}
    for path in tree.paths:
        name = os.path.splitext(path)[0]  # noqa: PTH122, a Path would change names such as "a/./b"
        if name in files:
            raise DataError(f"{folder / path}: {files[name].name} has the same name; each image needs its own")
        files[name] = folder / path
    if tree.left_out:
        logger.warning("%s: left out: %s", folder, tree.describe_left_out())
    if not files:
        raise DataError(f"{folder}: no files that end in {', '.join(suffixes)}")
    return files


def plan_results(
    sources: Sequence[Path], output: Path, endings: Sequence[str], *, others: Sequence[str] = (), force: bool
) -> dict[Path, Path]:
    """Return the images by path, each with the path of its results without their endings.

    Args:
        sources: image files, or folders of them, whose subfolders the results keep.
        output: folder of the results.
        endings: what follows an image's name in the names of its results.
        others: names of further files that will be written.
        force: replace results that exist, but never an image that is read.

    Raises:
        MissingFileError: there is no such image.
        DataError: two images would have the same results.
        UserFileError: results exist, without `force`.
    """
    results: dict[Path, Path] = {}
    taken: dict[str, Path] = {}
    for source in sources:
        with as_data_error(source):
            files = files_by_name(source, IMAGE_SUFFIXES) if source.is_dir() else {source.stem: source}
            if missing := [path for path in files.values() if not path.is_file()]:
                raise MissingFileError(f"{missing[0]}: no such image file")
        for name, path in files.items():
            if taken.setdefault(name, path) != path:
                raise DataError(
                    f"{path}: {taken[name]} has the same name, and so would their results; do one at a time"
                )
            results[path] = output / name
    written = [path.with_name(path.name + ending) for path in results.values() for ending in endings]
    check_results([*written, *(output / name for name in others)], inputs=[*results], force=force)
    return results


def read_images(
    results: Mapping[Path, Path], read: Callable[[Path], np.ndarray]
) -> Iterator[tuple[Path, np.ndarray, Path]]:
    """Yield path, pixels (H, W, 3) and path of the results; files that cannot be read are skipped, and reported.

    Raises:
        DataError: none can be read.
    """
    num_read = 0
    for path, result in results.items():
        try:
            image = read(path)
        except BrokenImageError as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        num_read += 1
        yield path, image, result
    if not num_read:
        raise DataError("none of the files can be read as an image")
