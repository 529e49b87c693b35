"""Processes that load images."""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from torch.utils.data import DataLoader

START_SECONDS = 180.0  # a fork takes milliseconds; other ways to start import everything anew
MOST_STARTS = 3

logger = logging.getLogger("mlla.data")


def leave_process_group(_: int) -> None:
    """In a worker: signals to the group of the training process no longer reach this worker.

    Launchers send SIGTERM, and terminals Ctrl-C, to all of a group. The training process has to save first, which it
    could not do with dead workers; it ends them itself, and they end when it is gone.
    """
    os.setpgrp()


def begin(started: "Synchronized[int]", set_up: Callable[[int], None], number: int) -> None:
    """A worker's first words: set it up, and count it among those that have started."""
    try:
        set_up(number)  # what it raises reaches the DataLoader
    finally:
        with started.get_lock():
            started.value += 1


class WatchfulDataLoader(DataLoader):
    """A DataLoader that starts its workers anew if one of them does not come to life.

    A fork copies the locks of all threads, but only one thread. In older releases of Python 3.11
    and before, a worker forked while another thread held the interpreter's list of threads waits for it forever, and so
    would the DataLoader.

    Args:
        set_up_worker: called with its number in each worker.
        options: DataLoader's, but for worker_init_fn.

    Raises:
        RuntimeError: when iterated, if workers did not start `MOST_STARTS` times.
    """

    def __init__(self, *args: Any, set_up_worker: Callable[[int], None] = leave_process_group, **options: Any) -> None:
        self.started: Synchronized[int] = multiprocessing.Value("i", 0)
        options["worker_init_fn"] = partial(begin, self.started, set_up_worker)
        super().__init__(*args, **options)

    def _get_iterator(self) -> Any:
        if self.num_workers == 0:
            return super()._get_iterator()
        for _ in range(MOST_STARTS):
            self.started.value = 0
            iterator: Any = super()._get_iterator()
            if self.are_alive(iterator._workers):
                return iterator
            logger.warning("a loader worker did not start within %g s; all are started again", START_SECONDS)
            iterator._shutdown_workers()  # after which a worker that is killed is no error any more
            for worker in iterator._workers:
                worker.kill()  # one that waits for a lock heeds no other signal
        raise RuntimeError(
            f"loader workers did not start, {MOST_STARTS} times in a row; lower DATA.NUM_WORKERS, 0 loads without them"
        )

    def are_alive(self, workers: list[multiprocessing.Process]) -> bool:
        """Wait until all have begun. One that died instead is left to the DataLoader, which says so."""
        deadline = time.monotonic() + START_SECONDS
        while self.started.value < len(workers) and all(worker.is_alive() for worker in workers):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True
