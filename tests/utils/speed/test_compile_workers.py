"""Inductor's compile workers: signals, and their death."""

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from tests.faults.processes import descendants, is_running
from tests.helpers import ROOT, wait_for
from utils.speed import compile_workers
from utils.speed.compile_workers import (
    CompileWorkersDiedError,
    fail_jobs_of_dead_pool,
    have_workers_died,
)

pytest.importorskip("triton")  # without it there are no workers

# The signal reaches the whole group; the main process ignores it, the workers finish their jobs.
PROGRAM = """
import os, signal, sys, time
from utils.speed.compile_workers import start_compile_workers
pool = start_compile_workers()
jobs = [pool.submit(time.sleep, 2.0) for _ in range(2)]
pool.submit(os.getpid).result(60)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.killpg(0, signal.SIGTERM)
for job in jobs:
    job.result(60)
print(pool.process.pid, flush=True)
if sys.argv[1] == "waits":
    time.sleep(60)
if sys.argv[1] == "sidecar":
    job = pool.submit(time.sleep, 60)
    time.sleep(0.5)
    os.kill(pool.process.pid, signal.SIGKILL)
    try:
        job.result(20)
    except RuntimeError as error:
        print("raised", type(error).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["returns", "waits", "sidecar"])
def test_workers_survive_signals_to_the_group_and_end_with_the_main_process(case: str) -> None:
    command = [sys.executable, "-c", PROGRAM, case]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        sidecar = int(process.stdout.readline())
        blocked = int(re.findall(r"SigBlk:\s+(\w+)", Path(f"/proc/{sidecar}/status").read_text())[0], 16)
        workers = [sidecar, *descendants(sidecar)]
        assert len(workers) > 1
        if case == "waits":
            process.kill()
        assert all(blocked >> (number - 1) & 1 for number in compile_workers.SIGNALS)
        assert process.wait(20) == (-signal.SIGKILL if case == "waits" else 0)
        assert ("raised" in process.stdout.read()) == (case == "sidecar")
    try:
        wait_for(lambda: not is_running(sidecar), 30)
        if case != "sidecar":  # orphans look for their parent once a minute
            wait_for(lambda: not any(map(is_running, workers)), 30)
    finally:
        for pid in filter(is_running, workers):
            os.kill(pid, signal.SIGKILL)


class FakePool:
    """A pool whose process sleeps."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        self.futures_lock = threading.Lock()
        self.pending_futures: dict[int, Future[Any]] = {0: Future()}


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> FakePool:
    pool = FakePool()
    monkeypatch.setattr(compile_workers, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(compile_workers, "start_compile_workers", lambda: pool)
    return pool


def test_jobs_of_a_dead_pool_raise(pool: FakePool) -> None:
    future = pool.pending_futures[0]
    threading.Timer(0.2, pool.process.kill).start()
    assert not have_workers_died(RuntimeError("another reason"))
    fail_jobs_of_dead_pool(pool)
    with pytest.raises(CompileWorkersDiedError, match="exit code -9"):
        future.result(0)
    assert not pool.pending_futures
    assert have_workers_died(RuntimeError("any"))


def test_errors_that_come_from_a_dead_worker_are_recognized(pool: FakePool) -> None:
    inner = RuntimeError("A compilation subprocess exited unexpectedly")
    inner.__cause__ = BrokenProcessPool("A process in the process pool was terminated abruptly")
    outer = RuntimeError("backend='inductor' raised")
    outer.inner_exception = inner  # type: ignore[attr-defined]
    assert have_workers_died(outer)
    assert not have_workers_died(ValueError("a shape"))
    pool.process.kill()
    pool.process.wait()
