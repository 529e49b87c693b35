"""Files that are complete or absent, with the mode that the umask gives."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.logs.atomic_write import write_atomic


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    previous = os.umask(0o027)
    yield
    os.umask(previous)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    """Also where a library makes files that their owner alone may read, as safetensors does."""

    def write(path: Path) -> None:
        path.touch(mode=0o600)
        path.write_text("new")

    write_atomic(target := tmp_path / "w", write)
    assert (target.read_text(), mode(target)) == ("new", 0o640)


def test_a_second_name_keeps_the_mode(tmp_path: Path) -> None:
    (first := tmp_path / "first").touch(mode=0o600)
    write_atomic(tmp_path / "second", lambda path: path.hardlink_to(first))
    assert mode(first) == 0o600
