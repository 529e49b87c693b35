"""Stop requests by signals and by the end of the launcher."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from torch import Tensor

from tests.helpers import ROOT, run_python
from utils.distributed import stop_signal
from utils.distributed.stop_signal import Cause, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_requests_a_stop_and_the_handler_is_restored(number: signal.Signals) -> None:
    previous = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.agreed() is Cause.NONE
        os.kill(os.getpid(), number)
        assert stop.agreed() is Cause[number.name]
        assert stop.cause.text == ("Ctrl-C" if number is signal.SIGINT else number.name)
    assert signal.getsignal(number) is previous


def test_a_second_ctrl_c_is_told_from_the_launchers_copy_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    now = 0.0
    monkeypatch.setattr(stop_signal.time, "monotonic", lambda: now)
    with StopRequest(on_interrupt=counts.append) as stop:
        for now in (10.0, 10.2, 12.0, 15.0):  # noqa: B007, which the clock returns
            stop.interrupt()
    assert counts == [1, 2, 3]
    assert stop.asked is Cause.SIGINT


def test_ctrl_c_is_told_at_once_and_stays_ignored_in_the_background() -> None:
    told = threading.Event()
    with StopRequest(on_interrupt=lambda _: told.set()):
        os.kill(os.getpid(), signal.SIGINT)
        assert told.wait(20)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts background jobs
    try:
        with StopRequest() as stop:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.agreed() is Cause.NONE
    finally:
        signal.signal(signal.SIGINT, previous)


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


# The main thread waits in C, where it cannot run handlers. The forked process has a handler, but not the time limit.
BLOCKED = """
import ctypes, os, signal, sys, threading, time
from utils.distributed import stop_signal
stop_signal.GRACE_SECONDS = 1.0
with stop_signal.StopRequest(on_timeout=lambda: os._exit(7)) as stop:
    child = os.fork()
    if child == 0:
        time.sleep(8)
        os._exit(0)
    target = child if sys.argv[1] == "child" else os.getpid()
    threading.Timer(0.5, os.kill, (target, getattr(signal, sys.argv[2]))).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))  # another thread gets it
    ctypes.CDLL(None).sleep(4)
    os.kill(child, signal.SIGKILL)
    sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("args", "code"), [("main SIGTERM", 7), ("main SIGUSR1", 3), ("child SIGTERM", 3)])
def test_a_process_that_does_not_come_to_an_agreement_is_ended(args: str, code: int) -> None:
    done = run_python("-c", BLOCKED, *args.split(), timeout=60, forked=True)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("agrees", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_time_limit_ends_with_the_agreement(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, agrees: bool
) -> None:
    """After Ctrl-C there is one if a launcher waits."""
    monkeypatch.setattr(stop_signal, "GRACE_SECONDS", 0.3)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    ended = threading.Event()
    with StopRequest(on_timeout=ended.set) as stop:
        os.kill(os.getpid(), number)
        if agrees:
            assert stop.agreed() is Cause[number.name]
        assert ended.wait(0.6 if agrees else 20) != agrees
    assert signal.set_wakeup_fd(-1) == -1


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
