"""Commands of the jobs: started as a user starts them, in sessions of their own, with their output in files."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.faults.processes import ROOT, Started, kill_all
from tests.machine.jobs import Guard

CACHES = ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


class Closing:
    """A process that `close` kills with its descendants, if it runs."""

    def __init__(self, process: Started) -> None:
        self.process = process

    def close(self) -> None:
        if self.process.poll() is None:
            kill_all(self.process)


def start(
    guard: Guard, args: Sequence[str], *, processes: int, output: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start Python with arguments, by torchrun if there are several processes; what it prints is added to a file."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), *args]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    guard.hold(Closing(process))
    guard.check()
    return process


def run(
    guard: Guard, args: Sequence[str], *, processes: int, output: Path, env: Mapping[str, str] | None = None
) -> None:
    """Run Python with arguments to its end.

    Raises:
        RuntimeError: its exit code is not 0; the message has the end of what it printed.
    """
    if code := start(guard, args, processes=processes, output=output, env=env).wait():
        raise RuntimeError(f"exit code {code}: {output.read_text(errors='replace')[-1500:]}")


def new_caches(folder: Path) -> dict[str, str]:
    """Return variables that let compiled kernels be kept in a folder, where there are none yet."""
    return {name: str(folder / name.lower()) for name in CACHES}
