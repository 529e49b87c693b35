"""Loader workers that hang at their start, and errors that come from workers."""

import gc
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from data import workers
from data.errors import BrokenImageError, DataError
from data.workers import MAX_AUTO_WORKERS, RestartingDataLoader, WorkerStartError, choose_num_workers, share_of_cores
from tests.faults.processes import is_running
from tests.helpers import wait_for

NUMBERS = list(range(6))


def hang_at_first(folder: Path, hanging_starts: int, number: int) -> None:
    """Worker 1 hangs in its first starts and heeds no signal but SIGKILL, as if it waited for a lock in a fork."""
    marks = len(list(folder.iterdir()))
    if number == 1 and marks < hanging_starts:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / str(os.getpid())).touch()
        time.sleep(600)


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_SECONDS", 1.5)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.3)  # how long it waits for their end


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [True, False])
def test_hanging_workers_are_restarted(tmp_path: Path, caplog: pytest.LogCaptureFixture, persistent: bool) -> None:
    set_up = partial(hang_at_first, tmp_path, 1)
    loader = RestartingDataLoader(
        NUMBERS, batch_size=2, num_workers=2, persistent_workers=persistent, set_up_worker=set_up
    )
    with caplog.at_level(logging.WARNING, logger="mlla"):
        batches = [batch.tolist() for batch in loader]
    assert batches == [[0, 1], [2, 3], [4, 5]]
    assert caplog.messages == ["a DataLoader worker did not start within 1.5 s; restarting all workers"]
    assert [batch.tolist() for batch in loader] == batches
    (hanging,) = (int(mark.name) for mark in tmp_path.iterdir())
    wait_for(lambda: not is_running(hanging))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep their start method")
def test_workers_are_children_of_the_training_process() -> None:
    """Whatever Python's default is: a fork server's workers would not end with a killed training process."""
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        (parent,) = RestartingDataLoader([0], num_workers=1, batch_size=None, collate_fn=parent_of_worker)
    finally:
        multiprocessing.set_start_method(default, force=True)
    assert parent == os.getpid()


def parent_of_worker(_: int) -> int:
    return os.getppid()


class Slow(Dataset):
    """The first item comes at once, the others after ten minutes."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        time.sleep(600 if index else 0)
        return index


@pytest.mark.parametrize("persistent", [True, False])
def test_busy_workers_do_not_delay_the_end(monkeypatch: pytest.MonkeyPatch, persistent: bool) -> None:
    monkeypatch.setattr(workers, "END_SECONDS", 0.2)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60)
    loader = RestartingDataLoader(Slow(), batch_size=1, num_workers=2, persistent_workers=persistent)
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    assert next(batches).tolist() == [0]
    processes = set(multiprocessing.active_children()) - others
    assert len(processes) == 2
    del batches, loader
    gc.collect()
    assert {process.exitcode for process in processes} <= {-signal.SIGKILL, 0}
    assert -signal.SIGKILL in {process.exitcode for process in processes}


LEFT: list[object] = []


def leave_a_loader() -> None:
    batches = iter(RestartingDataLoader(NUMBERS, num_workers=4, persistent_workers=True))
    LEFT.extend((batches, next(batches)))


def test_workers_that_exist_at_the_end_of_a_process_are_no_error() -> None:
    """Python ends them, which must not look like their death while they load."""
    process = multiprocessing.get_context("fork").Process(target=leave_a_loader)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_the_end_of_python_does_not_wait_for_each_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """For pinned memory, torch registers a function that does, which runs after those registered later."""
    registered: list[Callable[[], object]] = []
    monkeypatch.setattr(workers.atexit, "register", registered.append)
    others = set(multiprocessing.active_children())
    batches = iter(RestartingDataLoader(Slow(), batch_size=1, num_workers=2, persistent_workers=True))
    processes = set(multiprocessing.active_children()) - others
    registered[-1]()
    for process in processes:
        process.join(20)
    assert {process.exitcode for process in processes} == {-signal.SIGKILL}
    del batches


def test_the_thread_that_pins_memory_ends_before_the_workers() -> None:
    """It reads from them, and would print a traceback."""
    others = set(multiprocessing.active_children())
    iterator = RestartingDataLoader(Slow(), batch_size=1, num_workers=1)._get_iterator()
    (worker,) = set(multiprocessing.active_children()) - others
    iterator._pin_memory_thread_done_event = threading.Event()
    was_alive: list[bool] = []

    def pin() -> None:
        iterator._pin_memory_thread_done_event.wait(20)
        was_alive.append(worker.is_alive())

    iterator._pin_memory_thread = threading.Thread(target=pin)
    iterator._pin_memory_thread.start()
    iterator.kill_workers()
    worker.join(20)
    assert was_alive == [True]
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM])
def test_signals_for_training_do_not_end_its_workers(number: int) -> None:
    """Some tools send them to every process."""
    others = set(multiprocessing.active_children())
    batches = iter(RestartingDataLoader(NUMBERS, num_workers=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, number)
    assert [batch.item() for batch in batches] == NUMBERS[1:]


def test_workers_end_some_time_after_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the training process does with it. Python's end would wait for workers that survive."""
    monkeypatch.setattr(workers, "TERM_SECONDS", 0.1)
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        others = set(multiprocessing.active_children())
        batches = iter(RestartingDataLoader(NUMBERS, num_workers=1))
        next(batches)
        (worker,) = set(multiprocessing.active_children()) - others
        worker.terminate()
        with suppress(RuntimeError):  # in which torch may report the end of the worker
            worker.join(20)
        worker.join(20)
        assert worker.exitcode == -signal.SIGALRM
    finally:
        signal.signal(signal.SIGTERM, previous)
        del batches


