"""Text files of names and labels."""

import os
from pathlib import Path

import pytest

from data.errors import DataError
from data.sources.labels import MAX_CLASSES, check_label, class_names, read_lines


def test_lines_without_a_byte_order_mark(tmp_path: Path) -> None:
    (path := tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfant\nb\xff\n")
    assert read_lines(path) == ["ant", "b\udcff"]


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "classes.txt")
    with pytest.raises(DataError, match=rf"^{path}: is a pipe or a device; name a file$"):
        read_lines(path)
    assert class_names(tmp_path, 2) == ["0", "1"]


@pytest.mark.parametrize("label", [-1, MAX_CLASSES, 2**40])
def test_labels_are_bounded(label: int) -> None:
    assert check_label(MAX_CLASSES - 1, "map.txt") == MAX_CLASSES - 1
    with pytest.raises(DataError, match=rf"^map.txt: label {label} is not the number of a class"):
        check_label(label, "map.txt")
