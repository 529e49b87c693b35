"""Worker processes in which the cases of the self-test compile and run beside each other.

What they compile is in Triton's cache on disk afterwards, from which this process loads it. The workers are forks of a
server that has imported what they need, once for all, and has no CUDA context, since its forks could not use the GPU.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import current_process, forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the main process decides what they do
TIMEOUT_SECONDS = 600.0
NICENESS = 10  # the main process, which compiles meanwhile, takes longer and goes first where cores are few
SERVER: Any = forkserver._forkserver  # type: ignore[attr-defined]
IMPORTED = [f"{__package__}.problems", __name__]  # by the server
SERVER_VARIABLES = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # torch.cuda.is_available without a CUDA context
FOLDERS: list[str] = []  # of the server's socket, which multiprocessing would only delete in an orderly end


def passed_in_workers(
    solve: Callable[[T], str],
    cases: Sequence[T],
    *,
    device: torch.device,
    num_workers: int,
    advance: Callable[[], object],
    meanwhile: Callable[[], object] = lambda: None,
) -> set[T]:
    """Return the cases that passed in worker processes. The others may have failed for the workers' reasons only.

    Args:
        solve: returns an empty string for a case that passed; it must be importable, and raise only errors of one case.
        cases: what to solve, the longest first.
        device: a GPU, on which each worker gets a CUDA context of its own, or the CPU.
        num_workers: number of processes.
        advance: called after each case.
        meanwhile: called once, while they work.

    Raises:
        Exception: the workers could not be started, or one of them died, or they took longer than TIMEOUT_SECONDS.
    """
    passed: set[T] = set()
    work = partial(add_passed, passed, solve, cases, device=device, num_workers=num_workers, advance=advance)
    try:
        start_server()
        work("forkserver", meanwhile)
    except (BrokenProcessPool, OSError, EOFError) as error:
        if isinstance(error, TimeoutError) or passed or device.type != "cuda":
            raise
        work("spawn", lambda: None)  # a library may have made a CUDA context in the server, or the server has died
    finally:
        stop_server()
    return passed


def start_server() -> None:
    """Let the server begin its imports, if it does not run already; returns at once."""
    if SERVER._forkserver_pid is not None:
        return
    resource_tracker.ensure_running()  # whose start unblocks SIGTERM and SIGINT
    config: dict[str, Any] = current_process()._config  # type: ignore[attr-defined]
    shared = config.get("tempdir")
    FOLDERS.append(tempfile.mkdtemp(prefix="mlla-"))
    with clean_start(), set_variables(SERVER_VARIABLES | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        config["tempdir"] = FOLDERS[-1]
        try:
            forkserver.set_forkserver_preload(IMPORTED)
            forkserver.ensure_running()
        finally:
            config["tempdir"] = shared


def stop_server() -> None:
    """End the server, whose forks have ended, if `start_server` has started it."""
    if SERVER._preload_modules is IMPORTED and SERVER._forkserver_pid is not None:
        with suppress(OSError):
            os.kill(SERVER._forkserver_pid, signal.SIGKILL)  # it may still import
            SERVER._stop()
    while FOLDERS:
        shutil.rmtree(FOLDERS.pop(), ignore_errors=True)


@contextmanager
def set_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Context with these environment variables."""
    previous = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def add_passed(
    passed: set[T],
    solve: Callable[[T], str],
    cases: Sequence[T],
    method: str,
    meanwhile: Callable[[], object],
    *,
    device: torch.device,
    num_workers: int,
    advance: Callable[[], object],
) -> None:
    """Add the cases that passed to a set, as `passed_in_workers`, in workers started by a method of multiprocessing."""
    context = get_context(method)
    reader, writer = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(num_workers, context, initializer=start_worker, initargs=(reader, device))
    workers = executor._processes  # a dictionary that fills up; `shutdown` gives the attribute up
    try:
        with clean_start():
            futures = {executor.submit(solve_quietly, solve, case): case for case in cases}
        meanwhile()
        for future in as_completed(futures, timeout=TIMEOUT_SECONDS):
            if future.result() == "":
                passed.add(futures[future])
            advance()
    finally:
        for worker in list(workers.values()):
            worker.kill()  # instead of waiting for its case, or 2 s for the orderly ends of CUDA contexts
        executor.shutdown(cancel_futures=True)
        writer.close()
        reader.close()


def solve_quietly(solve: Callable[[T], str], case: T) -> str:
    """Solve a case in a worker; running out of memory beside other workers says nothing about it."""
    try:
        return solve(case)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return f"out of memory: {error}"


def start_worker(reader: Connection, device: torch.device) -> None:
    """Let this worker end with its parent, and make its CUDA context, without which no case can be solved."""
    threading.Thread(target=end_with_parent, args=(reader,), daemon=True).start()
    torch.set_num_threads(1)
    os.nice(NICENESS)
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # for its one stream; with 32, as a run may have, few workers fit
    if device.type == "cuda":
        torch.cuda.set_device(torch.zeros(1, device=device).device)  # `device` may have no index


def end_with_parent(reader: Connection) -> None:
    """Exit when the parent has closed its end of the pipe, or has died."""
    try:
        reader.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


@contextmanager
def clean_start() -> Iterator[None]:
    """Context in which processes start with SIGNALS blocked, and without importing the user's script again.

    A start with "spawn" imports the file of __main__, which takes seconds and may have effects; here that is empty.
    Modules are found from where this one was, even if torch.hub has taken the folder off the path since.
    """
    main, path = sys.modules["__main__"], list(sys.path)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sys.modules["__main__"] = ModuleType("__main__")
    sys.path.append(str(Path(__file__).resolve().parents[__name__.count(".")]))
    try:
        yield
    finally:
        sys.path[:] = path
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
