import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from utils.config.errors import UserError
from utils.tools.study import Job, read_results, run_jobs


class Result(NamedTuple):
    name: str
    score: float


def jobs(folder: Path, count: int) -> list[Job]:
    return [Job(f"job {i}", ["--seed", str(i)], folder / f"run{i}") for i in range(count)]


def run(folder: Path, count: int = 4, **options: Any) -> int:
    return run_jobs(
        jobs(folder, count),
        lambda job, seconds: {"name": job.name, "score": 1.0} if job.name != "job 1" and seconds >= 0 else None,
        lambda result: f"{result['name']} is done",
        **{"results": folder / "results.jsonl", "num_parallel": 1, "minutes": 1.0, **options},
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Replace main.py; the command lines and environments that it gets."""
    found: list[tuple[list[str], dict[str, str]]] = []

    def call(command: list[str], *, env: dict[str, str], **_: Any) -> int:
        found.append((command[1:], env))
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    return found


def test_results_are_lines_of_a_file(
    tmp_path: Path, calls: list[tuple[list[str], dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was stopped has no result."""
    assert run(tmp_path) == 1
    assert [command for command, _ in calls] == [["main.py", "--seed", str(i)] for i in range(4)]
    assert sorted(read_results(tmp_path / "results.jsonl", Result)) == [Result(f"job {i}", 1.0) for i in (0, 2, 3)]
    assert "job 2 is done" in capsys.readouterr().out
    assert run(tmp_path, minutes=-1.0) == 4
    assert len(calls) == 4


def test_gpus_in_turns(
    tmp_path: Path, calls: list[tuple[list[str], dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("GIVEN", "outside")
    run(tmp_path, num_parallel=4, GIVEN="inside", OTHER="inside")
    assert {env["CUDA_VISIBLE_DEVICES"] for _, env in calls} <= {"0", "1"}
    assert {(env["GIVEN"], env["OTHER"]) for _, env in calls} == {("outside", "inside")}


def test_a_failed_run_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "call", lambda *_, **__: 1)
    with pytest.raises(UserError, match=r"job 0: main\.py exited with code 1; see \S+/run0/console\.txt"):
        run(tmp_path)


@pytest.mark.parametrize("line", ['{"name": "a", "sc', '{"name": "a"}', "[]"])
def test_lines_that_are_no_results(tmp_path: Path, line: str) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps({"name": "a", "score": 1}) + "\n" + line)
    with pytest.raises(UserError, match=r"results\.jsonl, line 2 is not a result"):
        read_results(tmp_path / "results.jsonl", Result)
