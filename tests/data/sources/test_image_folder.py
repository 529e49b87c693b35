from pathlib import Path

import numpy as np
import pytest

from data.errors import BrokenImageError, DataError
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

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"/val: cannot be read: Permission denied$"):
        ImageFolder(str(tmp_path), "val")


def test_string_table() -> None:
    names = ["cat/1.jpg", "", "Katze/größe.jpg", "日本/\udcff.jpg", "x" * 1000]
    table = StringTable(names)
    assert len(table) == 5
    assert [table[index] for index in range(5)] == names
    assert [table[np.int64(index)] for index in range(5)] == names
    assert len(StringTable([])) == 0