def test_no_thread_is_started_while_python_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 would wait for it forever, and newer versions raise an error."""
    batches = iter(RestartingDataLoader(NUMBERS, num_workers=1))
    next(batches)
    started = []
    monkeypatch.setattr(workers.threading.Timer, "start", started.append)
    monkeypatch.setattr(workers.sys, "is_finalizing", lambda: True)
    batches.close()
    assert started == []


@pytest.mark.slow
def test_workers_that_never_start_end_the_run(tmp_path: Path) -> None:
    loader = RestartingDataLoader(NUMBERS, num_workers=2, set_up_worker=partial(hang_at_first, tmp_path, 99))
    with pytest.raises(
        WorkerStartError, match=r"^DATA\.NUM_WORKERS 2: .* did not start in 3 attempts; lower DATA\.NUM_WORKERS"
    ):
        next(iter(loader))
    assert len(list(tmp_path.iterdir())) == 3


class Counted(Dataset):
    """Twenty numbers, and how many of them were read by any process."""

    def __init__(self) -> None:
        self.reads = multiprocessing.Value("i", 0)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        with self.reads.get_lock():
            self.reads.value += 1
        return index


def test_workers_of_the_next_loader_begin_when_those_of_this_one_run_out_of_work() -> None:
    """They load as much as they prefetch, and nothing is drawn from the generators of the training process."""
    data, generator = Counted(), torch.Generator
    evaluation = RestartingDataLoader(data, num_workers=2, persistent_workers=True, generator=generator())
    training = RestartingDataLoader(NUMBERS, num_workers=1, persistent_workers=True, generator=generator())
    training.next_loader = evaluation
    state = torch.get_rng_state()
    for epoch in range(2):
        batches = iter(training)
        for count in range(1, len(NUMBERS) + 1):
            assert next(batches).tolist() == [count - 1]
            assert (evaluation.started_iterator is not None) == (count >= 5)  # two batches are prefetched
        wait_for(lambda: data.reads.value == 20 * epoch + 4)  # noqa: B023
        assert [batch.item() for batch in evaluation] == list(range(20))
        assert evaluation.started_iterator is None
    assert state.equal(torch.get_rng_state())


@pytest.mark.parametrize("keeps_batches", [False, True])
def test_training_begins_when_the_workers_of_an_evaluation_run_out_of_work(keeps_batches: bool) -> None:
    """Once, and at once where evaluation has its batches in memory."""
    options = {"num_workers": 1, "persistent_workers": True, "generator": torch.Generator()}
    evaluation = RestartingDataLoader(NUMBERS, keeps_batches=keeps_batches, **options)
    training = RestartingDataLoader(NUMBERS, **options)
    training.next_loader = evaluation
    for epoch in range(3):
        assert [batch.item() for batch in training] == list(range(len(NUMBERS)))
        assert training.started_iterator is None
        if epoch == 1:
            training.start_after(evaluation)
        assert (training.started_iterator is not None) == (keeps_batches and epoch == 1)
        assert len(list(evaluation)) == len(NUMBERS)
        assert (training.started_iterator is not None) == (epoch == 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_kept_batches_are_loaded_once(num_workers: int) -> None:
    data = Counted()
    options = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    loader = RestartingDataLoader(data, keeps_batches=True, **options)
    for count in (1, 4):  # an iteration that is broken off keeps nothing
        assert [int(batch) for batch in itertools.islice(loader, count)] == list(range(count))
    first = list(loader)
    asked = data.reads.value
    loader.start()
    assert all(a is b for a, b in zip(first, loader, strict=True))
    assert data.reads.value == asked


def test_a_next_loader_that_is_not_used_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "END_SECONDS", 0.2)
    others = set(multiprocessing.active_children())
    training, evaluation = (
        RestartingDataLoader(data, num_workers=1, persistent_workers=True) for data in (NUMBERS, Slow())
    )
    training.next_loader = evaluation
    batches = iter(training)
    for _ in NUMBERS:
        next(batches)
    processes = set(multiprocessing.active_children()) - others
    assert len(processes) == 2
    del batches, training, evaluation
    wait_for(lambda: all(process.exitcode is not None for process in processes), seconds=20)


def refuse(_: int) -> None:
    raise ValueError("cannot be set up")


def test_an_error_in_set_up_reaches_the_training_process() -> None:
    with pytest.raises(ValueError, match="cannot be set up"):
        next(iter(RestartingDataLoader(NUMBERS, num_workers=1, set_up_worker=refuse)))


def test_without_workers_there_is_no_set_up() -> None:
    assert [int(batch) for batch in RestartingDataLoader(NUMBERS, batch_size=None, set_up_worker=refuse)] == NUMBERS


class Failing(Dataset[int]):
    """Samples 0 and 1, then an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise self.error
        return index


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", [DataError, BrokenImageError])
def test_user_errors_in_workers_keep_their_type_and_line(kind: type[DataError], num_workers: int) -> None:
    batches = iter(RestartingDataLoader(Failing(kind("a.jpg: no: image")), batch_size=None, num_workers=num_workers))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(kind, match=r"^a\.jpg: no: image$"):
        next(batches)


