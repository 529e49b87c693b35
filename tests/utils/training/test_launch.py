"""What ends a process becomes one line, or a traceback, and an exit code."""

import atexit
import gc
import logging
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from utils.config.errors import UserError
from utils.distributed import process
from utils.distributed.process import Process, stop_process
from utils.training import launch
from utils.training.launch import LaunchedProcess, run_and_end


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


@pytest.mark.parametrize(("has_sigterm", "waits"), [(False, [launch.SECONDARY_RANK_DELAY_SECONDS]), (True, [])])
def test_a_lost_contact_waits_for_the_launchers_signal_unless_it_came(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, has_sigterm: bool, waits: list[float]
) -> None:
    monkeypatch.setattr(logging.getLogger("mlla"), "propagate", True)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():  # other tests may have left threads
            slept.append(seconds)

    monkeypatch.setattr(launch.time, "sleep", sleep)
    with LaunchedProcess() as this_process:
        if has_sigterm:
            this_process.has_sigterm.set()
        raise RuntimeError("[gloo] Connection closed by peer")
    assert [seconds for seconds in slept if seconds > 1] == waits
    assert "lost contact with the other processes" in caplog.text


def exit_code_of_fork(target: Callable[[], object]) -> int | None:
    fork = multiprocessing.get_context("fork").Process(target=target)
    fork.start()
    fork.join(20)
    is_running = fork.is_alive()
    fork.kill()
    return None if is_running else fork.exitcode


@pytest.mark.parametrize(("end", "exit_code"), [(lambda: 3, 3), (lambda: 0, 0), (lambda: sys.exit(130), 130)])
def test_a_program_ends_without_waiting_for_libraries(end: Callable[[], Any], exit_code: int) -> None:
    def program() -> int:
        atexit.register(time.sleep, 60)
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
        return end()

    assert exit_code_of_fork(lambda: run_and_end(program)) == exit_code


def test_a_program_runs_with_the_garbage_collector_on() -> None:
    def start() -> None:
        gc.disable()  # as main.py does for its imports
        run_and_end(lambda: 3 + gc.isenabled())

    assert exit_code_of_fork(start) == 4


def test_a_program_whose_last_word_is_text_prints_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of_fork(lambda: run_and_end(lambda: sys.exit("no such folder"))) == 1
    assert "no such folder" in capfd.readouterr().err


@pytest.mark.parametrize("is_late", [True, False])
def test_the_end_of_a_stopped_process_is_limited(monkeypatch: pytest.MonkeyPatch, is_late: bool) -> None:
    monkeypatch.setattr(process, "STOP_SECONDS", 0.2)

    def stop() -> None:
        process.is_program.set()
        this_process = Process(0, 1, torch.device("cpu"))
        if not is_late:
            stop_process(this_process)
        this_process.limit_stop(5)
        time.sleep(60 if is_late else 0.5)

    assert exit_code_of_fork(stop) == (5 if is_late else 0)
