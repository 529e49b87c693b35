"""One line for mistakes; what main.py's own flags do is in test_main.py."""

import time

import pytest
from conftest import run_python

from utils.command_line import SECOND_VOICE_SECONDS, mistakes_in_one_line


@pytest.mark.parametrize("error", [ValueError("KEY 3: too many; lower it"), FileNotFoundError(2, "No such file", "x")])
def test_a_mistake_is_one_line_and_exit_code_2(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, mistakes_in_one_line():
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_other_errors_are_no_mistakes() -> None:
    with pytest.raises(RuntimeError, match="a defect"), mistakes_in_one_line():
        raise RuntimeError("a defect")


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("3", [SECOND_VOICE_SECONDS])])
def test_the_first_process_speaks_first(monkeypatch: pytest.MonkeyPatch, rank: str, waits: list[float]) -> None:
    slept: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(SystemExit), mistakes_in_one_line():
        raise ValueError
    assert slept == waits


def test_imports_nothing_that_takes_long() -> None:
    done = run_python("-c", "import sys, utils.command_line; print(*{'torch', 'numpy', 'yacs'} & {*sys.modules})")
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
