"""Processes of a command: started like a user's, or faster as a fork of a process that has imported everything."""

import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, Protocol
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
IMPORTS = [
    *("main", "downstream.detection.main", "downstream.segmentation.main", "utils.report"),
    *("torch.distributed.run", "torch.utils.tensorboard", "sklearn.datasets", "matplotlib.pyplot"),
]
FORKS = multiprocessing.get_context("forkserver")
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl
COMMAND_NAME = Path("/proc/self/comm")
FORKS_NAME = "worker forks"


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
    if args[0] == "-m" and args[1].startswith("torch.distributed."):
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess_handler.Popen = WorkerForks().start  # type: ignore[assignment, misc]
    if args[0] == "-m":
        sys.argv = args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    elif args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        exec(args[1], {"__name__": "__main__"})
    else:
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")


class ForkedWorker:
    """A process of torchrun that a `WorkerForks` forked, with what torchrun uses of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exit_code: int | None = None

    def poll(self) -> int | None:
        if self.exit_code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.exit_code = os.waitstatus_to_exitcode(status) if ended else None
        return self.exit_code

    def wait(self, timeout: float | None = None) -> int:
        end = math.inf if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked worker", timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        send(number, [self.pid])


class WorkerForks:
    """Forks torchrun's workers in a process of its own, which has no threads.

    Torchrun itself has some. A lock of the C library that another thread holds at the moment of a fork, such as the one
    of name resolution while a worker connects to the store, is never released in the new process.
    """

    def __init__(self) -> None:
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "fork before there are threads"
        self.connection, requests = multiprocessing.Pipe()
        if os.fork() == 0:
            self.connection.close()
            os.setsid()
            COMMAND_NAME.write_text(FORKS_NAME)
            serve_forks(requests)
        requests.close()

    def start(self, args: Sequence[str], env: dict[str, str], **_: object) -> ForkedWorker:
        """Start a worker as a child of this process, in place of subprocess.Popen."""
        python, unbuffered, *rest = args
        assert (python, unbuffered) == (sys.executable, "-u"), args
        adopt_orphans(True)
        self.connection.send((rest, env))
        pid = self.connection.recv()
        self.connection.recv()  # its parent has ended
        adopt_orphans(False)
        return ForkedWorker(pid)


def adopt_orphans(adopts: bool) -> None:
    """Let processes whose parent ends become children of this one, if it is the nearest ancestor that wants them."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(adopts), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def serve_forks(requests: Connection) -> NoReturn:
    """Fork a worker for each request until torchrun ends. Its parent ends at once, and torchrun adopts it."""
    with contextlib.suppress(EOFError, OSError):  # torchrun has ended, or was killed meanwhile
        while True:
            request = requests.recv()
            if os.fork() == 0:
                worker = multiprocessing.get_context("fork").Process(target=run_worker, args=(os.getpid(), *request))
                worker.start()
                requests.send(worker.pid)
                os._exit(0)
            os.wait()
            requests.send("its parent has ended")
    os._exit(0)


def run_worker(parent: int, args: list[str], environment: dict[str, str]) -> None:
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # as for a new program
    while os.getppid() == parent:
        time.sleep(0.001)
    COMMAND_NAME.write_text("python")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    run_as_new(args, environment)


def children_of(pid: int) -> list[int]:
    """Return a process's children without a `WorkerForks`, none if it has ended."""
    try:
        children = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [child for child in children if command_name(child) != FORKS_NAME]


def command_name(pid: int) -> str:
    """Return a process's name as ps prints it, "" if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process; a launcher starts its workers in sessions of their own."""
    children = children_of(pid)
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
