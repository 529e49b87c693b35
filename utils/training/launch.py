"""Start and end of a process: errors become one clear line, or a traceback, and an exit code."""

import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

import torch

from utils.config.command_line import SECONDARY_RANK_DELAY_SECONDS, report_user_errors
from utils.config.errors import UserError, memory_reason
from utils.config.launcher import tell_launcher
from utils.config.standard_streams import flush_standard_streams
from utils.distributed.process import Process, is_program, start_process, stop_process
from utils.distributed.stop_signal import INTERRUPTED
from utils.logs.logger import logger
from utils.speed.compile_fallback import MISSING_C_COMPILER, MISSING_CPP_COMPILER
from utils.training.train_step import NonFiniteLossError

# Parts of messages by which an error of a library is recognized; libraries raise RuntimeError for all of them.
LOST_CONTACT = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
DEAD_LOADER_WORKER = "DataLoader worker (pid"  # what a worker raises is "Caught ... in DataLoader worker process"


class MissingCompilerError(UserError):
    """torch.compile needs a compiler that this machine does not have."""


@contextmanager
def explain_missing_compiler(setting: str) -> Iterator[None]:
    """Turn inductor's error about a missing C or C++ compiler, which the first call of a model raises, into one line.

    Args:
        setting: the key that asked for torch.compile, with its value.

    Raises:
        MissingCompilerError: in place of inductor's error; no other error is touched.
    """
    try:
        yield
    except RuntimeError as error:
        if is_from_library(error, MISSING_CPP_COMPILER):
            language, variable, remedy = "C++", "CXX", "g++"
        elif is_from_library(error, MISSING_C_COMPILER):
            language, variable, remedy = "C", "CC", "gcc"
        else:
            raise
        value = f"{variable} is {os.environ[variable]}" if variable in os.environ else f"{variable} is not set"
        raise MissingCompilerError(
            f"{setting}: torch.compile needs a {language} compiler, and found none that works ({value}); install one, "
            f"such as {remedy}, or leave it off"
        ) from error


def is_from_library(error: Exception, *parts: str) -> bool:
    """Return whether this is a RuntimeError whose type or message has one of these parts of the table above."""
    text = f"{type(error).__name__}: {error}"  # inductor's errors are wrapped once or twice, with their type as text
    return isinstance(error, RuntimeError) and any(part in text for part in parts)


def run_and_end(main: Callable[[], int]) -> NoReturn:
    """Run a program, then end this process at once with its exit code.

    Python's own end would wait for the compile workers, and free compiled code and CUDA graphs. After SIGTERM that took
    more than the 30 s after which launchers kill. The program has saved and closed everything.
    """
    is_program.set()
    gc.freeze()  # the garbage collector need not look at what imports have made, again and again while code is compiled
    gc.enable()  # which the main modules turn off for their imports
    try:
        code: object = main()
    except SystemExit as end:
        code = end.code or 0
    if not isinstance(code, int):
        sys.exit(str(code))
    flush_standard_streams()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


class LaunchedProcess:
    """Context in which this process works as one of those that the launcher started.

    An exception that ends the work is reported, in one line if a user can mend it, and becomes `exit_code`: 130 after
    Ctrl-C, 2 after a user error, 1 after any other error.

    Args:
        local_rank: rank on this machine, if the launcher did not put it into the environment.
        user_errors: errors that a user can mend.
        explain_out_of_memory: returns the message for running out of GPU memory.
    """

    def __init__(
        self,
        local_rank: int = 0,
        *,
        user_errors: tuple[type[Exception], ...] = (UserError,),
        explain_out_of_memory: Callable[[torch.OutOfMemoryError], str] = str,
    ) -> None:
        self.local_rank = local_rank
        self.user_errors = user_errors
        self.explain_out_of_memory = explain_out_of_memory
        self.exit_code = 0

    def __enter__(self) -> Process:
        with report_user_errors():
            self.process = start_process(self.local_rank)
        return self.process

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, KeyboardInterrupt):
            logger.warning("interrupted; the same command resumes a training run from its newest checkpoint")
            self.exit_code = INTERRUPTED
        elif isinstance(error, Exception):
            report(error, self.process, self.user_errors, self.explain_out_of_memory)
            is_users = isinstance(error, self.user_errors)
            tell_launcher(" ".join(f"{'error' if is_users else type(error).__name__}: {error}".split()))
            self.exit_code = 2 if is_users else 1
        elif error is not None:  # SystemExit
            self.process.has_stopped.set()
            return False
        flush_standard_streams()
        if self.exit_code and self.process.num_processes > 1:
            # Other processes may wait for this one forever, and so would an orderly exit: the launcher ends them.
            os._exit(self.exit_code)
        self.process.limit_stop(self.exit_code)
        stop_process(self.process)
        return True


def report(
    error: Exception,
    process: Process,
    user_errors: tuple[type[Exception], ...],
    explain_out_of_memory: Callable[[torch.OutOfMemoryError], str],
) -> None:
    """Log what ended this process: one line for errors that a user can mend, otherwise with the traceback."""
    rank = f"process {process.rank} of {process.num_processes}: " if process.num_processes > 1 else ""
    text = " ".join(str(error).split())
    if isinstance(error, NonFiniteLossError):  # raised by all processes
        if process.is_main:
            logger.error("%s", text)
    elif isinstance(error, user_errors):
        if not process.is_main:  # most likely the first process has the same error and reports it
            time.sleep(SECONDARY_RANK_DELAY_SECONDS)
        logger.error("%s%s", rank, text)
    elif isinstance(error, torch.OutOfMemoryError):
        logger.error("%s%s", rank, explain_out_of_memory(error))
    elif isinstance(error, MemoryError | RuntimeError) and (reason := memory_reason(error)):
        message = "%sout of memory (%s); lower DATA.BATCH_SIZE, DATA.NUM_WORKERS, or the sizes of images and model"
        logger.error(message, rank, reason)
    elif isinstance(error, torch.distributed.DistError) or is_from_library(error, *LOST_CONTACT):
        if not process.has_sigterm.is_set():  # the launcher ends this process after it has seen the first failure
            time.sleep(SECONDARY_RANK_DELAY_SECONDS)
        logger.error("%slost contact with the other processes, one of which has failed (%s)", rank, text[:200])
    elif is_from_library(error, DEAD_LOADER_WORKER):
        logger.error(
            "%sa worker process that loads images has died (%s). If it was killed, memory ran out: lower "
            "DATA.NUM_WORKERS or DATA.BATCH_SIZE, or raise the limit of shared memory (/dev/shm)",
            *(rank, text),
        )
    else:
        logger.error("%s%s: %s\n%s", rank, type(error).__name__, text, "".join(traceback.format_exception(error)))
