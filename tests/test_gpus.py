"""The command that measures a machine of several GPUs: its jobs, files and table; `python tests/gpus.py` runs it."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from data.sources.idx import IdxImages
from tests import gpus
from tests.faults.injections import Fault
from tests.machine import commands, exactness, measurements, survival, worker
from tests.machine.jobs import Guard, Job, Results, Row, run_jobs
from utils.distributed.process import Process

SPEED = {"model": "mlla_tiny", "work": "training", "batch": 512, "compile": "reduce-overhead", "scaling": None}
SPEED |= {"images_per_second": 5000.0, "milliseconds_per_batch": 102.4, "processes": 1}


def job(name: str, run: Callable[[Guard], Iterable[Row]], *, seconds: float = 30, is_timed: bool = False) -> Job:
    return Job("data", name, 2, run, seconds, is_timed)


def run_all(results: Results, *some: Job, seconds: float = 60) -> list[str]:
    """Run jobs, and return what is printed."""
    lines: list[str] = []
    run_jobs(some, results, end=time.monotonic() + seconds, num_together=2, say=lines.append)
    return lines


def test_a_failure_is_a_line_and_only_failed_jobs_run_again(tmp_path: Path) -> None:
    counts = {"good": 0, "bad": 0}

    def good(_: Guard) -> list[Row]:
        counts["good"] += 1
        return [Row("loading", 2, "4,000 img/s", "3,000", is_good=True, values={"speed": 4000.0})]

    def bad(_: Guard) -> Iterator[Row]:
        counts["bad"] += 1
        yield Row("waiting", 2, "7%", "5%", is_good=False)
        if counts["bad"] == 1:
            raise ValueError("a | b\nof the first start")

    some = (
        job("good", good, is_timed=True),
        job("bad", bad, is_timed=True),
    )  # one after the other: rows are in this order
    results = Results(tmp_path, {"chip": "H"})
    run_all(results, *some)
    assert sorted(results.write_table(["data"]).splitlines()[2:]) == [
        "| data | bad | 2 | ValueError: a / b of the first start |  | FAILED |",
        "| data | loading | 2 | 4,000 img/s | 3,000 | good |",
        "| data | waiting | 2 | 7% | 5% | MISSED |",
    ]
    assert results.has_faults(["data"])
    assert not results.has_faults(["startup"])

    again = Results(tmp_path, {"chip": "H"})
    lines = run_all(again, *some)
    assert counts == {"good": 1, "bad": 2}
    assert "data: good, 2: done before" in lines
    assert list(again.values("data")) == [{"speed": 4000.0}, {}]
    assert "FAILED" not in again.write_table(["data"])
    assert (tmp_path / "table.md").read_text() == again.table(["data"])
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3

    run_all(Results(tmp_path, {"chip": "another"}), *some)
    assert counts == {"good": 2, "bad": 3}


def test_the_end_of_its_time_ends_a_job_and_its_processes(tmp_path: Path) -> None:
    guards = []

    def sleep(guard: Guard) -> list[Row]:
        guards.append(guard)
        commands.start(guard, ["-c", "import time; time.sleep(60)"], processes=1, output=tmp_path / "out.txt")
        guard.wait_for(lambda: False, of="answer")
        return []

    results = Results(tmp_path, {})
    run_all(results, job("sleep", sleep, seconds=0.3))
    (record,) = results.records.values()
    assert "within 0 s" in record["error"] or "time limit" in record["error"]  # either may notice first
    (held,) = guards[0].held
    assert held.process.poll() is not None
    lines = run_all(results, job("late", sleep), seconds=-1)
    assert "not started" in lines[0]
    assert len(guards) == 1


def test_a_command_that_fails_is_quoted(tmp_path: Path) -> None:
    guard = Guard(30)
    with pytest.raises(RuntimeError, match="exit code 3: why"):
        commands.run(guard, ["-c", "print('why'); raise SystemExit(3)"], processes=1, output=tmp_path / "out.txt")
    process = commands.start(guard, ["-c", ""], processes=1, output=tmp_path / "out.txt")
    with pytest.raises(RuntimeError, match="exit code 0 before first step"):
        guard.wait_for(lambda: False, process, of="first step")
    with pytest.raises(RuntimeError, match="no answer within 0 s"):
        Guard(0).wait_for(lambda: False, of="answer")


def test_timed_jobs_run_alone(tmp_path: Path) -> None:
    running: set[str] = set()
    seen: dict[str, int] = {}

    def work(name: str) -> Callable[[Guard], list[Row]]:
        def run(_: Guard) -> list[Row]:
            running.add(name)
            time.sleep(0.1)
            seen[name] = len(running)
            running.remove(name)
            return []

        return run

    kinds = {"a": False, "b": False, "c": True, "d": True}
    run_all(Results(tmp_path, {}), *(job(name, work(name), is_timed=timed) for name, timed in kinds.items()))
    assert max(seen["a"], seen["b"]) == 2
    assert (seen["c"], seen["d"]) == (1, 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--parts", "throughput"], "needs a GPU"),
        (["--parts", "speed"], "invalid choice"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
    ],
)
def test_refused_arguments(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and message == "needs a GPU":
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpus.main(args)
    assert message in capsys.readouterr().err


def test_jobs_of_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    made: list[Job] = []
    monkeypatch.setattr(gpus, "run_jobs", lambda all_jobs, *_, **__: made.extend(all_jobs))
    monkeypatch.setattr(gpus.signal, "signal", lambda *_: None)
    assert gpus.main(["--output", str(tmp_path)]) == 0
    assert list(dict.fromkeys(made_job.part for made_job in made)) == list(gpus.PARTS)
    assert len({made_job.key for made_job in made}) == len(made)
    assert {made_job.processes for made_job in made if made_job.part == "scaling"} == {2, 4}
    order = [made_job.is_timed for made_job in made]
    assert order == sorted(order)  # those that share the machine first, all together
    made.clear()
    gpus.main(["--output", str(tmp_path), "--parts", "data", "exactness", "--gpus", "1"])
    assert [made_job.part for made_job in made] == ["data"]


def test_process_counts() -> None:
    assert [gpus.process_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_difference_of_weights() -> None:
    one = {"a.weight": torch.tensor([3.0, 0]), "a.bias": torch.tensor([0.0, 4]), "b.weight": torch.ones(2)}
    other = {**one, "a.bias": torch.tensor([0.0, 4.5])}
    assert exactness.largest_difference(one, one) == 0
    assert exactness.largest_difference(one, other) == pytest.approx(0.5 / 5)
    with pytest.raises(ValueError, match="different models"):
        exactness.largest_difference(one, {})


def test_weights_after_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "STEPS", 1)
    args = argparse.Namespace(batch_size=2, dtype="float64", weights=tmp_path / "weights.pt")
    result = worker.steps(Process(0, 1, torch.device("cpu")), args)
    assert math.isfinite(result["loss"])
    assert {value.dtype for value in torch.load(args.weights).values() if value.is_floating_point()} == {torch.float64}


def test_metrics_of_an_evaluation_must_be_equal(tmp_path: Path) -> None:
    first = {"num_images": 10_001, "acc1": 9.5, "acc5": 50.0, "loss": 2.0}
    assert exactness.evaluation_rows({1: first, 2: {**first, "loss": 2.0000001}})[0].is_good
    for change in ({"loss": 2.001}, {"acc1": 9.51}, {"num_images": 10_002}):
        assert not exactness.evaluation_rows({1: first, 2: {**first, **change}})[0].is_good
    exactness.write_idx(tmp_path / "idx")
    images = IdxImages(str(tmp_path / "idx"), "val")
    assert (len(images), images.read(0).shape, len(images.classes)) == (10_001, (28, 28, 3), 10)


def test_rows_of_speeds() -> None:
    two = {**SPEED, "processes": 2, "scaling": 98.4, "milliseconds_per_batch": 104.0, "alone": [5000.0, 4900.0]}
    alone, together = measurements.throughput_rows("t", 512, [SPEED, two])
    assert (alone.is_good, alone.result) == (None, "5,000 img/s, 102.40 ms")
    assert (together.is_good, together.goal) == (False, "98.5%")
    assert together.result == "5,000 img/s, 104.00 ms, 98.4% of 5,000 + 4,900"
    assert measurements.throughput_rows("s", 64, [two])[0].is_good is None
    measured = {"exchange_gb_per_second": 200.0, "exchange_ms": 0.5, "megabytes": 97.6, "slices": 5}
    measured["bus_gb_per_second"] = {"32": 300.0}
    rows = measurements.exchange_rows(measured, [SPEED, two, {**two, "processes": 4}, {**SPEED, "batch": 128}], 2)
    assert [row.result for row in rows] == ["0.50 ms, 200 GB/s", "32 MiB: 300", "1.60 ms of 104.00"]


def test_waiting_for_files() -> None:
    speed = {"epoch": 1, "steps": 30, "train_seconds": 4.0, "data_wait_seconds": 0.5, "images_per_second": 1920.0}
    (row,) = measurements.waiting_rows([speed], 2)
    assert row.result == "1,920 img/s, waits 12.5%"


def test_steps_in_a_log() -> None:
    line = "[x] INFO Train: [2/9][3/22] loss 1\n"
    assert survival.has_step_after(f"resumed from y\n{line}", "resumed from")
    assert not survival.has_step_after(f"{line}resumed from y\n", "resumed from")
    assert not survival.has_step_after(line, "resumed from")


def test_what_was_measured_before_a_failure_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Guard, args: list[str], **__: object) -> None:
        folder = Path(args[args.index("--output") + 1]) / "mlla_tiny" / "default"
        folder.mkdir(parents=True)
        (folder / "throughput.jsonl").write_text(json.dumps(SPEED) + "\n")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(measurements, "run", fail)
    results = Results(tmp_path, {})
    (line,) = run_all(results, *measurements.throughput_jobs(tmp_path, "throughput", ["t512"], [2]))
    assert "5,000 img/s" in line
    assert "out of memory" in line
    assert [speed["milliseconds_per_batch"] for speed in results.values("throughput")] == [102.4]
    assert results.has_faults(["throughput"])


def test_a_run_left_alone_is_made_once_and_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[str] = []

    class FakeRun:
        def __init__(self, name: str) -> None:
            self.name = name

        def finish(self) -> None:
            began.append(self.name)

        def result(self) -> dict[str, str]:
            return {"model": self.name}

    all_survival = survival.Survival(tmp_path, gpu="", epochs=2, kills=1)
    monkeypatch.setattr(all_survival, "new_run", lambda _, name, processes, **__: FakeRun(f"{name} {processes}"))
    monkeypatch.setattr(survival, "FAULTS", {"kill-training": Fault("", "", lambda run, _: run.name)})
    all_jobs = {(item.name, item.processes): item for item in all_survival.jobs([1, 2])}
    (row,) = all_jobs["killed runs", 2].run(Guard(30))
    assert began == ["alone 2", "killed 2"]
    assert (row.is_good, row.result) == (False, "1 times; DIFFERENT: model")
    (row,) = all_jobs["run left alone", 2].run(Guard(30))
    assert row.result.startswith("2 epochs")
    assert began == ["alone 2", "killed 2"]
    assert {item.processes for item in all_survival.jobs([1])} == {1}
