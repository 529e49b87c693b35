"""Heartbeats with a fake store and clock, and of processes that are stopped."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.faults.processes import descendants, is_running
from tests.faults.runs import Run
from tests.helpers import wait_for
from utils.distributed import heartbeat
from utils.distributed.heartbeat import FINISHED, HANG_SECONDS, HANG_SECONDS_DEVICE, INTERVAL_SECONDS, Heartbeat


class FakeStore:
    """A dictionary, of a host that may be gone."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.is_gone = False

    def add(self, key: str, amount: int) -> int:
        if self.is_gone:
            raise RuntimeError("Connection reset by peer")
        self.values[key] = str(int(self.values.get(key, "0")) + amount)
        return int(self.values[key])

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()


class FakeEvent:
    is_finished = False

    def query(self) -> bool:
        return self.is_finished


class Ring:
    """Heartbeats of several processes, without their threads."""

    def __init__(self, num_processes: int = 3) -> None:
        self.now = 500.0
        self.store = FakeStore()
        self.events: list[FakeEvent] = []
        self.members = [
            Heartbeat(self.store, rank, num_processes, clock=lambda: self.now, record_event=self.record_event)
            for rank in range(num_processes)
        ]
        for rank in range(num_processes):
            self.store.set(f"heartbeat/address/{rank}", f"host{rank} {100 + rank} 99")

    def record_event(self) -> FakeEvent:
        self.events.append(FakeEvent())
        return self.events[-1]

    def run(self, seconds: float, alive: tuple[int, ...] = (0, 1, 2)) -> dict[int, str]:
        """Let time pass until a process has a message; return the messages by rank."""
        end = self.now + seconds
        messages: dict[int, str] = {}
        while self.now < end and not messages:
            self.now += INTERVAL_SECONDS
            for rank in alive:
                if not self.store.is_gone:
                    self.members[rank].beat()
            messages = {rank: text for rank in alive if (text := self.members[rank].check())}
        return messages


def test_processes_that_count_are_alive() -> None:
    assert Ring().run(10 * HANG_SECONDS) == {}


def test_a_process_that_stops_counting_is_named_by_the_one_before_it() -> None:
    ring = Ring()
    ring.run(20)
    start = ring.now
    messages = ring.run(2 * HANG_SECONDS, alive=(0, 2))
    assert HANG_SECONDS < ring.now - start <= HANG_SECONDS + 2 * INTERVAL_SECONDS
    assert list(messages) == [0]
    assert messages[0].startswith("process 1 on host host1, pid 101, has not responded for 44 s: it is stopped or its")
    assert "start the same command again to resume from the newest checkpoint" in messages[0]


def test_a_process_that_never_began_has_no_address() -> None:
    assert Ring().run(2 * HANG_SECONDS, alive=(0, 1))[1].startswith("process 2 has not responded for 44 s")


def test_a_process_that_ended_in_order_is_not_missed() -> None:
    ring = Ring()
    ring.run(20)
    ring.store.add("heartbeat/1", FINISHED)
    assert ring.run(10 * HANG_SECONDS, alive=(0, 2)) == {}


def test_a_suspended_run_goes_on() -> None:
    """All processes are suspended; the first to continue gives the others time."""
    ring = Ring()
    ring.members[0].watch_device()
    ring.run(20)
    ring.now += 1000
    assert ring.run(HANG_SECONDS - INTERVAL_SECONDS, alive=(0,)) == {}
    assert ring.run(5 * HANG_SECONDS) == {}


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    ring = Ring()
    ring.run(20)
    ring.store.is_gone = True
    messages = ring.run(2 * HANG_SECONDS)
    assert list(messages) == [0, 1, 2]
    assert "store of the processes at node7:29500, of the launcher or of process 0, has not responded" in messages[1]


def test_a_gpu_that_does_not_finish() -> None:
    ring = Ring()
    for _ in range(3):
        ring.members[0].watch_device()
    assert len(ring.events) == 1  # until it is finished
    ring.run(20)
    ring.events[0].is_finished = True
    ring.run(20)
    ring.members[0].watch_device()
    start = ring.now
    messages = ring.run(2 * HANG_SECONDS_DEVICE)
    assert list(messages) == [0]
    assert "its GPU has not finished a step for 304 s" in messages[0]
    assert ring.now - start == HANG_SECONDS_DEVICE + INTERVAL_SECONDS


def test_only_a_process_of_the_same_launcher_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HANG_SECONDS", -1.0)
    member = Ring().members[0]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as sleeper:
        for host, parent, is_killed in [("other", os.getppid(), False), (socket.gethostname(), 1, False)]:
            member.neighbor_address = [host, str(sleeper.pid), str(parent)]
            member.kill_neighbor()
            assert (sleeper.poll() is not None) == is_killed
        member.neighbor_address = [socket.gethostname(), str(sleeper.pid), str(os.getppid())]
        member.kill_neighbor()
        assert sleeper.wait(20) == -signal.SIGKILL


def test_threads_count_end_in_order_and_end_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "HANG_SECONDS", 0.3)
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(logging.getLogger("mlla"), "propagate", True)
    store = FakeStore()
    beating, hanging = (Heartbeat(store, rank, 2) for rank in (0, 1))
    store.set("heartbeat/address/1", "other 7 8")
    beating.start()
    wait_for(lambda: codes, 20)
    assert codes[0] == 1
    assert "process 0: process 1 has not responded for 0 s" in caplog.text
    hanging.start()
    for member in (beating, hanging):
        member.stop()
    assert all(int(store.values[f"heartbeat/{rank}"]) > FINISHED for rank in (0, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_event_on_a_gpu() -> None:
    """It is finished only after the work before it."""
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # clock cycles, about a second
    member = Heartbeat(FakeStore(), 0, 2, record_event=heartbeat.record_cuda_event)
    member.watch_device()
    assert member.check() == ""
    assert member.event is not None
    torch.cuda.synchronize()
    member.check()
    assert member.event is None


@pytest.mark.slow
def test_a_stopped_process_ends_the_run_and_a_suspended_run_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, processes=2, epochs=200, save_steps=0, amp=False)
    run.args[run.args.index("main.py")] = "tests/utils/distributed/heartbeat_worker.py"
    process = run.start(forked=True)
    wait_for(run.step_lines)
    workers = descendants(process.pid)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in [process.pid, *workers]:
            os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(7.5)
    lines = run.step_lines()
    wait_for(lambda: run.step_lines() > lines + 3)
    holder = int((run.folder / "run_holder.txt").read_text().split()[1])  # process 0
    os.kill(holder, signal.SIGSTOP)
    start = time.monotonic()
    assert process.wait(60) != 0
    assert time.monotonic() - start < 30
    assert f"process 1: process 0 on host {socket.gethostname()}, pid {holder}, has not responded for" in run.printed()
    wait_for(lambda: not any(map(is_running, workers)), 30)
