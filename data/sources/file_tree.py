"""Files below a folder by their ending, and what else is there."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

FolderIds = frozenset[tuple[int, int]]
THREADS = 16  # that list folders: on network storage each takes milliseconds


@dataclass
class FileTree:
    """What is below a folder; all paths are relative to it.

    Attributes:
        folders: all of them, with "" for the folder itself.
        paths: files, sorted by folder, then by name.
        dangling: links that lead nowhere. Those with one of the endings are among the paths, too.
        left_out: number of other files and folders by kind, with the path of one of them.
    """

    folders: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    dangling: list[str] = field(default_factory=list)
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)

    def leave_out(self, kind: str, path: str, number: int = 1) -> None:
        count, first = self.left_out.get(kind, (0, path))
        self.left_out[kind] = count + number, first

    def describe_left_out(self) -> str:
        """Return what was left out in one line, empty if nothing was."""
        return ", ".join(f"{count} {kind} (such as {path})" for kind, (count, path) in self.left_out.items())


def find_files(folder: str | Path, endings: tuple[str, ...]) -> FileTree:
    """Find the files below a folder that end in one of `endings`, given in lower case. Links are followed.

    Left out are hidden files and folders (such as .ipynb_checkpoints), files with other endings, links to a folder that
    they are in, which would have no end, and what is no regular file.

    Raises:
        OSError: a folder cannot be read.
    """
    tree = FileTree()
    images: dict[str, list[str]] = {}
    level: list[tuple[str, FolderIds]] = [("", frozenset())]
    with ThreadPoolExecutor(THREADS) as pool:
        while level:
            parts = list(pool.map(lambda place: read_folder(folder, place[0], place[1], endings), level))
            for (inside, _), (part, _) in zip(level, parts, strict=True):
                images[inside] = sorted(part.paths)
                tree.dangling += part.dangling
                for kind, (count, first) in part.left_out.items():
                    tree.leave_out(kind, first, count)
            level = [(inner, ids) for part, ids in parts for inner in part.folders]
    tree.folders = sorted(images)
    tree.paths = [path for inside in tree.folders for path in images[inside]]
    return tree


def read_folder(
    root: str | Path, inside: str, above: FolderIds, endings: tuple[str, ...]
) -> tuple[FileTree, FolderIds]:
    """Return what is in one folder, only the folders in it as `folders`, and the ids of it and those that it is in.

    Args:
        root: folder that paths are relative to.
        inside: path of the folder.
        above: ids of the folders that it is in.
        endings: of images, in lower case.
    """
    above |= {folder_id(f"{root}/{inside}")}
    tree = FileTree()
    with os.scandir(f"{root}/{inside}") as entries:
        for entry in entries:
            name = entry.name
            path = f"{inside}/{name}" if inside else name
            is_image, is_hidden = name.lower().endswith(endings), name.startswith(".")
            if is_image and not is_hidden and entry.is_file(follow_symlinks=False):  # nearly all are that
                tree.paths.append(path)
                continue
            is_dangling = entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110, Path takes longer
            is_folder = not is_dangling and entry.is_dir()
            if is_hidden:
                if is_image or is_folder:
                    tree.leave_out("hidden files or folders", path)
            elif is_folder and entry.is_symlink() and folder_id(entry.path) in above:
                tree.leave_out("links to a folder that they are in", path)
            elif is_folder:
                tree.folders.append(path)
            elif is_dangling:
                tree.dangling.append(path)
                tree.paths += [path] * is_image
            elif not is_image:
                tree.leave_out(f"files with the ending {os.path.splitext(name)[1] or 'none'}", path)  # noqa: PTH122
            elif entry.is_file():
                tree.paths.append(path)
            else:
                tree.leave_out("devices, pipes or sockets", path)
    return tree, above


def folder_id(path: str) -> tuple[int, int]:
    """Return what identifies a folder under any name: device and inode."""
    stat = os.stat(path)  # noqa: PTH116, Path takes longer
    return stat.st_dev, stat.st_ino
