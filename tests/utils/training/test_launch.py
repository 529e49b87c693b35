"""What ends a process becomes one line, or a traceback, and an exit code."""

import logging

import pytest

from utils.config.errors import UserError
from utils.training.launch import LaunchedProcess


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (UserError("KEY 3: too many"), 2, "KEY 3: too many"),
        (MemoryError("no room"), 1, "out of memory (no room); lower DATA.BATCH_SIZE"),
        (RuntimeError("Caught RuntimeError\n  at x\nDefaultCPUAllocator: can't allocate memory"), 1, "out of memory ("),
        (RuntimeError("a defect"), 1, "RuntimeError: a defect Traceback"),
    ],
)
def test_errors_that_end_a_process(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception, exit_code: int, line: str
) -> None:
    monkeypatch.setattr(logging.getLogger("mlla"), "propagate", True)
    launched = LaunchedProcess()
    with launched:
        raise error
    (message,) = {record.getMessage() for record in caplog.records}
    assert " ".join(message.split()).startswith(line)
    assert ("Traceback" in message) == ("defect" in str(error))
    assert launched.exit_code == exit_code
