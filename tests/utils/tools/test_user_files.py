"""Output files of commands are checked first; system errors become one line."""

import os
from pathlib import Path

import pytest

from utils.config.errors import UserError
from utils.tools.user_files import UserFileError, check_output, check_results, user_file, write_result


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_is_never_replaced(tmp_path: Path, force: bool) -> None:
    with pytest.raises(UserFileError, match="already exists"):
        check_output(tmp_path, force=force, creator="me")


def test_existing_files(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("made by me")
    check_output(target, suffixes=(".json", ".csv"), force=True)
    check_output(target, force=False, creator="by me")
    for creator in ("", "by you"):
        with pytest.raises(UserFileError, match="replace it with --force"):
            check_output(target, force=False, creator=creator)
    with pytest.raises(UserFileError, match=r"must end in \.csv or \.png$"):
        check_output(target, suffixes=(".csv", ".png"), force=True)


def test_system_errors_name_file_and_reason(tmp_path: Path) -> None:
    with pytest.raises(UserFileError, match=r"gone: cannot be read: No such file"), user_file(tmp_path, "read"):
        (tmp_path / "gone").read_text()
    with pytest.raises(UserFileError, match=r"x: cannot be written: no space"), user_file(Path("x"), "written"):
        raise OSError("no space")
    error = UserError("as it is")
    with pytest.raises(UserError) as caught, user_file(tmp_path, "read"):
        raise error
    assert caught.value is error


def test_devices_and_pipes_are_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        for check in (lambda: check_output(path, force=True), lambda: check_results([path], force=True)):  # noqa: B023, called here
            with pytest.raises(UserFileError, match=f"{path}: is a device, a pipe or a socket"):
                check()


def test_a_link_stays_and_the_file_that_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    for content in ("first", "second"):
        write_result(tmp_path / "link", lambda path, content=content: path.write_text(content))
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder" / "file").read_text() == content
    with pytest.raises(UserFileError, match=r"no/file: cannot be written: No such file"):
        write_result(tmp_path / "no" / "file", lambda path: path.touch())
