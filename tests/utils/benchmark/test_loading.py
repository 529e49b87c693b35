"""Training from files beside its loader alone: the measurement on a small model, the table and the chart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from config import load_config
from tests.helpers import make_image_folder
from utils.benchmark import loading
from utils.benchmark.loading import LoadingRow, advice_lines, draw_chart, loading_table
from utils.distributed.process import Process

CPU = Process(0, 1, torch.device("cpu"))
ROW = LoadingRow(
    **{"chip": "NVIDIA H200", "torch": "2.11.0", "precision": "bfloat16", "cores": "16 vCPUs of 8 physical cores"},
    **{"processes": 1, "workers": 15, "batch": 128, "settings": {"DATA.AUGMENT_ON": "gpu", "DATA.DECODE_ON": "cpu"}},
    **{"loading": 6000.0, "steps": 4700.0, "training": 4600.0, "waiting": 0.012, "stages": "70% decoding"},
    **{"advice": ""},
)


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The settings that are compared; measurements are short."""
    compared = [{"DATA.PIN_MEMORY": "True"}, {"DATA.PIN_MEMORY": "False"}]
    monkeypatch.setattr(main.Classification, "loading_choices", lambda *_: compared)
    monkeypatch.setattr(loading, "SECONDS", 0.01)
    monkeypatch.setattr(loading, "FILL_SECONDS", 0.01)
    monkeypatch.setattr(loading, "WARMUP_STEPS", 1)
    return compared


def test_each_batch_size_is_measured_with_each_choice_and_evaluation_once(
    choices: list[dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_image_folder(tmp_path / "data", train=4, val=3)
    small = "DATA.NUM_WORKERS 0 MODEL.MLLA.EMBED_DIM 8 MODEL.MLLA.NUM_HEADS [1,1,1,1] MODEL.MLLA.DEPTHS [1,1,1,1]"
    opts = ["DATA.DATASET", "folder", "DATA.CLASSES", "", "DATA.DATA_PATH", str(data), *small.split()]
    flags = {"OUTPUT": str(tmp_path), "THROUGHPUT_MODE": True, "BENCHMARK.LOADING": "2,4"}
    loading.run_loading(main.Classification(), load_config("cfgs/digits.yaml", opts, flags), CPU)
    folder = tmp_path / "mlla_digits" / "default"
    records = [json.loads(line) for line in (folder / "loading.jsonl").read_text().splitlines()]
    rows = [record for record in records if "batch" in record]
    assert [(row["batch"], row["settings"]) for row in rows] == [
        (size, choice) for size in (2, 4) for choice in choices
    ]
    for row in rows:
        assert 0 <= row["waiting"] <= 1
        assert min(row["loading"], row["steps"], row["training"]) > 0
        assert "decoding" in row["stages"]
        assert ("DATA.NUM_WORKERS" in row["advice"]) == (row["waiting"] > 0.05)
    (evaluation,) = (record for record in records if "batch" not in record)
    assert (evaluation["images"], evaluation["models"]) == (6, ["model", "EMA"])
    assert (folder / "loading.png").exists()
    assert "evaluation of 6 images by model and EMA" in capsys.readouterr().out


def test_the_table_names_what_its_rows_share_once() -> None:
    heading, names, first, second = loading_table([ROW, replace(ROW, batch=512, waiting=0.3)]).splitlines()
    assert heading.startswith("NVIDIA H200, 1 process, 16 vCPUs of 8 physical cores, 15 workers per process")
    assert names.split()[:3] == ["batch", "AUGMENT_ON", "DECODE_ON"]
    assert first.split()[:7] == ["128", "gpu", "cpu", "6000", "4700", "4600", "1.2%"]
    assert second.split()[0] == "512"


def test_advice_is_for_the_fastest_row_of_a_batch_size() -> None:
    slow = replace(ROW, training=3000.0, waiting=0.4, advice="augment on the GPU")
    late = replace(ROW, batch=512, waiting=0.1, advice="use more workers")
    line = "batch 512, AUGMENT_ON gpu, DECODE_ON cpu: steps wait 10.0%: use more workers"
    assert list(advice_lines([slow, ROW, late])) == [line]


def test_the_chart_has_three_bars_per_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(loading, "plot_grouped_bars", lambda *bars, **rest: drawn.update(rest, bars=bars))
    draw_chart([ROW, replace(ROW, cores="4 vCPUs", workers=3)], tmp_path / "chart.png")
    labels, values = drawn["bars"]
    rest = "workers\nAUGMENT_ON gpu, DECODE_ON cpu\nwaiting 1.2%"
    assert labels == [f"batch 128, 16 vCPUs of 8 physical cores, 15 {rest}", f"batch 128, 4 vCPUs, 3 {rest}"]
    assert values == {"loading alone": [6000] * 2, "steps alone": [4700] * 2, "training from files": [4600] * 2}


def test_all_places_are_compared_unless_one_is_set() -> None:
    gpu = torch.device("cuda")
    choices = main.Classification().loading_choices(load_config("cfgs/mlla_t.yaml"), gpu)
    assert [tuple(choice.values()) for choice in choices] == [("cpu", "cpu"), ("gpu", "cpu"), ("gpu", "gpu")]
    chosen = load_config("cfgs/mlla_t.yaml", ["DATA.AUGMENT_ON", "gpu"])
    assert main.Classification().loading_choices(chosen, gpu) == [{}]
    assert main.Classification().loading_choices(load_config("cfgs/mlla_t.yaml"), CPU.device) == [{}]
