"""A DataLoader whose worker processes start reliably and report user errors in one line."""

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, _utils
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from utils.config.errors import UserError

START_SECONDS = 180.0  # a fork takes milliseconds; other start methods import everything again
# Python 3.14's default, a fork server, would start workers that outlive a killed training process: they end when their
# parent does, which is the server, and it ends after them. macOS keeps its default: its libraries may crash in forks.
START_METHOD = "fork" if sys.platform == "linux" else None
MAX_STARTS = 3
END_SECONDS = 2.0
TERM_SECONDS = 30.0  # after SIGTERM; launchers give training processes as long
MAX_AUTO_WORKERS = 32  # more than one GPU needs, and each takes memory

logger = logging.getLogger("mlla.data")


class WorkerStartError(UserError):
    """The worker processes of a DataLoader did not start."""


def ignore_signals(_: int) -> None:
    """Shield this worker from signals that are meant for training.

    Launchers send SIGTERM, and terminals Ctrl-C, to a whole group, and some tools, such as SLURM's, to each process.
    The training process must save a checkpoint first, which it could not with dead workers. It kills its workers
    itself, and they end when it is gone. Where a library sends them SIGTERM and waits, they end TERM_SECONDS later.
    """
    os.setpgrp()
    signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, TERM_SECONDS))  # SIGALRM ends it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def set_up_and_count(started: "Synchronized[int]", set_up: Callable[[int], None], worker: int) -> None:
    """Set up a worker and count it as started."""
    try:
        set_up(worker)  # the DataLoader reports what it raises
    finally:
        with started.get_lock():
            started.value += 1


class PromptIterator(_MultiProcessingDataLoaderIter):
    """An iterator of a DataLoader whose workers end within END_SECONDS, when it is no longer used.

    torch asks them to end and waits up to 5 s for each, one after the other: 15 workers once delayed the end of a
    stopped run by half a minute.

    Attributes:
        next_loader: see RestartingDataLoader.
        once_next: the same, for the current iteration.
    """

    next_loader: "RestartingDataLoader | None"
    once_next: "RestartingDataLoader | None" = None

    def _next_index(self) -> Any:
        try:
            return super()._next_index()
        except StopIteration:
            if self.next_loader is not None:
                self.next_loader.start()
            if self.once_next is not None:
                self.once_next.start()
                self.once_next = None
            raise

    def _shutdown_workers(self) -> None:
        timer = threading.Timer(END_SECONDS, self.kill_workers)
        timer.daemon = True
        if not sys.is_finalizing():  # when the workers have ended, and the start of a thread would wait forever
            timer.start()
        super()._shutdown_workers()
        timer.cancel()

    def kill_workers(self) -> None:
        """Kill the workers that are left; they have nothing to lose."""
        pinning: threading.Thread | None = getattr(self, "_pin_memory_thread", None)
        if pinning is not None and pinning.is_alive():  # it would report batches of dead workers as errors
            self._pin_memory_thread_done_event.set()
            self._worker_result_queue.put((None, None))
            pinning.join(END_SECONDS)
        if self._worker_pids_set:
            _utils.signal_handling._remove_worker_pids(id(self))  # the DataLoader takes a killed worker for an error
            self._worker_pids_set = False
        for worker in self._workers:
            worker.kill()


def kill_workers_of(reference: "weakref.ref[PromptIterator]") -> None:
    """Kill the workers of an iterator that still exists."""
    if (iterator := reference()) is not None:
        iterator.kill_workers()


