"""Stopping a run: a signal or the end of the launcher reaches one process, and all agree on it."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType, TracebackType

import torch

from utils.distributed.process import max_over_processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_SECONDS = 20.0  # after SIGTERM; torchrun and SLURM send SIGKILL after 30 s
REPEAT_SECONDS = 1.0  # one Ctrl-C may come twice within so long: from the terminal, and from the launcher
INTERRUPTED = 130  # exit code after Ctrl-C


class Cause(IntEnum):
    """Reason to stop a run; if processes have different ones, the highest counts."""

    NONE = 0
    LAUNCHER_ENDED = 1
    SIGUSR1 = 2
    SIGINT = 3
    SIGTERM = 4
    SAVING_FAILED = 5

    @property
    def text(self) -> str:
        return {
            Cause.LAUNCHER_ENDED: "the launcher has ended",
            Cause.SIGINT: "Ctrl-C",
            Cause.SAVING_FAILED: "a checkpoint could not be saved",
        }.get(self, self.name)

    def exit_code(self, num_processes: int) -> int:
        """Return the exit code of a stopped run. The launcher of several processes had the Ctrl-C itself."""
        return INTERRUPTED if self is Cause.SIGINT and num_processes == 1 else 0


class StopRequest:
    """Context in which signals do not end the process but request a stop, so that the run can save first.

    These are SIGTERM, SIGUSR1, and Ctrl-C unless it was ignored before. A process whose torchrun was killed stops too.

    Args:
        on_timeout: called in a thread if the processes have not agreed on the stop GRACE_SECONDS after SIGTERM, for
            example since they compile or evaluate; ends the process. The same after Ctrl-C with a launcher, which
            waits no longer than that. SIGUSR1 has no such limit.
        on_interrupt: called in a thread at each Ctrl-C with their number, from 1.

    Attributes:
        asked: reason for this process to stop.
        cause: reason for all processes, from their last agreement.
    """

    def __init__(
        self, on_timeout: Callable[[], object] = lambda: None, on_interrupt: Callable[[int], object] = lambda _: None
    ) -> None:
        self.on_timeout, self.on_interrupt = on_timeout, on_interrupt
        self.num_interrupts, self.interrupted_at = 0, -REPEAT_SECONDS
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
            handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.previous_handlers = {number: signal.signal(number, self.note) for number in handled}
            threading.Thread(target=self.read, args=(reader,), name="stop signal", daemon=True).start()
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

    def read(self, reader: socket.socket) -> None:
        """React to signals at once, whatever the main thread does."""
        with reader:
            while numbers := reader.recv(64):
                if signal.SIGINT in numbers:
                    self.interrupt()
                if signal.SIGTERM in numbers or (signal.SIGINT in numbers and self.launcher is not None):
                    self.ask(Cause.SIGTERM if signal.SIGTERM in numbers else Cause.SIGINT)
                    threading.Thread(target=self.limit, name="time limit of the stop", daemon=True).start()

    def limit(self) -> None:
        """End the process unless all agree on the stop in time."""
        if not self.is_settled.wait(GRACE_SECONDS):
            self.on_timeout()

    def interrupt(self) -> None:
        """Count a Ctrl-C."""
        now = time.monotonic()
        is_repeated = now - self.interrupted_at < REPEAT_SECONDS
        self.interrupted_at = now
        if not is_repeated:
            self.ask(Cause.SIGINT)
            self.num_interrupts += 1
            self.on_interrupt(self.num_interrupts)

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
