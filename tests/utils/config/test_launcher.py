"""What torchrun prints about a process that ended with an error."""

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from utils.config.command_line import report_user_errors
from utils.config.errors import UserError
from utils.training.launch import LaunchedProcess

VARIABLE = "TORCHELASTIC_ERROR_FILE"


def page(file: Path) -> str:
    """Return what torchrun prints of a failed process with this file."""
    return str(ChildFailedError("main.py", {0: ProcessFailure(0, 1, 2, str(file))}))


@pytest.mark.parametrize("is_early", [True, False])
def test_the_launchers_page_ends_with_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_early: bool
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "error.json"))
    assert "To enable traceback see" in page(tmp_path / "error.json")
    if is_early:
        with pytest.raises(SystemExit), report_user_errors():
            raise UserError("my_imges: no such folder")
        assert capsys.readouterr().err == "error: my_imges: no such folder\n"
    else:
        with LaunchedProcess():
            raise UserError("my_imges: no such folder")
    assert " error: my_imges: no such folder" in page(tmp_path / "error.json").splitlines()[-2]
    assert list(tmp_path.iterdir()) == [tmp_path / "error.json"]


def test_without_a_launcher_or_a_disk_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (None, str(tmp_path / "none" / "error.json")):
        monkeypatch.delenv(VARIABLE, raising=False) if variable is None else monkeypatch.setenv(VARIABLE, variable)
        with pytest.raises(SystemExit), report_user_errors():
            raise UserError("x")
    assert list(tmp_path.iterdir()) == []
