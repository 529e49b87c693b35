"""Waiting for data, on a CPU and between the steps of a GPU."""

import time

import pytest
import torch

from utils.speed.data_wait import DataWait


def test_a_cpu_waits_with_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    wait, clock = DataWait(torch.device("cpu")), iter([10.0, 10.5, 20.0, 20.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    for _ in range(2):
        with wait:
            pass
    assert wait.collect() == wait.collect() == 0.75


class FakeEvent:
    """Event of a GPU whose clock is at `now` milliseconds."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = FakeEvent.now

    def elapsed_time(self, other: "FakeEvent") -> float:
        return other.time - self.time


def test_gaps_between_the_steps_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    wait = DataWait(torch.device("cuda"))
    for gap in (0.0, 250.0, 500.0):
        FakeEvent.now += 1000  # a step
        with wait:
            FakeEvent.now += gap
    assert wait.collect() == 0.75
    with wait:
        FakeEvent.now += 125
    assert wait.collect() == 0.875


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_host_that_runs_ahead_does_not_count() -> None:
    wait = DataWait(torch.device("cuda"))
    torch.cuda._sleep(500_000_000)  # a quarter of a second
    with wait:
        time.sleep(0.05)
    torch.cuda.synchronize()
    assert wait.collect() < 0.04
    with wait:
        time.sleep(0.05)
    torch.cuda.synchronize()
    assert wait.collect() > 0.04
