"""Processes of a command: started like a user's, or faster as a fork of a process that has imported everything."""

import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
IMPORTS = [
    *("main", "downstream.detection.main", "downstream.segmentation.main", "utils.report"),
    *("torch.distributed.run", "torch.utils.tensorboard", "sklearn.datasets", "matplotlib.pyplot"),
]
FORKS = multiprocessing.get_context("forkserver")


class Started(Protocol):
    """What subprocess.Popen and Forked have in common."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Forked:
    """A command in a fork of a process that imported its modules before; see `start_process`."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
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

    def send_signal(self, number: int) -> None:
        send(number, [self.pid])

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_process(
    args: Iterable[str],
    *,
    output: Path,
    error: Path,
    forked: bool,
    before: Callable[[], object] | None = None,
    gpu: bool = False,
) -> Started:
    """Start Python with arguments, in a session of its own and with one thread.

    Args:
        args: a file, -m and a module, or -c and a program, and their arguments.
        output, error: files to which standard output and standard error are appended.
        forked: leave out the imports, also of the processes that torchrun starts, for what they are not the point.
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
    FORKS.set_forkserver_preload(IMPORTS)
    current: Any = multiprocessing.current_process()
    current._config.setdefault("tempdir", tempfile.gettempdir())  # else a folder that it wants to delete at exit
    with mock.patch.dict(os.environ, environment):  # of the process to fork, which the first start makes
        rest = (str(output), str(error), before, dict(os.environ))
        return Forked(FORKS.Process(target=run_forked, args=(list(args), *rest)))


def run_forked(
    args: list[str], output: str, error: str, before: Callable[[], object] | None, environment: dict[str, str]
) -> None:
    """Run Python's arguments in this fork, as a new process would."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # among them the pipe whose last end ends the server
    tracker: Any = resource_tracker._resource_tracker  # of its own, as a command has
    tracker._fd = tracker._pid = None
    os.chdir(ROOT)
    for path, descriptor in ((output, 1), (error, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(file, descriptor)
        os.close(file)
    run_as_new(args, environment, before)


def run_as_new(args: list[str], environment: dict[str, str], before: Callable[[], object] | None = None) -> None:
    """Run Python's arguments in this fork in a session of its own, with the signal handlers of a new process."""
    os.setsid()
    gc.freeze()  # what imports have made
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    encoding, _, errors = environment.get("PYTHONIOENCODING", "").partition(":")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=encoding or None, errors=errors or None)  # type: ignore[union-attr]
    if before is not None:
        before()
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = fork_worker  # type: ignore[assignment, misc]
    if args[0] == "-m":
        sys.argv = args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    elif args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        exec(args[1], {"__name__": "__main__"})
    else:
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")


def fork_worker(args: Sequence[str], env: dict[str, str], **_: object) -> Forked:
    """Start a process of torchrun as a fork of it, in place of subprocess.Popen."""
    python, unbuffered, *rest = args
    assert (python, unbuffered) == (sys.executable, "-u"), args
    return Forked(multiprocessing.get_context("fork").Process(target=run_worker, args=(rest, env)))


def run_worker(args: list[str], environment: dict[str, str]) -> None:
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # as for a new program: sockets of the rendezvous, for example
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    run_as_new(args, environment)


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


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_all(process: Started) -> None:
    """Kill a process and all its descendants."""
    send(signal.SIGKILL, [process.pid, *descendants(process.pid)])
    process.wait(30)
