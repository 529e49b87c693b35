"""Stopping a run: a signal or the end of the launcher reaches one process, and all agree on it."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from enum import IntEnum
from types import FrameType, TracebackType

import torch

from utils.distributed.process import max_over_processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS = 20.0  # after SIGTERM; torchrun and SLURM send SIGKILL after 30 s


class Cause(IntEnum):
    """Reason to stop a run; if processes have different ones, the highest counts."""

    NONE = 0
    LAUNCHER_ENDED = 1
    SIGUSR1 = 2
    SIGTERM = 3
    SAVING_FAILED = 4

    @property
    def text(self) -> str:
        return {
            Cause.LAUNCHER_ENDED: "the launcher has ended",
            Cause.SAVING_FAILED: "a checkpoint could not be saved",
        }.get(self, self.name)


class StopRequest:
    """Context in which SIGTERM and SIGUSR1 do not end the process but request a stop, so that the run can save first.

    A process whose torchrun was killed stops too.

    Args:
        on_timeout: called in a thread if the processes have not agreed on the stop GRACE_SECONDS after SIGTERM, for
            example since they compile or evaluate; ends the process. SIGUSR1 has no such limit.

    Attributes:
        asked: reason for this process to stop.
        cause: reason for all processes, from their last agreement.
    """

    def __init__(self, on_timeout: Callable[[], object] = lambda: None) -> None:
        self.on_timeout = on_timeout
        self.asked = Cause.NONE
        self.cause = Cause.NONE
        self.previous_handlers: dict[int, object] = {}
        self.numbers: socket.socket | None = None  # gets the number of each signal
        self.is_settled = threading.Event()
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            # Handlers written in Python wait for the main thread, which may be in a library, compiling or waiting.
            reader, self.numbers = socket.socketpair()
            self.numbers.setblocking(False)
            signal.set_wakeup_fd(self.numbers.fileno(), warn_on_full_buffer=False)
            os.register_at_fork(after_in_child=self.forget_in_child)
            self.previous_handlers = {number: signal.signal(number, self.note) for number in SIGNALS}
            threading.Thread(target=self.limit, args=(reader,), name="stop signal", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_settled.set()
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.numbers is not None:
            signal.set_wakeup_fd(-1)
            self.numbers.close()  # ends the thread
            self.numbers = None

    def limit(self, reader: socket.socket) -> None:
        """Wait for SIGTERM; then end the process unless all agree on the stop in time."""
        with reader:
            while numbers := reader.recv(64):
                if signal.SIGTERM in numbers:
                    self.ask(Cause.SIGTERM)
                    if not self.is_settled.wait(GRACE_SECONDS):
                        self.on_timeout()
                    return

    def forget_in_child(self) -> None:
        """Keep the signals of a forked process from counting as those of this one."""
        if self.numbers is not None:
            signal.set_wakeup_fd(-1)

    def note(self, number: int, _: FrameType | None) -> None:
        self.ask(Cause[signal.Signals(number).name])

    def ask(self, cause: Cause) -> None:
        self.asked = max(self.asked, cause)

    def agreed(self) -> Cause:
        """Return the reason to stop of any process, the same on each. All processes call it at the same step.

        It takes one all-reduce of a CPU tensor and never waits for a GPU.
        """
        if self.launcher is not None and os.getppid() != self.launcher:
            self.ask(Cause.LAUNCHER_ENDED)
        # A signal during the all-reduce is too late for this answer; `asked` keeps it for the next.
        self.cause = Cause(int(max_over_processes(torch.tensor(int(self.asked)))))
        if self.cause is not Cause.NONE:
            self.is_settled.set()
        return self.cause
