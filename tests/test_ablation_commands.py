"""The commands behind the paper's tables: counts, training at small scale with going on, speed by tokens."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from models import ABLATIONS, ablation_study, ablation_table, scan_speed
from utils.benchmark import Throughput

RunMain = Callable[..., tuple[int, str, str]]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([ablation_table.Counts(30.8, 4.5), *[ablation_table.Counts(28.0, 4.5)] * 11])
    monkeypatch.setattr(ablation_table, "count", lambda _row: next(counts))
    assert ablation_table.main(["--output", str(tmp_path / "table.md")]) == 0
    text = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == text
    rows = cells(text)[2:]
    assert [row[0] for row in rows] == [row.label for row in ABLATIONS]
    assert rows[0][1:5] == ["30.80", "28 (+10.0%)", "4.50", "4.5 (+0.0%)"]
    assert rows[2][5:] == ["78.4", "743 (0.64)"]


def test_table_with_speeds() -> None:
    speeds = {row.name: 100.0 - i for i, row in enumerate(ABLATIONS)}
    rows = cells(ablation_table.table([ablation_table.Counts(28, 4.5)] * 12, speeds))[2:]
    assert [rows[0][-1], rows[10][-1]] == ["100 (1.00)", "90 (0.90)"]


def test_table_to_nowhere(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ablation_table, "count", lambda _row: ablation_table.Counts(28, 4.5))
    assert ablation_table.main(["--output", str(tmp_path / "no" / "table.md")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


@pytest.fixture
def scale(tmp_path: Path) -> Path:
    """Smaller than small: one epoch of the digits at 8x8."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "DATA: {DATASET: digits, IMG_SIZE: 8, BATCH_SIZE: 128, NUM_WORKERS: 0}\n"
        "MODEL: {LINEAR_VIT: {EMBED_DIM: 8, DEPTHS: [1], NUM_HEADS: [2]}}\n"
        "TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 0, BASE_LR: 0.01}\nEMA: {ENABLED: False}\n"
        "AUG: {AUTO_AUGMENT: none, MIXUP: 0.0, CUTMIX: 0.0}\n"
    )
    return path


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, run_main: RunMain) -> list[list[str]]:
    """main.py is called in place of a process being started; what it is called with is noted."""
    calls: list[list[str]] = []

    def call(command: list[str], **_settings: object) -> int:
        assert command[1] == "main.py"
        calls.append(command[2:])
        return run_main(*command[2:])[0]

    monkeypatch.setattr(subprocess, "call", call)
    return calls


@pytest.fixture
def fixed_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation_study, "measure_in_turns", lambda models, **_: dict.fromkeys(models, 50.0))


@pytest.mark.usefixtures("fixed_speeds")
def test_study_goes_on_and_repeats_nothing(
    tmp_path: Path, scale: Path, in_this_process: list[list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", str(tmp_path / "out"), "--scale", str(scale), "--jobs", "1", "--rows", "baseline", "rope"]
    assert ablation_study.main([*words, "--seeds", "0", "1", "--minutes", "-1"]) == 3
    assert "0 runs are done, 4 are left" in capfd.readouterr().out
    assert not in_this_process
    assert ablation_study.main([*words, "--seeds", "0"]) == 0
    assert len(in_this_process) == 2
    assert ablation_study.main([*words, "--seeds", "0", "1"]) == 0
    assert len(in_this_process) == 4
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(line["row"], line["seed"]) for line in lines] == [
        ("baseline", 0),
        ("rope", 0),
        ("baseline", 1),
        ("rope", 1),
    ]
    metrics = tmp_path / "out/runs/linear_vit_rope/seed1_epochs1/metrics.jsonl"
    assert lines[-1]["acc1"] == json.loads(metrics.read_text())["acc1"]
    rows = cells((tmp_path / "out" / "results.md").read_text())
    mean = (lines[0]["acc1"] + lines[2]["acc1"]) / 2
    assert rows[2][0] == "baseline"
    assert rows[2][2].startswith(f"{mean:.2f} ± ")
    assert rows[3][3:] == ["1113 (0.97)", "50 (1.00)"]
    assert Image.open(tmp_path / "out" / "results.png").width > 500
    assert ablation_study.main([*words, "--seeds", "0", "--epochs", "2"]) == 0  # another budget: its own runs
    assert len(in_this_process) == 6


@pytest.mark.parametrize("rows", [["baseline", "softmax"], ["mamba_like"]])
def test_unknown_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[str]) -> None:
    assert ablation_study.main(["--output", str(tmp_path), "--rows", *rows]) == 2
    assert f"--rows {rows[-1]}: known are baseline, input_gate" in capsys.readouterr().err


def test_a_failed_run_says_where_to_look(
    tmp_path: Path, scale: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "call", lambda *_, **__: 1)
    words = ["--output", str(tmp_path / "out"), "--scale", str(scale), "--rows", "ape", "--seeds", "3"]
    assert ablation_study.main(words) == 2
    error = capsys.readouterr().err
    assert "ape, seed 3: main.py ended with code 1; see " in error
    assert "console.txt" in error


def test_speed_by_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scan_speed.main(["--tokens", "4", "9", "--most-steps", "4", "--output", str(tmp_path)]) == 0
    head, _, *rows = cells((tmp_path / "scan_speed.md").read_text())
    assert len(head) == 7
    assert [row[0] for row in rows] == ["4", "9"]
    assert all(float(value) > 0 for value in rows[0][1:])
    assert rows[1][-1] == ""  # step by step with gradients: too long
    assert Image.open(tmp_path / "scan_speed.png").width > 500
    assert "float32" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        scan_speed.main(["--tokens", "0", "--output", str(tmp_path)])


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import device, nn

    from utils import benchmark
    from utils.amp import make_precision

    speeds = {"a": iter([1.0, 3.0, 100.0]), "b": iter([5.0, 4.0, 6.0])}
    order = []

    def measured(_model: nn.Module, *, name: str, **_settings: object) -> Throughput:
        order.append(name)
        return Throughput(name, "", "", "", "", "", 1, 1, next(speeds[name]), 1.0, 1.0, 1, 1)

    monkeypatch.setattr(benchmark, "measure_throughput", measured)
    cpu = device("cpu")
    precision = make_precision(cpu, amp=False, dtype="auto")
    models = {"a": nn.Identity(), "b": nn.Identity()}
    found = benchmark.measure_in_turns(models, device=cpu, precision=precision, batch_size=1, image_size=8, rounds=3)
    assert order == ["a", "b"] * 3
    assert found == {"a": 3.0, "b": 5.0}
