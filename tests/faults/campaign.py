"""Campaign: faults are injected into runs until the time is over, and the ends of all runs are compared."""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults.injections import FAULTS, Fault, FindingError
from tests.faults.runs import Run, differing
from tests.faults.tasks import TASKS

EQUAL = "bit for bit equal"


@dataclass(frozen=True)
class Trial:
    """What one run went through.

    Attributes:
        fault, task, processes, seed: of the run; the moments of its faults follow from them, and from the machine.
        injections: what happened at each injection, in a few words.
        verdict: EQUAL, or in what the result differs from a run left alone, or what else went wrong.
        folder: output folder of a run that is not equal, which is kept.
    """

    fault: str
    task: str
    processes: int
    seed: int
    injections: tuple[str, ...]
    verdict: str
    folder: str = ""

    def __str__(self) -> str:
        happened = ", ".join(self.injections) or "ended before the fault"
        place = f"{self.fault:20} {self.task:14} {self.processes} process(es), seed {self.seed}"
        return f"{place}: {happened}; {self.verdict} {self.folder}".rstrip()

    @property
    def is_good(self) -> bool:
        return self.verdict == EQUAL


class Campaign:
    """Runs with faults, and for each task and number of processes one left alone to compare with.

    Args:
        folder: for datasets and runs.
        epochs: of each run.
        injections: at most so many per run; a random number.
        forked: leave out the imports of runs that no fault comes to; see `start_process`.
        gpu: compile mode of runs on GPUs; empty: they train on a CPU.
    """

    def __init__(
        self, folder: Path, *, epochs: int = 3, injections: int = 3, forked: bool = True, gpu: str = ""
    ) -> None:
        self.folder, self.epochs, self.injections, self.forked, self.gpu = folder, epochs, injections, forked, gpu
        self.expected: dict[tuple[str, int], dict[str, Any]] = {}

    def run(self, name: str, task: str, processes: int, *, save_steps: int, max_restarts: int = 0) -> Run:
        """Return a run, in mixed precision if it has one process or is on a GPU."""
        data = self.folder / f"data_{task}" if TASKS[task].make_data else None
        if data is not None and not data.exists():
            TASKS[task].make_data(data)  # type: ignore[misc]
        amp = processes == 1 or bool(self.gpu)
        return Run(
            self.folder / name,
            task=task,
            data=data,
            processes=processes,
            epochs=self.epochs,
            save_steps=save_steps,
            amp=amp,
            max_restarts=max_restarts,
            gpu=self.gpu,
        )

    def expected_result(self, task: str, processes: int) -> dict[str, Any]:
        """Return the result of a run left alone."""
        if (task, processes) not in self.expected:
            run = self.run(f"alone_{task}_{processes}", task, processes, save_steps=0)
            run.finish(forked=self.forked)
            self.expected[task, processes] = run.result()
        return self.expected[task, processes]

    def trial(self, fault: Fault, task: str, processes: int, seed: int) -> Trial:
        """Start a run, inject a fault several times, let it end, and compare its result."""
        expected = self.expected_result(task, processes)
        rng = random.Random(f"{fault.name} {task} {processes} {seed}")
        name = f"{fault.name}_{task}_{processes}_{seed}"
        run = self.run(name, task, processes, save_steps=rng.choice((2, 3, 5)))
        injections: list[str] = []
        try:
            for _ in range(rng.randint(1, self.injections)):
                if happened := fault.inject(run, rng):
                    injections.append(happened)
            run.finish(forked=self.forked)
            parts = differing(expected, run.result())
            verdict = f"DIFFERENT: {', '.join(parts)}" if parts else EQUAL
        except (FindingError, RuntimeError) as error:
            verdict = f"FAULT: {error}"
        finally:
            run.close()
        if verdict == EQUAL:
            shutil.rmtree(run.output)
        kept = "" if verdict == EQUAL else str(run.output)
        return Trial(fault.name, task, processes, seed, tuple(injections), verdict, kept)


def combinations(
    faults: Iterable[str], tasks: Sequence[str], processes: Sequence[int], seed: int
) -> list[tuple[Fault, str, int]]:
    """Return all combinations in a random order, so that a short campaign has some of each kind."""
    every = [
        (FAULTS[fault], task, number)
        for fault in faults
        for task in tasks
        for number in processes
        if number >= FAULTS[fault].min_processes
    ]
    random.Random(seed).shuffle(every)
    return every


def run_campaign(
    campaign: Campaign, every: Sequence[tuple[Fault, str, int]], *, minutes: float, seed: int, rounds: int
) -> Iterator[Trial]:
    """Try the combinations in turn until the time is over."""
    end = time.monotonic() + 60 * minutes
    for number in range(rounds):
        for fault, task, processes in every:
            if time.monotonic() > end:
                return
            yield campaign.trial(fault, task, processes, seed + number)


def table(trials: Sequence[Trial]) -> str:
    """Return a Markdown table: a row per fault, per task how often it was injected with 1 + 2 + ... processes."""
    tasks = sorted({trial.task for trial in trials})
    numbers = sorted({trial.processes for trial in trials})
    lines = ["| fault | " + " | ".join(tasks) + " | what happened | end of the run |", "|---" * (len(tasks) + 3) + "|"]
    for name, fault in FAULTS.items():
        mine = [trial for trial in trials if trial.fault == name and (trial.injections or not trial.is_good)]
        if not mine:
            continue
        cells = [
            " + ".join(
                str(sum(len(x.injections) for x in mine if (x.task, x.processes) == (task, number)))
                for number in numbers
            )
            for task in tasks
        ]
        happened = Counter(word for trial in mine for word in trial.injections)
        ends = Counter(trial.verdict.split(":")[0] for trial in mine)
        lines.append(
            f"| {fault.title} | {' | '.join(cells)} | {describe(happened)} | "
            f"{EQUAL if list(ends) == [EQUAL] else describe(ends)} |"
        )
    return "\n".join(lines) + "\n"


def describe(counts: Counter[str]) -> str:
    return ", ".join(word if len(counts) == 1 else f"{word} ({count})" for word, count in counts.most_common())


def write_results(folder: Path, trials: Sequence[Trial]) -> None:
    """Write table.md and trials.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table(trials))
    (folder / "trials.jsonl").write_text("".join(json.dumps(asdict(trial)) + "\n" for trial in trials))
