"""Inductor's compile workers: signals to the process group do not reach them, and their death is noticed.

They are a process ("sidecar") with a pool of its own, in which torch.compile builds Triton kernels. The main process
waits for them without a timeout.
"""

import signal
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cache
from typing import Any

# The main process decides what they do: a launcher and a terminal send them to the whole group.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_SECONDS = 1.0


class CompileWorkersDiedError(RuntimeError):
    """The process of the compile workers ended while jobs were waiting."""


@cache
def start_compile_workers() -> Any:
    """Start the workers, if this torch has them in the known form, before anything is compiled.

    A new process inherits the blocked signals; the main process gets what came meanwhile afterwards.

    Returns:
        The pool, or None.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        from torch._inductor import config  # takes seconds, which runs without torch.compile are spared
        from torch._inductor.async_compile import AsyncCompile
        from torch.utils._triton import has_triton_package

        if not has_triton_package() or config.compile_threads == 1:
            return None
        pool: Any = AsyncCompile.process_pool()
    except (ImportError, AttributeError, OSError, RuntimeError):  # torch.compile starts them itself, if it can
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if not all(hasattr(pool, name) for name in ("process", "pending_futures", "futures_lock")):
        return None
    threading.Thread(target=fail_jobs_of_dead_pool, args=(pool,), name="compile workers", daemon=True).start()
    return pool


def fail_jobs_of_dead_pool(pool: Any) -> None:
    """Wait for the end of the workers' process, then let jobs that wait for it raise; older torch waits forever."""
    while pool.process.poll() is None:
        time.sleep(POLL_SECONDS)
    with pool.futures_lock:
        for future in pool.pending_futures.values():
            if not future.done():
                future.set_exception(CompileWorkersDiedError(f"exit code {pool.process.returncode}"))
        pool.pending_futures.clear()


def have_workers_died(error: BaseException) -> bool:
    """Return whether torch.compile failed with this error because a worker process has ended."""
    from torch._inductor import config

    if config.compile_threads == 1:
        return False
    pool = start_compile_workers()
    if pool is not None and pool.process.poll() is not None:
        return True
    link: BaseException | None = error
    for _ in range(20):
        if link is None:
            return False
        if isinstance(link, BrokenProcessPool | CompileWorkersDiedError):
            return True
        link = getattr(link, "inner_exception", None) or link.__cause__ or link.__context__
    return False


def compile_in_this_process() -> None:
    """Compile without workers from now on."""
    from torch._inductor import config

    config.compile_threads = 1
    with suppress(ImportError, AttributeError):  # it keeps jobs that have failed
        from torch._inductor.async_compile import CompiledTritonKernels

        CompiledTritonKernels.cache_clear()
