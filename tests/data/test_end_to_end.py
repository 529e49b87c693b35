"""The benchmark of loading and training together, with a training that only leaves its records."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from data import benchmark
from utils.config import command_line

SMALL = "DATA.IMG_SIZE 32 AUG.SCALE [0.08,1.0] DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were to be run: each leaves the records of two epochs."""
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        folder = Path(command[command.index("--output") + 1]) / "run" / "default"
        folder.mkdir(parents=True)
        speed = {"train_seconds": 10.0, "data_wait_seconds": 2.0, "images_per_second": 80.0, "eval_seconds": 0.5}
        records = [speed | {"images_per_second": 1.0}, speed]
        (folder / "speed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return subprocess.CompletedProcess(
            command, returncode=int("fail" in " ".join(command)), stdout="why", stderr=""
        )

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_the_last_epoch_is_reported(commands: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--end-to-end", "--images", "8", "--opts", *SMALL.split()]) == 0
    assert len(commands) == (3 if torch.cuda.is_available() else 1)
    parsed = command_line.parse_command_line("", commands[0][2:], schema=main.SCHEMA)
    assert main.load_config(*parsed).TRAIN.EPOCHS == 3
    out = capsys.readouterr().out
    assert "8 JPEGs, 500x375" in out
    augment, decode, loading, *rest, stages = (cell.strip() for cell in out.split("\n|")[3].strip("|\n").split("|"))
    assert (augment, decode, rest) == (
        "cpu",
        "cpu",
        ["100", "80", "32", "20.0%"],
    )  # 16 images evaluated in half a second
    assert float(loading) > 0
    assert re.fullmatch(r"\d+% \w+, \d+% \w+, \d+% \w+", stages)


@pytest.mark.usefixtures("commands")
def test_a_training_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="failed:\nwhy"):
        benchmark.main(["--end-to-end", "--images", "8", "--opts", *SMALL.split(), "TAG", "fail"])
