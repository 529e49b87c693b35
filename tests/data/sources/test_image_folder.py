import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from data.errors import BrokenImageError, DataError
from data.sources.file_tree import find_files
from data.sources.image_folder import ImageFolder
from data.sources.string_table import StringTable
from tests.helpers import make_image_folder
from utils.config.errors import MissingFileError


def test_images_labels_and_names(tmp_path: Path) -> None:
    make_image_folder(tmp_path, train=2, val=3)
    (tmp_path / "val" / "cat" / "notes.txt").write_text("not counted")
    folder = ImageFolder(str(tmp_path), "val")
    assert folder.classes == ["cat", "dog"]
    assert folder.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert folder.name(4) == str(tmp_path / "val" / "dog" / "1.jpg")
    assert folder.read(4) == (tmp_path / "val" / "dog" / "1.jpg").read_bytes()
    (tmp_path / "val" / "dog" / "1.jpg").unlink()
    with pytest.raises(BrokenImageError, match="cannot be read: No such file"):
        folder.read(4)


def test_links_and_deeper_folders_are_found(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "elsewhere", train=1, val=2)
    split = tmp_path / "data" / "val"
    (split / "dog" / "deep").mkdir(parents=True)
    (split / "cat").symlink_to(tmp_path / "elsewhere" / "val" / "cat")  # the class
    (split / "dog" / "deep" / "link").symlink_to(tmp_path / "elsewhere" / "val" / "dog")  # a folder within
    folder = ImageFolder(str(tmp_path / "data"), "val")
    assert folder.labels.tolist() == [0, 0, 1, 1]
    assert len(folder.read(3)) > 100


def test_a_folder_without_classes(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    with pytest.raises(MissingFileError, match="no class folders in it"):
        ImageFolder(str(tmp_path), "val")


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_image_folder(tmp_path, train=1, val=1)

    scan = os.scandir

    def refuse(folder: str) -> Any:
        if folder.endswith("/dog"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"/val/dog: cannot be read: Permission denied$"):
        ImageFolder(str(tmp_path), "val")


def test_the_order_is_that_of_torchvision(tmp_path: Path) -> None:
    """Which the order of the epochs and exact resumes depend on."""
    for name in (
        "a/1.png",
        "a/10.png",
        "a/2.PNG",
        "a-b/1.jpg",
        "a/deep/0.png",
        "a/deep-er/0.png",
        "B/x.png",
        "a/B/1.bmp",
    ):
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / name).touch()
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "val"))
    folder = ImageFolder(str(tmp_path), "val")
    assert folder.classes == theirs.classes
    assert [(folder.name(i), int(folder.labels[i])) for i in range(len(folder))] == theirs.samples


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_image_folder(tmp_path, train=4, val=1)
    train = tmp_path / "train"
    for hidden in (train / ".ipynb_checkpoints", train / "cat" / ".ipynb_checkpoints"):
        shutil.copytree(train / "dog", hidden)
    (train / "cat" / "._0.jpg").touch()
    (train / "cat" / ".DS_Store").touch()  # no image: not worth a word
    for number in (0, 1):
        (train / "cat" / f"{number}.jpg").rename(train / "cat" / f"{number}.jfif")
    (train / "dog" / "loop").symlink_to(train / "dog")
    (train / "dog" / "up").symlink_to(train)
    (train / "loose.png").touch()
    os.mkfifo(train / "dog" / "pipe.jpg")
    folder = ImageFolder(str(tmp_path), "train")
    assert folder.classes == ["cat", "dog"]
    assert [folder.paths[i] for i in range(len(folder))] == [
        "cat/2.jpg",
        "cat/3.jpg",
        *(f"dog/{i}.jpg" for i in range(4)),
    ]
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{train}: left out: ")
    for part in (
        "3 hidden files or folders (such as ",
        "2 files with the ending .jfif (such as cat/",
        "2 links to a folder that they are in (such as dog/",
        "1 images outside the class folders (such as loose.png)",
        "1 devices, pipes or sockets (such as dog/pipe.jpg)",
    ):
        assert part in message


def test_links_to_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Images among them count as broken images; a class folder must not disappear."""
    make_image_folder(tmp_path, train=1, val=1)
    (tmp_path / "val" / "cat" / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "val" / "cat" / "more").symlink_to(tmp_path / "more")
    folder = ImageFolder(str(tmp_path), "val")
    assert folder.labels.tolist() == [0, 0, 1]
    assert "dangling links, 2 in all, such as cat/" in caplog.text
    with pytest.raises(BrokenImageError, match="cannot be read: No such file"):
        folder.read(1)
    (tmp_path / "val" / "emu").symlink_to(tmp_path / "emu")
    with pytest.raises(MissingFileError, match="/val/emu: a link that leads nowhere"):
        ImageFolder(str(tmp_path), "val")


def test_string_table() -> None:
    names = ["cat/1.jpg", "", "Katze/größe.jpg", "日本/\udcff.jpg", "x" * 1000]
    table = StringTable(names)
    assert len(table) == 5
    assert [table[index] for index in range(5)] == names
    assert [table[np.int64(index)] for index in range(5)] == names
    assert len(StringTable([])) == 0


def test_folders_are_listed_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On network storage each takes milliseconds, and ImageNet has a thousand."""
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").touch()
    barrier, scandir = threading.Barrier(2), os.scandir

    def wait_for_another(path: str) -> Any:
        if path[-1] in "ab":
            barrier.wait(10)
        return scandir(path)

    monkeypatch.setattr("data.sources.file_tree.os.scandir", wait_for_another)
    assert find_files(tmp_path / "train", (".png",)).paths == ["a/0.png", "b/0.png"]
