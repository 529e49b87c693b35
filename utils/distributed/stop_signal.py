"""Stopping a run: a signal or the end of the launcher reaches one process, and all agree on it."""

import os
import signal
import threading
from enum import IntEnum
from types import FrameType, TracebackType

import torch

from utils.distributed.process import max_over_processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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

    Attributes:
        asked: reason for this process to stop.
        cause: reason for all processes, from their last agreement.
    """

    def __init__(self) -> None:
        self.asked = Cause.NONE
        self.cause = Cause.NONE
        self.previous_handlers: dict[int, object] = {}
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self.previous_handlers = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

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
        return self.cause
