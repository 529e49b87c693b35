"""Asking a run to stop: a signal, or the end of the launcher, noticed by one process and agreed on by all."""

import os
import signal
import threading
from enum import IntEnum
from types import FrameType, TracebackType

import torch

from utils.distributed.process import max_over_processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Cause(IntEnum):
    """Why a run should stop; where processes differ, the highest counts."""

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
    """While it is entered, SIGTERM and SIGUSR1 do not end the process but are noted, for the run to save and end.

    Workers whose torchrun was killed are nobody's any more; they stop too.

    Attributes:
        asked: why this process should stop.
        cause: why all should, as they last agreed.
    """

    def __init__(self) -> None:
        self.asked = Cause.NONE
        self.cause = Cause.NONE
        self.former: dict[int, object] = {}
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self.former = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def note(self, number: int, _: FrameType | None) -> None:
        self.ask(Cause[signal.Signals(number).name])

    def ask(self, cause: Cause) -> None:
        self.asked = max(self.asked, cause)

    def agreed(self) -> Cause:
        """Whether any process was asked to stop, the same answer on each; called by all processes at the same step.

        It costs one message between the hosts and never waits for a GPU.
        """
        if self.launcher is not None and os.getppid() != self.launcher:
            self.ask(Cause.LAUNCHER_ENDED)
        # A signal may come while they agree, too late for this answer: `asked` keeps it for the next.
        self.cause = Cause(int(max_over_processes(torch.tensor(int(self.asked)))))
        return self.cause
