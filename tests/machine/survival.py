"""Runs whose processes are killed, suspended or asked to stop: how they end or resume, and after how long."""

import os
import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.campaign import EQUAL, Campaign
from tests.faults.injections import FAULTS
from tests.faults.processes import Started, children_of, descendants, is_running
from tests.faults.runs import STEPS, Run, differing
from tests.machine.jobs import Guard, Job, Row
from utils.checkpoint.files import checkpoints_in

TASK = "classification"
SAVE_STEPS = 5
LONG = 100_000  # epochs, of a run that is to be stopped
HANG_SECONDS = 60.0
STOP_SECONDS = 30.0
SECONDS = 200
STEP = re.compile(r" Train: \[(\d+)/\d+\]\[(\d+)/(\d+)\] ")
STOPPED = re.compile(r"SIGTERM: stopped in epoch (\d+) after step (\d+) of (\d+)")


class Survival:
    """Jobs of one machine.

    Args:
        folder: for the runs.
        gpu: compile mode on GPUs, empty on a CPU.
        epochs: of the runs whose ends are compared.
        kills: per run.
    """

    def __init__(self, folder: Path, *, gpu: str, epochs: int, kills: int) -> None:
        self.folder, self.gpu, self.epochs, self.kills = folder, gpu, epochs, kills
        self.results: dict[int, dict[str, Any]] = {}  # of runs left alone, by number of processes
        self.seconds: dict[int, float] = {}  # that they took
        self.locks: dict[int, threading.Lock] = defaultdict(threading.Lock)

    def jobs(self, counts: Sequence[int]) -> list[Job]:
        """Return the jobs for the smallest and the largest number of processes, the longest first."""
        most = max(counts)
        jobs: list[Job] = []

        def add(name: str, processes: int, run: Any, *rest: Any) -> None:
            def run_job(guard: Guard) -> list[Row]:
                self.expected(guard, most)  # the first start compiles kernels, which several together would do each
                return [run(guard, processes, *rest)]

            jobs.append(Job("survival", name, processes, run_job, SECONDS))

        if most > 1:
            add("suspended process", most, self.suspend)
        for processes in dict.fromkeys((most, min(counts))):
            add("run left alone", processes, self.leave_alone)
            add("killed runs", processes, self.kill_run)
        if most > 1:
            add("killed process", most, self.kill_process)
            add("SIGTERM to the launcher", most, self.stop, False)
        add("SIGTERM to all", most, self.stop, True)
        return jobs

    def new_run(self, guard: Guard, name: str, processes: int, *, epochs: int, save_steps: int, **settings: Any) -> Run:
        campaign = Campaign(self.folder, epochs=epochs, gpu=self.gpu)
        run = campaign.run(f"{name}_{processes}_{time.time_ns()}", TASK, processes, save_steps=save_steps, **settings)
        return guard.hold(run)

    def expected(self, guard: Guard, processes: int) -> dict[str, Any]:
        """Return the result of a run left alone, which the first call makes."""
        with self.locks[processes]:
            guard.check()
            if processes not in self.results:
                start = time.monotonic()
                run = self.new_run(guard, "alone", processes, epochs=self.epochs, save_steps=0)
                run.finish()
                self.results[processes], self.seconds[processes] = run.result(), time.monotonic() - start
            return self.results[processes]

    def leave_alone(self, guard: Guard, processes: int) -> Row:
        self.expected(guard, processes)
        seconds = self.seconds[processes]
        return Row("a run left alone", processes, f"{self.epochs} epochs, {seconds:.0f} s", values={"seconds": seconds})

    def kill_run(self, guard: Guard, processes: int) -> Row:
        """Kill all processes of a run at random moments, resume it each time, and compare its end."""
        run = self.new_run(guard, "killed", processes, epochs=self.epochs, save_steps=SAVE_STEPS)
        rng, count = Random(processes), 0
        for moment in ("training", "saving", "evaluating", *("training",) * self.kills)[: self.kills]:
            count += FAULTS[f"kill-{moment}"].inject(run, rng) is not None
            guard.check()
        run.finish()
        parts = differing(self.expected(guard, processes), run.result())
        return Row(
            "SIGKILL to all processes, resumed by the same command",
            processes,
            f"{count} times; {describe_end(parts)}",
            "the bits of a run left alone",
            not parts and count > 0,
            {"kills": count, "different": parts},
        )

    def kill_process(self, guard: Guard, processes: int) -> Row:
        """Kill the last process of a run that torchrun restarts, and compare its end."""
        run = self.new_run(guard, "restarted", processes, epochs=self.epochs, save_steps=SAVE_STEPS, max_restarts=1)
        process = run.start()
        guard.wait_for(lambda: run.newest() and run.step_lines(), process, of="first checkpoint")
        os.kill(process_of_rank(process, processes - 1), signal.SIGKILL)
        start, resumed = time.monotonic(), "resumed from"
        guard.wait_for(lambda: has_step_after(run.log(), resumed), process, of="step after the restart")
        seconds = time.monotonic() - start
        code = process.wait()
        if code:
            raise RuntimeError(f"exit code {code}: {run.printed()[-600:]}")
        parts = differing(self.expected(guard, processes), run.result())
        return Row(
            f"SIGKILL to process {processes - 1}, --max-restarts 1",
            processes,
            f"trained on after {seconds:.1f} s; {describe_end(parts)}",
            "resumes; the bits of a run left alone",
            not parts,
            {"seconds": seconds, "different": parts},
        )

    def suspend(self, guard: Guard, processes: int) -> Row:
        """Suspend the last process of a run, which must end with a line that names it."""
        run = self.new_run(guard, "suspended", processes, epochs=LONG, save_steps=0)
        process = run.start()
        guard.wait_for(lambda: run.step_lines() > 5, process, of="steps")
        everyone = [process.pid, *descendants(process.pid)]
        os.kill(process_of_rank(process, processes - 1), signal.SIGSTOP)
        start = time.monotonic()
        guard.wait_for(lambda: not any(map(is_running, everyone)), of="end of all processes")
        seconds = time.monotonic() - start
        is_named = f"process {processes - 1} " in "".join(re.findall(r".*has not responded.*", run.printed()))
        return Row(
            f"SIGSTOP to process {processes - 1}",
            processes,
            f"all ended after {seconds:.0f} s, {'naming it' if is_named else 'NOT naming it'}",
            f"{HANG_SECONDS:.0f} s at most, naming it",
            seconds <= HANG_SECONDS and is_named,
            {"seconds": seconds},
        )

    def stop(self, guard: Guard, processes: int, to_all: bool) -> Row:
        """Send SIGTERM to the first process, or to all, of a run, which must save and end."""
        run = self.new_run(guard, f"stopped_{to_all}", processes, epochs=LONG, save_steps=0)
        run.args += ["PRINT_FREQ", "1"]
        process = run.start()
        guard.wait_for(lambda: run.step_lines() > 5, process, of="steps")
        everyone = [process.pid, *descendants(process.pid)]
        ranks = children_of(process.pid) if processes > 1 else []
        before = steps_done(run)
        for pid in [process.pid, *(ranks if to_all else ())]:
            os.kill(pid, signal.SIGTERM)
        start = time.monotonic()
        guard.wait_for(lambda: STOPPED.search(run.log()), of="stop")
        saved_seconds = time.monotonic() - start
        guard.wait_for(lambda: not any(map(is_running, everyone)), of="end of all processes")
        seconds = time.monotonic() - start
        epoch, step, per_epoch = map(int, STOPPED.search(run.log()).groups())  # type: ignore[union-attr]
        steps = (epoch - 1) * per_epoch + step
        progress = checkpoints_in(run.folder)[0][0]
        is_saved = progress.epochs * per_epoch + progress.steps == steps
        return Row(
            "SIGTERM to all processes" if to_all else "SIGTERM to the launcher",
            processes,
            f"stopped {steps - before} steps and {saved_seconds:.1f} s later, "
            f"{'saved' if is_saved else 'NOT saved'}, all ended after {seconds:.1f} s",
            f"saved at that step, ended within {STOP_SECONDS:.0f} s",
            is_saved and seconds <= STOP_SECONDS,
            {"steps": steps - before, "stop_seconds": saved_seconds, "seconds": seconds},
        )


def process_of_rank(launcher: Started, rank: int) -> int:
    """Return the process with a rank among those that torchrun started."""
    for pid in children_of(launcher.pid):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise RuntimeError(f"there is no process {rank}")


def steps_done(run: Run) -> int:
    """Return the number of steps that a run has logged, from its start; the log counts epochs from 0."""
    epoch, step, per_epoch = map(int, STEP.findall(run.log())[-1])
    return epoch * per_epoch + step


def has_step_after(log: str, text: str) -> bool:
    return text in log and STEPS.search(log.rpartition(text)[2]) is not None


def describe_end(parts: Sequence[str]) -> str:
    return f"DIFFERENT: {', '.join(parts)}" if parts else EQUAL
