"""Processes of a command: started like a user's, or faster as a fork of a process that has imported everything."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).parent.parent.parent
IMPORTS = ["utils.training.run", "data.build", "downstream.detection.task", "downstream.segmentation.task"]
FORKS = multiprocessing.get_context("forkserver")


class Started(Protocol):
    """What subprocess.Popen and Forked have in common."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


class Forked:
    """A command in a fork of a process that imported its modules before; see `start_process`."""

    def __init__(self, process: "multiprocessing.context.ForkServerProcess") -> None:
        process.start()
        assert process.pid is not None
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked command", timeout or 0)
        return self.process.exitcode


def start_process(
    args: Iterable[str], *, output: Path, error: Path, forked: bool, before: Callable[[], object] | None, gpu: bool
) -> Started:
    """Start Python with arguments, in a session of its own and with one thread.

    Args:
        args: a file or -m and a module, and their arguments.
        output, error: files to which standard output and standard error are appended.
        forked: leave out the imports, in which nothing can go wrong that this start is to show.
        before: called in the new process before anything else.
        gpu: False hides GPUs.
    """
    environment = {"OMP_NUM_THREADS": "1", **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    if not forked:
        with output.open("a") as out, error.open("a") as err:
            return subprocess.Popen(
                [sys.executable, *args],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=before,
            )
    os.environ.update(environment)  # of the process to fork, which the first start makes
    FORKS.set_forkserver_preload(IMPORTS)
    current: Any = multiprocessing.current_process()
    current._config.setdefault("tempdir", tempfile.gettempdir())  # else a folder that it wants to delete at exit
    process = FORKS.Process(target=run_forked, args=(list(args), str(output), str(error), before, dict(os.environ)))
    return Forked(process)


def run_forked(
    args: list[str], output: str, error: str, before: Callable[[], object] | None, environment: dict[str, str]
) -> None:
    os.setsid()
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers; a fork server would start another one
    tracker: Any = resource_tracker._resource_tracker  # of its own, as a command has
    tracker._fd = tracker._pid = None
    os.environ.update(environment)
    for path, descriptor in ((output, 1), (error, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(file, descriptor)
        os.close(file)
    if before is not None:
        before()
    if args[0] == "-m":
        sys.argv = args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process; a launcher starts its workers in sessions of their own."""
    try:
        children = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except (FileNotFoundError, ProcessLookupError):
        return []
    return children + [other for child in children for other in descendants(child)]


def send(number: int, pids: Iterable[int]) -> None:
    """Send a signal to processes, some of which may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_all(process: Started) -> None:
    """Kill a process and all its descendants."""
    send(signal.SIGKILL, [process.pid, *descendants(process.pid)])
    process.wait(30)
