"""Heartbeat of a process: watches the next process and this process's GPU, and ends the run if one of them hangs."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

INTERVAL_SECONDS = 4.0
HANG_SECONDS = 40.0
HANG_SECONDS_DEVICE = 300.0  # replayed CUDA graphs have no timeout of NCCL's
FINISHED = 2**40  # added to the counter of a process that ended in order
RESUME = "start the same command again to resume from the newest checkpoint"

logger = logging.getLogger("mlla.distributed")


class Store(Protocol):
    """What is used of torch.distributed's Store."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: str, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...


class Event(Protocol):
    """What is used of torch.cuda.Event."""

    def query(self) -> bool: ...


class Heartbeat:
    """Two daemon threads: one counts in the launcher's store, the other ends this process if something hangs.

    Each process watches the next one, the last the first: one process that ends is enough, the launcher ends or
    restarts all. A process that compiles, evaluates or saves counts on. One that was suspended gives the others time.

    Args:
        store: a connection that only this object uses, since a call waits forever if the store's host hangs.
        rank: of this process.
        num_processes: at least 2.
        record_event: records an event behind the work queued on the GPU; None without a GPU.
        clock: returns seconds.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        num_processes: int,
        *,
        record_event: Callable[[], Event] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.rank = rank
        self.neighbor = (rank + 1) % num_processes
        self.record_event = record_event
        self.clock = clock
        self.count = 0  # of the neighbor
        self.neighbor_address: list[str] = []  # host, process and parent, once the neighbor has begun
        self.event: Event | None = None
        self.answer_time = self.change_time = self.event_time = self.check_time = clock()
        self.stopping = threading.Event()
        self.beat_thread = threading.Thread(target=self.run_beats, name="heartbeat", daemon=True)
        self.check_thread = threading.Thread(target=self.run_checks, name="heartbeat checks", daemon=True)

    def start(self) -> None:
        self.beat_thread.start()
        self.check_thread.start()

    def stop(self) -> None:
        """Tell the others that this process ends in order, unless the store does not answer."""
        self.stopping.set()
        self.beat_thread.join(timeout=INTERVAL_SECONDS)

    def watch_device(self) -> None:
        """Watch the work queued on the GPU so far, unless earlier work is being watched. Call it after each step."""
        if self.record_event is not None and self.event is None:
            self.event_time = self.clock()
            self.event = self.record_event()

    def run_beats(self) -> None:
        # The store's host may be gone, or end before this process: then `check` decides.
        with suppress(RuntimeError):
            self.store.set(f"heartbeat/address/{self.rank}", f"{socket.gethostname()} {os.getpid()} {os.getppid()}")
            self.beat()
            while not self.stopping.wait(INTERVAL_SECONDS):
                self.beat()
            self.store.add(f"heartbeat/{self.rank}", FINISHED)

    def beat(self) -> None:
        """Count, and read the neighbor's counter."""
        self.store.add(f"heartbeat/{self.rank}", 1)
        count = self.store.add(f"heartbeat/{self.neighbor}", 0)
        if count and not self.neighbor_address:
            self.neighbor_address = self.store.get(f"heartbeat/address/{self.neighbor}").decode().split()
        self.answer_time = self.clock()
        if count != self.count:
            self.count, self.change_time = count, self.answer_time

    def run_checks(self) -> None:
        while not self.stopping.wait(INTERVAL_SECONDS):
            if message := self.check():
                logger.error("process %d: %s", self.rank, message)
                self.kill_neighbor()
                os._exit(1)

    def check(self) -> str:
        """Return one line about what hangs, or an empty string."""
        now = self.clock()
        if now - self.check_time > 3 * INTERVAL_SECONDS:  # this process was suspended
            self.answer_time = self.change_time = self.event_time = now
        self.check_time = now
        if self.event is not None and self.is_finished(self.event):
            self.event = None
        if self.event is not None and now - self.event_time > HANG_SECONDS_DEVICE:
            return (
                f"its GPU has not finished a step for {now - self.event_time:.0f} s: another process has left the "
                f"exchange of gradients, or the GPU hangs; {RESUME}"
            )
        if self.count >= FINISHED:
            return ""
        if now - self.answer_time > HANG_SECONDS:
            host = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            return (
                f"the store of the processes at {host}, of the launcher or of process 0, has not responded for "
                f"{now - self.answer_time:.0f} s: its process is stopped or its machine hangs; end it, or {RESUME}"
            )
        if now - self.change_time > HANG_SECONDS:
            address = " on host {}, pid {},".format(*self.neighbor_address) if self.neighbor_address else ""
            return (
                f"process {self.neighbor}{address} has not responded for {now - self.change_time:.0f} s: it is "
                f"stopped or its machine hangs; end it, or {RESUME}"
            )
        return ""

    @staticmethod
    def is_finished(event: Event) -> bool:
        try:
            return event.query()
        except RuntimeError:  # an error of the GPU, which the training loop sees too
            return True

    def kill_neighbor(self) -> None:
        """Kill the neighbor if it has the same parent: a launcher gives it 30 s, but it may be suspended."""
        if self.neighbor_address and self.clock() - self.change_time > HANG_SECONDS:
            host, pid, parent = self.neighbor_address
            if host == socket.gethostname() and parent == str(os.getppid()):
                with suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)


def record_cuda_event() -> Event:
    event = torch.cuda.Event()
    event.record()
    return event
