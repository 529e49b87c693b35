"""Stop requests by signals and by the end of the launcher."""

import os
import signal
import subprocess
import sys

import pytest
from torch import Tensor

from tests.helpers import ROOT
from utils.distributed import stop_signal
from utils.distributed.stop_signal import Cause, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_requests_a_stop_and_the_handler_is_restored(number: signal.Signals) -> None:
    previous = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.agreed() is Cause.NONE
        os.kill(os.getpid(), number)
        assert stop.agreed() is Cause[number.name]
        assert stop.cause.text == number.name
    assert signal.getsignal(number) is previous


def test_a_signal_while_processes_agree_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(values: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return values

    with StopRequest() as stop:
        monkeypatch.setattr(stop_signal, "max_over_processes", interrupted)
        assert stop.agreed() is Cause.NONE  # the others have the same answer, which was given before
        monkeypatch.setattr(stop_signal, "max_over_processes", lambda values: values)
        assert stop.agreed() is Cause.SIGTERM


def test_the_highest_cause_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest()
    monkeypatch.setattr(stop_signal, "max_over_processes", lambda values: values.clamp(min=int(Cause.SIGUSR1)))
    assert stop.agreed() is Cause.SIGUSR1  # another process was asked
    stop.ask(Cause.SAVING_FAILED)
    stop.ask(Cause.SIGTERM)
    assert stop.agreed() is Cause.SAVING_FAILED


@pytest.mark.slow
def test_the_end_of_the_launcher_requests_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os, time; from utils.distributed.stop_signal import StopRequest\n"
        "stop = StopRequest()\n"
        "print(stop.agreed().name, flush=True)\n"
        "while os.getppid() == stop.launcher: time.sleep(0.01)\n"
        "print(stop.agreed().text, flush=True)\n"
    )
    launcher = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {program!r}]); time.sleep(60)"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with subprocess.Popen([sys.executable, "-c", launcher], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "NONE\n"
        process.kill()
        assert process.stdout.readline() == "the launcher has ended\n"
