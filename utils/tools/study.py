"""Studies: many runs of main.py, each a process, whose results are lines of a file; the same command continues one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch

from utils.config.command_line import Parser, at_least
from utils.config.errors import UserError
from utils.logs.recorder import append_records

ROOT = Path(__file__).parent.parent.parent
Result = TypeVar("Result", bound=tuple[Any, ...])


class Job(NamedTuple):
    """A run of main.py: its name in messages, its command line, and the folder that it writes to."""

    name: str
    args: list[str]
    folder: Path


def add_arguments(parser: Parser, output: str, *, num_seeds: int = 5) -> None:
    """Add the options that all studies have: --output, --seeds, --amp and --minutes.

    Args:
        parser: of the study.
        output: default folder.
        num_seeds: the default is so many seeds, from 0 on.
    """
    parser.add_argument("--output", type=Path, default=Path(output), help="folder for runs and results")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=list(range(num_seeds)))
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")


def run_jobs(
    jobs: Sequence[Job],
    read_result: Callable[[Job, float], Mapping[str, Any] | None],
    describe: Callable[[Mapping[str, Any]], str],
    *,
    results: Path,
    num_parallel: int,
    minutes: float,
    **environment: str,
) -> int:
    """Run jobs, several at a time and on several GPUs in turns, and append their results to a file.

    Args:
        jobs: runs to do.
        read_result: returns the result of a job that took so many seconds, None if it was stopped before its end.
        describe: returns the line that is printed for a result.
        results: file of JSON lines.
        num_parallel: concurrent runs.
        minutes: no run is started after this time.
        environment: variables that are set unless they are set already.

    Returns:
        How many jobs are left.

    Raises:
        UserError: main.py failed; the message names its console log.
    """
    deadline, finished = time.monotonic() + 60 * minutes, 0
    gpus: SimpleQueue[int] = SimpleQueue()
    for i in range(num_parallel):
        gpus.put(i % max(1, torch.cuda.device_count()))
    with ThreadPoolExecutor(max_workers=num_parallel) as pool:
        futures = {pool.submit(run_main, job, deadline, gpus, environment): job for job in jobs}
        try:
            for future in as_completed(futures):
                seconds = future.result()
                result = None if seconds is None else read_result(futures[future], seconds)
                if result is not None:
                    finished += 1
                    append_records(results, [result])
                    print(describe(result), flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return len(jobs) - finished


def run_main(job: Job, deadline: float, gpus: "SimpleQueue[int]", environment: Mapping[str, str]) -> float | None:
    """Run main.py once on the next free GPU; return its seconds, or None if the deadline has passed."""
    if time.monotonic() > deadline:
        return None
    gpu = gpus.get()
    variables = {**environment, **os.environ}
    if torch.cuda.device_count() > 1:
        variables["CUDA_VISIBLE_DEVICES"] = str(gpu)
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        start = time.monotonic()
        with (job.folder / "console.txt").open("a") as console:
            command = [sys.executable, "main.py", *job.args]
            code = subprocess.call(command, cwd=ROOT, env=variables, stdout=console, stderr=console)
        seconds = time.monotonic() - start
    finally:
        gpus.put(gpu)
    if code:
        raise UserError(f"{job.name}: main.py exited with code {code}; see {job.folder / 'console.txt'}")
    return seconds


def read_results(path: Path, kind: Callable[..., Result]) -> list[Result]:
    """Return the results in a file, as a NamedTuple of their keys; none if there is no file.

    Raises:
        UserError: a line is no result.
    """
    results = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            results.append(kind(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number} is not a result ({error}); delete that line") from error
    return results
