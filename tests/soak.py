"""Interrupt a training run many times, and compare its result with an uninterrupted run's, bit for bit.

python tests/soak.py                                all of it, about a quarter of an hour on two cores
python tests/soak.py --kills 5 --processes 2 --signal KILL
python tests/soak.py --gpu --signal KILL            on GPUs, with deterministic algorithms and the step as a CUDA graph

Each line of the table is one comparison: the last checkpoint's weights, EMA, optimizer and random number generators,
and metrics.jsonl. A signal that training ignores for several steps counts as a difference too.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
STEPS = re.compile(r" Train: \[\d+/\d+\]\[\d+/\d+\] ")  # in the log, every five steps
MAX_LINES = 4  # of steps, between a signal and the end of all processes
SMALL = ("MODEL.MLLA.EMBED_DIM", "8", "MODEL.MLLA.NUM_HEADS", "[1, 1, 1, 1]", "MODEL.DROP_RATE", "0.1")  # for a CPU
ON_GPU = ("TRAIN.DETERMINISTIC", "True", "TRAIN.COMPILE", "reduce-overhead")
SETTINGS = [
    *("MODEL.DROP_PATH_RATE", "0.2", "AUG.MIXUP", "0.5", "AUG.REPROB", "0.25", "AUG.MESA", "1.0"),
    *("TRAIN.WARMUP_EPOCHS", "1", "TRAIN.BASE_LR", "0.01", "PRINT_FREQ", "5", "DATA.NUM_WORKERS", "1"),
]


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process; a launcher starts its workers in sessions of their own."""
    try:
        children = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except FileNotFoundError:
        return []
    return children + [other for child in children for other in descendants(child)]


class Run:
    """A training command with its output folder and its processes."""

    def __init__(
        self,
        output: Path,
        *,
        processes: int,
        epochs: int,
        save_steps: int,
        amp: bool,
        max_restarts: int = 0,
        gpu: bool = False,
    ) -> None:
        self.folder = output / "mlla_digits" / "default"
        self.output = output
        self.gpu = gpu
        self.ignored_signals = 0
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher += [f"--max-restarts={max_restarts}"]
        args = ["main.py", "--cfg", "cfgs/digits.yaml", "--output", str(output), *(["--amp"] if amp else [])]
        args += ["--batch-size", str(64 // processes), "--opts", *SETTINGS, *(ON_GPU if gpu else SMALL)]
        args += ["TRAIN.EPOCHS", str(epochs), "TRAIN.SAVE_STEPS", str(save_steps)]
        self.command = [sys.executable, *(launcher if processes > 1 or max_restarts else []), *args]

    def start(self) -> "subprocess.Popen[str]":
        """Start the command in a session of its own; its output goes to <output>/printed.txt."""
        self.output.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", **({} if self.gpu else {"CUDA_VISIBLE_DEVICES": ""})}
        with (self.output / "printed.txt").open("a") as file:
            return subprocess.Popen(
                self.command, cwd=ROOT, env=env, stdout=file, stderr=file, text=True, start_new_session=True
            )

    def printed(self) -> str:
        path = self.output / "printed.txt"
        return path.read_text() if path.exists() else ""

    def step_lines(self) -> int:
        return len(STEPS.findall(self.printed()))

    def finish(self, timeout: float = 600) -> None:
        process = self.start()
        if code := process.wait(timeout):
            raise RuntimeError(f"exit code {code}:\n{self.printed()[-3000:]}")

    def interrupt(self, number: int, delay: float, *, started: bool = True) -> bool:
        """Start the command and send it a signal, SIGKILL to all its processes, others to the first.

        Args:
            number: the signal.
            delay: seconds to wait before the signal.
            started: count them from the first log line of a step; False: from the start of the command.

        Returns:
            False if the command ended before the signal.
        """
        lines = self.step_lines()
        process = self.start()
        while started and process.poll() is None and self.step_lines() == lines:
            time.sleep(0.02)
        time.sleep(delay)
        if process.poll() is not None:
            return False
        lines = self.step_lines()
        for pid in [process.pid, *(descendants(process.pid) if number == signal.SIGKILL else ())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        process.wait(120)
        self.ignored_signals += self.step_lines() > lines + MAX_LINES
        return True

    def result(self) -> dict[str, Any]:
        index = max(self.folder.glob("ckpt_epoch_*.pth"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
        content = torch.load(index, weights_only=True)
        kept = ("model", "state_dict_ema", "optimizer", "scaler", "epoch", "max_accuracy", "max_accuracy_e", "ranks")
        return {
            "checkpoint": index.name,
            "metrics": (self.folder / "metrics.jsonl").read_bytes(),
            **{name: content[name] for name in kept},
        }


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


def compare(
    folder: Path, *, number: int, kills: int, processes: int, amp: bool, epochs: int, seed: int, gpu: bool
) -> str:
    """Return one line of the table."""
    settings = {"processes": processes, "epochs": epochs, "amp": amp, "gpu": gpu}
    whole = Run(folder / "uninterrupted", save_steps=0, **settings)
    start = time.perf_counter()
    whole.finish()
    uninterrupted_seconds = time.perf_counter() - start
    often = Run(folder / "often", save_steps=7, **settings)
    rng, done = random.Random(seed), 0
    start = time.perf_counter()
    for kill in range(kills):
        # One in five before training begins: while modules are imported, or the checkpoint is read.
        early = kill % 5 == 4
        done += often.interrupt(number, rng.uniform(0.5, 4) if early else rng.uniform(0, 2.5), started=not early)
    often.finish()
    name = signal.Signals(number).name
    parts = differing(whole.result(), often.result()) + [f"{often.ignored_signals} signals ignored"] * bool(
        often.ignored_signals
    )
    verdict = "identical" if not parts else "DIFFERENT: " + ", ".join(parts)
    precision = "bfloat16" if settings["amp"] else "float32 "
    return (
        f"{name:8} {done:3} times  {settings['processes']} process(es)  {precision}  {verdict}  "
        f"(uninterrupted {uninterrupted_seconds:.0f} s, interrupted {time.perf_counter() - start:.0f} s)"
    )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--signal", nargs="+", default=["KILL", "TERM"])
    parser.add_argument("--gpu", action="store_true", help="train on GPUs, as many as processes")
    parser.add_argument("--seed", type=int, default=0, help="of the random delays before the signals")
    args = parser.parse_args(words)
    failed = False
    for processes in args.processes:
        for name in args.signal:
            amp = args.gpu or (name == "KILL" and processes == 1) or (name == "TERM" and processes == 2)
            with tempfile.TemporaryDirectory() as folder:
                line = compare(
                    Path(folder),
                    number=getattr(signal, f"SIG{name}"),
                    kills=args.kills,
                    processes=processes,
                    amp=amp,
                    epochs=args.epochs,
                    seed=args.seed,
                    gpu=args.gpu,
                )
            print(line, flush=True)
            failed = failed or "identical" not in line
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
