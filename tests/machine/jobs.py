"""Jobs that measure a machine: each has a time limit, and leaves rows in a file of JSON lines and in a table."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tests.faults.processes import Started

HEADS = ("part", "what", "processes", "result", "goal", "")
MARKS = {True: "good", False: "MISSED", None: ""}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        what: was measured or done.
        processes: that worked together.
        result: in words.
        goal: in words; "": none.
        is_good: whether the goal is reached; None: there is none.
        values: the result in numbers.
    """

    what: str
    processes: int
    result: str
    goal: str = ""
    is_good: bool | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


class CanClose(Protocol):
    """Something that holds processes, which `close` kills."""

    def close(self) -> object: ...


T = TypeVar("T", bound=CanClose)


class Guard:
    """Holds the processes of a job, and kills them at the end of its time.

    Args:
        seconds: time of the job.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self.held: list[CanClose] = []
        self.is_over = False

    def hold(self, item: T) -> T:
        """Close an item, such as a run with its processes, when the time is over."""
        self.held.append(item)
        return item

    def close(self) -> None:
        """End what is left of the processes."""
        self.is_over = True
        for item in self.held:
            item.close()

    def check(self) -> None:
        """Raise RuntimeError if the time is over."""
        if self.is_over:
            raise RuntimeError(f"not done within {self.seconds:.0f} s")

    def wait_for(self, condition: Callable[[], object], process: Started | None = None, *, of: str = "") -> None:
        """Wait until a condition holds.

        Raises:
            RuntimeError: the job's time is over, or the process has ended before; the message names `of`.
        """
        while not condition():
            if process is not None and process.poll() is not None and not condition():
                raise RuntimeError(f"ended with exit code {process.poll()} before {of}")
            if self.is_over or time.monotonic() > self.end:
                raise RuntimeError(f"no {of} within {self.seconds:.0f} s")
            time.sleep(0.01)


@dataclass(frozen=True)
class Job:
    """One of the things to measure.

    Attributes:
        part: that it belongs to; see tests/gpus.py.
        name: tells it apart from the other jobs of all parts.
        processes: that work together.
        run: the work; its guard gets the processes that it starts. Rows before an error count.
        seconds: time limit.
        is_timed: needs the machine for itself; others run together.
    """

    part: str
    name: str
    processes: int
    run: Callable[[Guard], Iterable[Row]]
    seconds: float
    is_timed: bool = False

    @property
    def key(self) -> str:
        return f"{self.part}: {self.name}, {self.processes}"


class Results:
    """Rows by job, in <folder>/results.jsonl, with a table of them in <folder>/table.md.

    Args:
        folder: of the two files; what an earlier call has left there is read.
        conditions: what each line says beside its rows, such as chip and torch.
    """

    def __init__(self, folder: Path, conditions: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.table_path = folder / "results.jsonl", folder / "table.md"
        self.conditions = dict(conditions)
        self.lock = threading.Lock()
        self.records: dict[str, dict[str, Any]] = {}  # the last one of each job
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):  # the last line may be cut off
                record = json.loads(line)
                self.records[record["job"]] = record

    def is_done(self, job: Job) -> bool:
        """Return whether a job has ended without an error before, on such a machine."""
        record = self.records.get(job.key)
        same = record is not None and all(record.get(name) == value for name, value in self.conditions.items())
        return same and not record["error"]  # type: ignore[index]

    def add(self, job: Job, rows: Sequence[Row], *, error: str, seconds: float) -> None:
        """Write a job's rows, and the error that ended it, if any."""
        record = {"job": job.key, "part": job.part, "processes": job.processes, "error": error}
        record |= {"seconds": round(seconds, 1), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        record |= {**self.conditions, "rows": [asdict(row) for row in rows]}
        with self.lock:
            self.records[job.key] = record
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def values(self, part: str) -> Iterator[Mapping[str, Any]]:
        """Yield the numbers of a part's rows."""
        for record in self.records.values():
            if record["part"] == part:
                yield from (row["values"] for row in record["rows"])

    def table(self, parts: Iterable[str]) -> str:
        """Return a Markdown table of the rows and errors, by part."""
        lines = [HEADS, ("---",) * len(HEADS)]
        for part in parts:
            for record in self.records.values():
                if record["part"] != part:
                    continue
                for row in record["rows"]:
                    cells = (row["what"], str(row["processes"]), row["result"], row["goal"], MARKS[row["is_good"]])
                    lines.append((part, *cells))
                if record["error"]:
                    name = record["job"].removeprefix(f"{part}: ").rpartition(",")[0]
                    lines.append((part, name, str(record["processes"]), record["error"], "", "FAILED"))
        return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)

    def write_table(self, parts: Sequence[str]) -> str:
        """Write the table to a file, and return it."""
        table = self.table(parts)
        self.table_path.write_text(table)
        return table

    def has_faults(self, parts: Sequence[str]) -> bool:
        """Return whether a job of these parts failed or missed its goal."""
        records = [record for record in self.records.values() if record["part"] in parts]
        return any(r["error"] or any(row["is_good"] is False for row in r["rows"]) for r in records)


def run_jobs(
    jobs: Sequence[Job], results: Results, *, end: float, num_together: int, say: Callable[[str], None]
) -> None:
    """Run jobs that are not done yet; a failure of one is its row, and does not end the rest.

    Args:
        jobs: in the order of their value. Neighbors that are not timed run together.
        results: get each job's rows as soon as it ends.
        end: time (`time.monotonic`) after which no job starts, and those that run are ended.
        num_together: jobs at a time, at most.
        say: prints a line.
    """
    for job in jobs:
        if results.is_done(job):
            say(f"{job.key}: done before")
    left = [job for job in jobs if not results.is_done(job)]
    for is_timed, group in groupby(left, key=lambda job: job.is_timed):
        with ThreadPoolExecutor(1 if is_timed else num_together) as pool:
            for future in as_completed([pool.submit(run_job, job, results, end) for job in group]):
                say(future.result())


def run_job(job: Job, results: Results, end: float) -> str:
    """Run a job until its time is over, write its rows, and return a line about it."""
    start = time.monotonic()
    seconds = min(job.seconds, end - start)
    if seconds <= 0:
        return f"{job.key}: not started, the time is over; the same command continues here"
    guard = Guard(seconds)
    timer = threading.Timer(seconds, guard.close)
    timer.daemon = True
    timer.start()
    rows: list[Row] = []
    error = ""
    try:
        for row in job.run(guard):
            rows.append(row)
    except Exception as failure:  # whatever it is, the other jobs run
        text = " ".join(f"{type(failure).__name__}: {failure}".split())
        limit = f"ended after its time limit of {seconds:.0f} s; " if guard.is_over else ""
        error = limit + (text if len(text) < 400 else f"{text[:100]} ... {text[-300:]}")
    finally:
        timer.cancel()
        guard.close()
    taken = time.monotonic() - start
    results.add(job, rows, error=error, seconds=taken)
    told = "; ".join(f"{row.what}: {row.result}" for row in rows)
    return f"{job.key}: {'; '.join(filter(None, (told, error)))} ({taken:.0f} s)"