class RestartingDataLoader(DataLoader):
    """A DataLoader that restarts its workers if one of them hangs before it has started.

    A fork copies the locks of all threads, but only one thread. In older releases of Python up to 3.11, a worker forked
    while another thread holds the interpreter's list of threads waits for it forever, and so would the DataLoader.

    Args:
        set_up_worker: called in each worker with the worker's number.
        before_start: called before the workers start, or without workers before each iteration.
        keeps_batches: keep the batches of the first whole iteration in memory, and give the same ones in later ones.
        options: passed to DataLoader, without worker_init_fn and multiprocessing_context.

    Attributes:
        next_loader: loader that is iterated next: its workers begin as soon as this one's run out of work.

    Raises:
        WorkerStartError: when iterated, if workers did not start in `MAX_STARTS` attempts.
    """

    def __init__(
        self,
        *args: Any,
        set_up_worker: Callable[[int], None] = ignore_signals,
        before_start: Callable[[], object] = lambda: None,
        keeps_batches: bool = False,
        **options: Any,
    ) -> None:
        self.started: Synchronized[int] = multiprocessing.get_context(START_METHOD).Value("i", 0)
        if options.get("num_workers"):
            options["multiprocessing_context"] = START_METHOD
        options["worker_init_fn"] = partial(set_up_and_count, self.started, set_up_worker)
        super().__init__(*args, **options)
        self.next_loader: RestartingDataLoader | None = None
        self.started_iterator: Any = None
        self.keeps_batches = keeps_batches
        self.before_start = before_start
        self.kept: list[Any] | None = None

    def __iter__(self) -> Any:
        if self.kept is not None:
            return iter(self.kept)
        iterator, self.started_iterator = self.started_iterator or super().__iter__(), None
        batches = one_line_user_errors(iterator) if self.num_workers else iterator
        return self.kept_after(batches) if self.keeps_batches else batches

    def kept_after(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Iterate; keep the batches if that comes to the end."""
        kept = []
        for batch in batches:
            kept.append(batch)
            yield batch
        self.kept = kept

    def start(self) -> None:
        """Let the workers, if there are any, load the first batches of the next iteration, as many as it prefetches."""
        if self.num_workers and self.started_iterator is None and self.kept is None:
            self.started_iterator = super().__iter__()

    def start_after(self, other: "RestartingDataLoader") -> None:
        """Start when the workers of another loader run out of work, which run now, or at once if it needs none."""
        iterator = other._iterator
        if isinstance(iterator, PromptIterator) and other.kept is None:
            iterator.once_next = self
        else:
            self.start()

    def _get_iterator(self) -> Any:
        self.before_start()
        if self.num_workers == 0:
            return super()._get_iterator()
        for _ in range(MAX_STARTS):
            self.started.value = 0
            iterator: Any = super()._get_iterator()
            iterator.__class__ = PromptIterator
            # Before Python's end sends SIGTERM to the workers, whose deaths the DataLoader would report as errors, and
            # before torch, which registered its own function just now, waits up to 5 s for each worker.
            atexit.register(Finalize(iterator, kill_workers_of, (weakref.ref(iterator),), exitpriority=0))
            iterator.next_loader = self.next_loader
            if self.have_started(iterator._workers):
                return iterator
            logger.warning("a DataLoader worker did not start within %g s; restarting all workers", START_SECONDS)
            iterator.kill_workers()  # one that waits for a lock heeds no other signal
            iterator._shutdown_workers()
        raise WorkerStartError(
            f"DATA.NUM_WORKERS {self.num_workers}: loader workers did not start in {MAX_STARTS} attempts; lower "
            "DATA.NUM_WORKERS, 0 loads without them"
        )

    def have_started(self, workers: list[multiprocessing.Process]) -> bool:
        """Wait until all workers have started; return False after a timeout. The DataLoader reports one that died."""
        deadline = time.monotonic() + START_SECONDS
        while self.started.value < len(workers) and all(worker.is_alive() for worker in workers):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True


def choose_num_workers(setting: int | str, device: torch.device, num_cores: int | None = None) -> int:
    """Return the number of workers per training process that DATA.NUM_WORKERS asks for.

    "auto" on a GPU is this process's share of the cores, less one for the process itself, from 1 to MAX_AUTO_WORKERS;
    on a CPU it is 1, since training takes all cores.

    Args:
        setting: a number, or "auto".
        device: where the model is trained.
        num_cores: cores for this process; by default `share_of_cores`.
    """
    if setting != "auto":
        return int(setting)
    if device.type == "cpu":
        return 1
    return min(max((num_cores or share_of_cores()) - 1, 1), MAX_AUTO_WORKERS)


def share_of_cores() -> int:
    """Return how many cores this process may use, as far as the processes of this machine share them."""
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine, set by the launcher
    is_bound = local > 1 and usable * local <= total  # a launcher has given each process cores of its own
    return usable if is_bound else max(usable // local, 1)


def more_workers(num_workers: int) -> str:
    """Return the advice to use more workers, with the number of cores, for a log line."""
    cores = share_of_cores()
    return f"raise DATA.NUM_WORKERS, which is {num_workers} ({cores} CPU core{'s'[: cores > 1]} for this process)"


def one_line_user_errors(batches: Iterable[Any]) -> Iterator[Any]:
    """Iterate; a UserError from a worker gets its own line back, where torch has put the worker's whole traceback."""
    try:
        yield from batches
    except UserError as error:
        lines = str(error).splitlines()
        if len(lines) == 1:
            raise
        raise type(error)(lines[-1].partition(": ")[2]) from error  # the last line is `module.Class: message`