def test_other_errors_in_workers_keep_the_traceback() -> None:
    with pytest.raises(ValueError, match=r"(?s)Caught ValueError in DataLoader worker.*in __getitem__.*a bug"):
        list(RestartingDataLoader(Failing(ValueError("a bug")), batch_size=None, num_workers=1))


@pytest.mark.parametrize(
    ("setting", "device", "cores", "expected"),
    [
        (3, "cuda", 16, 3),
        (0, "cpu", 16, 0),
        ("auto", "cuda", 16, 15),
        ("auto", "cuda", 1, 1),
        ("auto", "cuda", 128, MAX_AUTO_WORKERS),
        ("auto", "cpu", 16, 1),
    ],
)
def test_number_of_workers(setting: int | str, device: str, cores: int, expected: int) -> None:
    assert choose_num_workers(setting, torch.device(device), cores) == expected


@pytest.mark.parametrize(
    ("total", "usable", "local", "expected"),
    [(16, 16, 1, 16), (16, 4, 1, 4), (16, 16, 2, 8), (16, 8, 2, 8), (16, 8, 4, 2), (2, 2, 8, 1)],
)
def test_share_of_cores(monkeypatch: pytest.MonkeyPatch, total: int, usable: int, local: int, expected: int) -> None:
    """Of 16 cores, 8 usable by each of 2 processes are its own; by each of 4, they are shared."""
    monkeypatch.setattr(os, "cpu_count", lambda: total)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert share_of_cores() == expected
