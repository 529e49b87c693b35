"""Short training runs that faults are injected into, and the comparison of their results."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults.processes import Started, kill_all, start_process
from tests.faults.tasks import TASKS
from utils.checkpoint.files import checkpoints_in

STEPS = re.compile(r" Train: \[\d+/\d+\]\[(\d+)/(\d+)\] ")  # line of the log


class Run:
    """A training command with its output folder and its processes.

    Args:
        output: the output folder; what a run prints goes to printed.txt there.
        processes: with 2 or more, torchrun starts them.
        epochs, save_steps, amp: of the run.
        max_restarts: of torchrun.
        gpu: compile mode of a run on GPUs, with deterministic algorithms; empty: it trains on a CPU.
        task: a name in TASKS; `data` is the folder of its dataset.
    """

    def __init__(
        self,
        output: Path,
        *,
        processes: int,
        epochs: int,
        save_steps: int,
        amp: bool,
        max_restarts: int = 0,
        gpu: str = "",
        task: str = "classification",
        data: Path | None = None,
    ) -> None:
        command = TASKS[task]
        self.folder = output / command.name / "default"
        self.output = output
        self.printed_path = output / "printed.txt"
        self.gpu, self.processes = gpu, processes
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher += [f"--max-restarts={max_restarts}"]
        args = [*command.program, "--output", str(output), *(["--amp"] if amp else [])]
        args += [] if data is None else ["--data-path", str(data)]
        args += ["--batch-size", str(command.batch_size // processes), "--opts", *command.settings(epochs, gpu)]
        self.args = [*(launcher if processes > 1 or max_restarts else []), *args, "TRAIN.SAVE_STEPS", str(save_steps)]
        self.started: list[Started] = []

    def start(
        self, *, forked: bool = False, stdout: Path | None = None, before: Callable[[], object] | None = None
    ) -> Started:
        """Start the command; see `start_process`."""
        self.output.mkdir(parents=True, exist_ok=True)
        files = {"output": stdout or self.printed_path, "error": self.printed_path}
        process = start_process(self.args, **files, forked=forked and not self.gpu, before=before, gpu=bool(self.gpu))
        self.started.append(process)
        return process

    def close(self) -> None:
        """End what is left of the processes that were started, and move what is on a disk of its own."""
        for process in self.started:
            if process.poll() is None:
                kill_all(process)
        disk = self.folder.parent
        if disk.is_mount():
            copy = shutil.copytree(disk, disk.with_name("copy"))
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
            disk.rmdir()
            copy.rename(disk)

    def printed(self) -> str:
        return self.printed_path.read_text() if self.printed_path.exists() else ""

    def log(self, rank: int = 0) -> str:
        """Return the log of all starts, also where standard output is lost."""
        path = self.folder / f"log_rank{rank}.txt"
        return path.read_text() if path.exists() else ""

    def step_lines(self) -> int:
        return len(STEPS.findall(self.log()))

    def ends_of_epochs(self) -> int:
        """Return how many lines of the log are of an epoch's last step, after which it is saved and evaluated."""
        return sum(step == steps for step, steps in STEPS.findall(self.log()))

    def finish(self, timeout: float = 600, *, forked: bool = False) -> None:
        process = self.start(forked=forked)
        if code := process.wait(timeout):
            raise RuntimeError(f"exit code {code}:\n{self.printed()[-3000:]}")

    def newest(self) -> Path | None:
        """Return the newest checkpoint."""
        return next((path for _, path in checkpoints_in(self.folder)), None)

    def result(self) -> dict[str, Any]:
        newest = self.newest()
        assert newest is not None
        content = torch.load(newest, weights_only=True)
        kept = ("model", "state_dict_ema", "optimizer", "scaler", "epoch", "max_accuracy", "max_accuracy_e", "ranks")
        best = {path.name: torch.load(path, weights_only=True) for path in sorted(self.folder.glob("max_*.pth"))}
        return {
            "checkpoint": newest.name,
            "metrics": (self.folder / "metrics.jsonl").read_bytes(),
            "best": {name: (other["model"], other["state_dict_ema"]) for name, other in best.items()},
            **{name: content[name] for name in kept},
        }


def wait_while_running(process: Started, condition: Callable[[], object], seconds: float = 300) -> bool:
    """Wait until a condition holds; return False if the process ends, or the time is over, before."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def is_same(one: Any, other: Any) -> bool:
    """Return whether two nested values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the parts in which two results differ."""
    return [name for name in one if not is_same(one[name], other[name])]
