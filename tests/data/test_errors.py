import pickle
from pathlib import Path

import pytest

from data.errors import BrokenImageError, DataError, as_data_error
from utils.config.errors import MissingFileError, UserError


def test_operating_system_errors_become_one_line_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught, as_data_error(tmp_path):
        tmp_path.read_bytes()
    assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory"
    (tmp_path / "text").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"text: .*can't decode byte 0xff"), as_data_error(tmp_path / "text"):
        (tmp_path / "text").read_text(encoding="utf-8")


def test_user_errors_and_programming_errors_pass_unchanged() -> None:
    for error in (MissingFileError("x"), BrokenImageError("x"), ValueError("x"), KeyError("x")):
        with pytest.raises(type(error)) as caught, as_data_error("file"):
            raise error
        assert caught.value is error


def test_errors_can_be_pickled_and_made_of_one_message() -> None:
    for kind in (DataError, BrokenImageError):
        assert issubclass(kind, UserError)
        assert str(pickle.loads(pickle.dumps(kind("a message")))) == str(kind("a message")) == "a message"
