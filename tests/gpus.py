"""Measure this machine's GPUs together: speed, scaling, exactness, and what runs do when processes die or hang.

python tests/gpus.py                                         all parts on all GPUs, in about fifteen minutes
python tests/gpus.py --gpus 2 --minutes 7                    two of them; what is left over is not started
python tests/gpus.py --parts survival exactness              some parts; on a CPU these and evaluation are there
python tests/gpus.py --parts exactness --gpus 8 --dtype float32 float64    on a CPU: 8 processes of gloo

The results of each job are added to <output>/results.jsonl as soon as it ends. The same command again runs what is not
there yet, or has failed. <output>/table.md is written at the end, and printed. Each job has a time limit; one that
fails is a line of the table, and the others run. The exit code is 1 if a job failed or missed its goal.

Parts, in this order; the first four share the machine:
  compile        the models of throughput and scaling
  survival       SIGKILL, SIGSTOP and SIGTERM to a process or all, in runs whose step is a CUDA graph; ends bit for bit
  exactness      weights after 20 steps, of N processes and of one with the same global batch
  evaluation     metrics on 10,001 images for any number of processes
  throughput     images per second and scaling of MLLA-T, -S and -B, with MESA and without
  exchange       the gradient exchange by itself and within a step, bandwidth of all-reduces
  deterministic  the cost of TRAIN.DETERMINISTIC
  data           training from JPEG files: images per second, and how long the steps wait
  startup        seconds from launch to the first step, with and without compiled kernels from before
  scaling        as throughput, with 2, 4, ... GPUs
"""

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from tests.faults.processes import descendants, send
from tests.machine.exactness import evaluation_jobs, exactness_jobs
from tests.machine.jobs import Job, Results, run_jobs
from tests.machine.measurements import (
    MODELS,
    compile_jobs,
    data_jobs,
    deterministic_jobs,
    exchange_jobs,
    startup_jobs,
    throughput_jobs,
)
from tests.machine.survival import Survival

CPU_PARTS = ("survival", "exactness", "evaluation")
TIMED_PARTS = ("throughput", "exchange", "deterministic", "data", "startup", "scaling")
PARTS = ("compile", *CPU_PARTS, *TIMED_PARTS)
CORES_PER_PROCESS = 1.25  # of jobs that run together: each process has a loader worker


def main(argv: Sequence[str] | None = None) -> int:
    num_gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="with batch sizes per GPU")
    parser.add_argument("--gpus", type=int, default=num_gpus or 2, help="processes, one per GPU (default: all, or 2)")
    parser.add_argument("--minutes", type=float, default=15, help="end after this time")
    parser.add_argument("--kills", type=int, default=3, help="of a run that is resumed")
    parser.add_argument("--epochs", type=int, help="of the runs that are killed (8, on a CPU 2)")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "float64"], help="of exactness")
    parser.add_argument("--output", type=Path, default=Path("output/gpus"), help="folder of the results")
    args = parser.parse_args(argv)
    if args.gpus < 1 or (num_gpus and args.gpus > num_gpus):
        limit = f"at most {num_gpus}, as many as this machine has" if args.gpus > 0 else "at least 1"
        parser.error(f"--gpus {args.gpus}: must be {limit}")
    available = PARTS if num_gpus else CPU_PARTS
    if missing := set(args.parts or ()) - set(available):
        parser.error(f"--parts {' '.join(sorted(missing))}: needs a GPU")
    parts = [part for part in available if part in (args.parts or available)]
    chip = torch.cuda.get_device_name(0) if num_gpus else f"CPU {platform.machine()}"
    results = Results(args.output, {"chip": chip, "torch": str(torch.__version__)})
    signal.signal(signal.SIGTERM, end_at_once)
    end = time.monotonic() + 60 * args.minutes
    together = max(1, int((os.cpu_count() or 1) / (CORES_PER_PROCESS * args.gpus)))
    try:
        jobs = make_jobs(args, parts, results, on_gpu=bool(num_gpus))
        run_jobs(jobs, results, end=end, num_together=together, say=say)
    finally:
        print(f"\n{results.write_table(parts)}\n{args.output}/table.md, results.jsonl", flush=True)
    return int(results.has_faults(parts))


def make_jobs(args: argparse.Namespace, parts: Sequence[str], results: Results, *, on_gpu: bool) -> list[Job]:
    """Return the jobs of the parts, in their order."""
    work, most = (args.output / "work").resolve(), args.gpus
    work.mkdir(parents=True, exist_ok=True)
    counts = process_counts(most)
    survival = Survival(
        work, gpu="graphs" if on_gpu else "", epochs=args.epochs or (8 if on_gpu else 2), kills=args.kills
    )
    makers: dict[str, Callable[[], list[Job]]] = {
        "survival": lambda: survival.jobs(counts),
        "exactness": lambda: exactness_jobs(work, counts, dtypes=args.dtype),
        "evaluation": lambda: evaluation_jobs(work, counts),
        "compile": lambda: compile_jobs(work, args.models, most),
        "throughput": lambda: throughput_jobs(work, "throughput", args.models, counts[-1:]),
        "scaling": lambda: throughput_jobs(work, "scaling", args.models, counts[1:-1]),
        "exchange": lambda: exchange_jobs(work, results, most),
        "deterministic": lambda: deterministic_jobs(work),
        "data": lambda: data_jobs(work, most),
        "startup": lambda: startup_jobs(work, most),
    }
    return [job for part in parts for job in makers[part]()]


def process_counts(most: int) -> list[int]:
    """Return 1, 2, 4 and so on below the most processes, and that number."""
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def end_at_once(*_: object) -> None:
    """End everything that was started, after SIGTERM."""
    send(signal.SIGKILL, descendants(os.getpid()))
    sys.exit(128 + signal.SIGTERM)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
