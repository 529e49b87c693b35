"""Files below a folder by their ending, and what else is there."""

import os
from dataclasses import dataclass, field
from pathlib import Path

FolderIds = frozenset[tuple[int, int]]


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

    def leave_out(self, kind: str, path: str) -> None:
        count, first = self.left_out.get(kind, (0, path))
        self.left_out[kind] = count + 1, first

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
    names: dict[str, list[str]] = {}
    pending: list[tuple[str, FolderIds]] = [("", frozenset())]
    while pending:
        inside, above = pending.pop()
        above |= {folder_id(f"{folder}/{inside}")}
        names[inside] = []
        with os.scandir(f"{folder}/{inside}") as entries:
            for entry in entries:
                path = f"{inside}/{entry.name}" if inside else entry.name
                is_image = entry.name.lower().endswith(endings)
                is_dangling = entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110, Path takes longer
                is_folder = not is_dangling and entry.is_dir()
                if entry.name.startswith("."):
                    if is_image or is_folder:
                        tree.leave_out("hidden files or folders", path)
                elif is_folder and entry.is_symlink() and folder_id(entry.path) in above:
                    tree.leave_out("links to a folder that they are in", path)
                elif is_folder:
                    pending.append((path, above))
                elif is_dangling:
                    tree.dangling.append(path)
                    names[inside] += [path] * is_image
                elif not is_image:
                    tree.leave_out(f"files with the ending {os.path.splitext(entry.name)[1] or 'none'}", path)  # noqa: PTH122
                elif entry.is_file():
                    names[inside].append(path)
                else:
                    tree.leave_out("devices, pipes or sockets", path)
    tree.folders = sorted(names)
    tree.paths = [path for inside in tree.folders for path in sorted(names[inside])]
    return tree


def folder_id(path: str) -> tuple[int, int]:
    """Return what identifies a folder under any name: device and inode."""
    stat = os.stat(path)  # noqa: PTH116, Path takes longer
    return stat.st_dev, stat.st_ino
