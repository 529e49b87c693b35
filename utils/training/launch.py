"""From a command line to processes at work, and from whatever ends them to one clear line and an exit code."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from utils.config.command_line import SECONDARY_RANK_DELAY_SECONDS, report_user_errors
from utils.config.errors import UserError
from utils.distributed.process import Process, start_process, stop_process
from utils.logs.logger import logger
from utils.training.train_step import NonFiniteLossError

LOST_CONTACT = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")

# What begins like this is for users to mend, though it is known only once the work has begun.
MENDABLE = ("MODEL.KERNELS ",)


class MissingCompilerError(ValueError):
    """torch.compile needs a compiler that this machine does not have."""


@contextmanager
def explain_missing_compiler(setting: str) -> Iterator[None]:
    """What is said where there is no C++ or C compiler becomes one line; it is known only when a model first runs.

    Args:
        setting: the key that asked for torch.compile, with its value.

    Raises:
        MissingCompilerError: in place of Inductor's error; no other error is touched.
    """
    try:
        yield
    except RuntimeError as error:
        # Inductor wraps it, by torch's version and the mode once or twice, and each time puts its name before its text.
        words = f"{type(error).__name__}: {error}"
        if "InvalidCxxCompiler: " in words:
            language, variable, remedy = "C++", "CXX", "g++"
        elif "Failed to find C compiler" in words:  # Triton, for a GPU
            language, variable, remedy = "C", "CC", "gcc"
        else:
            raise
        named = f"{variable} is {os.environ[variable]}" if variable in os.environ else f"{variable} is not set"
        raise MissingCompilerError(
            f"{setting}: torch.compile needs a {language} compiler, and found none that works ({named}); install one, "
            f"such as {remedy}, or leave it off"
        ) from error


def run_process(
    work: Callable[[Process], int],
    local_rank: int,
    *,
    compile_setting: str,
    explain_out_of_memory: Callable[[torch.OutOfMemoryError], str] = str,
) -> int:
    """Do the work as one process among all.

    Args:
        work: what to do; gives an exit code.
        local_rank: place on this machine, where the launcher did not put it into the environment.
        compile_setting: the key that says how the model is compiled, with its value.
        explain_out_of_memory: what to say where a GPU's memory does not suffice.

    Returns:
        The exit code: the work's own, 130 after Ctrl-C, 2 where a compiler is missing, 1 where it failed otherwise,
        which the log and standard error explain.
    """
    with report_user_errors():
        process = start_process(local_rank)
    try:
        with explain_missing_compiler(compile_setting):
            code = work(process)
    except KeyboardInterrupt:
        logger.warning("interrupted; the same command goes on from the newest checkpoint, if there is one")
        code = 130
    except MissingCompilerError as error:
        if not process.is_main:
            time.sleep(SECONDARY_RANK_DELAY_SECONDS)
        logger.error("%s", error)
        code = 2
    except Exception as error:
        report(error, process, explain_out_of_memory)
        code = 1
    if code and process.num_processes > 1:
        # Others may wait for this process for ever, and leaving in order would wait for them: the launcher ends them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    stop_process()
    return code


def report(
    error: Exception, process: Process, explain_out_of_memory: Callable[[torch.OutOfMemoryError], str] = str
) -> None:
    """Say what ended this process: one line for what users can mend, for the rest with its traceback."""
    who = f"process {process.rank} of {process.num_processes}: " if process.num_processes > 1 else ""
    text = " ".join(str(error).split())
    if isinstance(error, NonFiniteLossError):
        if process.is_main:
            logger.error("%s", text)
    elif isinstance(error, torch.OutOfMemoryError):
        logger.error("%s%s", who, explain_out_of_memory(error))
    elif isinstance(error, UserError):
        logger.error("%s%s", who, text)
    elif isinstance(error, torch.distributed.DistError) or any(word in text for word in LOST_CONTACT):
        time.sleep(SECONDARY_RANK_DELAY_SECONDS)  # the launcher ends this process, after it has seen the first to fail
        logger.error("%slost contact with the other processes, one of which has failed (%s)", who, text[:200])
    elif "DataLoader worker" in text:
        logger.error(
            "%sa worker process that loads images has died (%s). If it was killed, memory ran out: lower "
            "DATA.NUM_WORKERS or DATA.BATCH_SIZE, or raise the limit of shared memory (/dev/shm)",
            *(who, text),
        )
    elif isinstance(error, OSError) or text.startswith(MENDABLE):
        logger.error("%s%s", who, text)
    else:
        logger.error("%s%s: %s\n%s", who, type(error).__name__, text, "".join(traceback.format_exception(error)))
