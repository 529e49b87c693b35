"""Measurements and output of --throughput; no times are asserted."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from yacs.config import CfgNode

from main import Classification
from utils.benchmark import measure
from utils.benchmark.measure import Conditions, Throughput, measure_inference, measure_training, run_calls
from utils.benchmark.throughput import pixel_table, throughput_table
from utils.logs.logger import logger
from utils.training.amp import make_precision
from utils.training.task import Task

RunMain = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "mlla_digits" / "default" / "throughput.jsonl").open()]


def test_number_of_calls_and_table() -> None:
    calls: list[int] = []
    conditions = Conditions(CPU, make_precision(CPU, amp=False, dtype="auto"), rounds=3, round_seconds=0.0)
    row = measure_inference(lambda: calls.append(1), conditions, name="nothing", batch_size=2, size=(8, 8))
    assert len(calls) == 3 + 1 + 3  # warm-up, one call to estimate the length of a round, three rounds of one call
    assert row.images_per_second == pytest.approx(2000 / row.milliseconds_per_batch)
    assert run_calls(lambda: None, CPU, 5) >= 0
    heading, line = throughput_table([row]).splitlines()
    assert heading.split()[:2] == ["model", "work"]
    assert line.split()[:2] == ["nothing", "inference"]


def test_lines_say_what_is_measured_and_how_long_slow_calls_take(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measure, "run_calls", lambda _call, _device, count: 40.0 * count)
    monkeypatch.setattr(logger, "handlers", [])  # of earlier tests' commands, which would note each line twice
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="mlla")
    conditions = Conditions(CPU, make_precision(CPU, amp=False, dtype="auto"))
    measure_inference(lambda: None, conditions, name="mlla_tiny", batch_size=128, size=(224, 224))
    assert caplog.messages == [
        "measuring inference of mlla_tiny, batch 128, size 224, on cpu: "
        "3 calls to warm up, then 5 rounds of 1 s, or of one call",
        "the first call took 00:40; the others take 05:20 at most",
    ]


@pytest.mark.slow
def test_rows_of_training_with_a_baseline(run_main: RunMain, tmp_path: Path) -> None:
    args = ["--cfg", "cfgs/digits.yaml", "--throughput", "--train", "--batch-size", "2", "--output", tmp_path]
    code, out, _ = run_main(*args, "--baseline", "timm:mambaout_femto", "--opts", "AUG.MESA", "1.0")
    assert code == 0
    rows = rows_of(tmp_path)
    assert [(row["model"], row["work"]) for row in rows] == [
        ("mlla_digits", "training"),
        ("mlla_digits", "training, MESA"),
        ("timm:mambaout_femto", "training"),
        ("timm:mambaout_femto", "training, MESA"),
    ]
    assert len(out.splitlines()) >= 5
    with Image.open(tmp_path / "mlla_digits" / "default" / "throughput.png") as image:
        assert image.width > 500


@pytest.mark.slow
def test_training_is_measured_without_mesa_even_if_mesa_starts_at_once(
    run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def watched(train_step: Any, batch: Any, conditions: Conditions, **options: Any) -> Throughput:
        asked.append((options["work"], train_step.compute_losses.variant(options["step"])))
        return measure_training(train_step, batch, conditions, **options)

    monkeypatch.setattr("utils.benchmark.throughput.measure_training", watched)
    args = ["--cfg", "cfgs/digits.yaml", "--throughput", "--train", "--batch-size", "2", "--output", tmp_path]
    assert run_main(*args, "--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "AUG.MESA", "1.0")[0] == 0
    assert asked == [("training", False), ("training, MESA", True)]


def test_sizes_have_rows_of_every_model_at_constant_pixels(
    run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(task: Task, config: CfgNode, *args: Any) -> Callable[[], object]:
        if config.DATA.IMG_SIZE == 64 and config.MODEL.TYPE != "mlla":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inference_call(task, config, *args)

    inference_call: Callable[..., Any] = Classification.inference_call
    monkeypatch.setattr(Classification, "inference_call", call)
    args = ["--cfg", "cfgs/digits.yaml", "--throughput", "--batch-size", "4", "--output", tmp_path]
    code, out, err = run_main(*args, "--sizes", "32,64", "--baseline", "timm:test_vit")
    assert code == 0
    rows = [(row["model"], row["size"], row["batch"]) for row in rows_of(tmp_path)[4:]]
    assert rows == [("mlla_digits", 32, 4), ("mlla_digits", 64, 1), ("timm:test_vit", 32, 4)]
    assert "timm:test_vit at 64x64 is left out: out of memory" in out + err
    with Image.open(tmp_path / "mlla_digits" / "default" / "sizes.png") as image:
        assert image.width > 2 * image.height


def test_the_cost_of_a_pixel_is_in_proportion_to_that_at_the_first_size() -> None:
    def row(model: str, side: int, milliseconds: float) -> Throughput:
        values = dict.fromkeys(("images_per_second", "rounds", "batches_per_round", "processes"), 1)
        words = dict.fromkeys(("work", "chip", "torch", "precision", "layout", "compile"), "")
        return Throughput(
            model=model, batch=2, size=side, milliseconds_per_batch=milliseconds, memory_mib=7.0, **words, **values
        )

    lines = pixel_table([row("a", 100, 0.02), row("a", 200, 0.16), row("b", 100, 0.04)]).splitlines()
    assert [line.split()[-3:] for line in lines[1:]] == [
        ["1.000", "1.00", "7"],
        ["2.000", "2.00", "7"],
        ["2.000", "1.00", "7"],
    ]


def test_mistakes_in_flags(run_main: RunMain, tmp_path: Path) -> None:
    args = ["--cfg", "cfgs/digits.yaml", "--throughput", "--output", tmp_path]
    for extra, expected in (
        (["--baseline", "convnext_tiny"], "must be timm:NAME, with commas between several"),
        (["--baseline", "timm:convnext_tinny"], "timm has no such model"),
        (["--sizes", "224,big"], "must be whole numbers from 8 to 16384, with commas between"),
    ):
        code, _, err = run_main(*args, *extra)
        assert code == 2
        assert expected in err
        assert len(err.strip().splitlines()) == 1
