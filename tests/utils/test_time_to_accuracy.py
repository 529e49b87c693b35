import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import add_records, exit_code
from utils import time_to_accuracy
from utils.time_to_accuracy import Reached, TimedRun, reach, report

# Start-up takes 10 s, the first epoch 7 s of training and 3 s of evaluation more than the others, saving 0.5 s.
RUN = TimedRun(
    *("a.yaml", "digest", 0, "a GPU"),
    accuracy=[80.0, 94.9, 95.1, 95.0],
    process_seconds=[25.0, 28.5, 32.0, 35.5],
    train_seconds=[11.0, 2.0, 2.0, 2.0],
    eval_seconds=[4.0, 1.0, 1.0, 1.0],
)


def test_what_the_seconds_were_spent_on() -> None:
    assert reach(RUN, 95) == Reached(32.0, 10.0, 9.0 + 3.0, 3 * 2.0, 3 * 1.0, 2 * 0.5)
    assert reach(RUN, 50) == Reached(25.0, 10.0, 12.0, 2.0, 1.0, 0.0)
    assert reach(RUN, 96) is None


def test_medians_over_seeds() -> None:
    """A run that misses the target counts as endless, so that two of three decide."""
    slow = RUN._replace(seed=1, process_seconds=[35.0, 38.5, 42.0, 45.5])
    missed = RUN._replace(seed=2, accuracy=[80.0, 90.0, 91.0, 92.0])
    text = report([RUN, slow, missed], 95)
    assert "Seconds to 95% top-1 on a GPU; 2 of 3 runs reached it" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert rows[0] == ["seed", "total", "start-up", "compilation", "training", "evaluation", "other", "best, %"]
    assert rows[2] == ["0", "32.0", "10.0", "12.0", "6.0", "3.0", "1.0", "95.10"]
    assert rows[4] == ["2", "not reached", *[""] * 5, "92.00"]
    assert rows[5][:2] == ["median", "42.0"]
    assert report([missed], 95).splitlines()[-1].split("|")[2].strip() == "not reached"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace main.py; its runs have two epochs, and are 1% better with each seed."""
    found: list[list[str]] = []

    def call(command: list[str], **_: Any) -> int:
        found.append(command)
        value = {flag: command[command.index(flag) + 1] for flag in ("--output", "--tag", "SEED")}
        folder = Path(value["--output"]) / "mlla_digits" / value["--tag"]
        for epoch in range(2):
            metrics = {"epoch": epoch, "acc1": 90.0 + epoch, "ema_acc1": 91.0 + epoch + int(value["SEED"])}
            speed = {"epoch": epoch, "process_seconds": 10.0 * epoch + 9, "train_seconds": 3.0, "eval_seconds": 1.0}
            add_records(folder, metrics=metrics, speed=speed)
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    return found


def test_runs_are_not_repeated(tmp_path: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    opts = ["TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "0"]
    args = ["--cfg", "cfgs/digits.yaml", "--output", tmp_path, "--opts", *opts]
    assert exit_code(time_to_accuracy.main, [*args, "--target", "92", "--seeds", "0", "1", "--minutes", "-1"]) == 3
    assert "0 runs finished, 2 left" in capsys.readouterr().out
    assert exit_code(time_to_accuracy.main, [*args, "--target", "92", "--seeds", "0", "1"]) == 0
    assert "2 of 2 runs reached it" in capsys.readouterr().out
    assert "TRAIN.AUTO_RESUME" in calls[0]
    assert exit_code(time_to_accuracy.main, [*args, "--target", "93", "--seeds", "0", "1"]) == 0
    assert "1 of 2 runs reached it" in capsys.readouterr().out
    assert len(calls) == 2
    assert exit_code(time_to_accuracy.main, [*args, "AMP", "True", "--target", "93", "--seeds", "0"]) == 0
    assert len(calls) == 3  # other settings
