"""Commands of the ablation study: ablation_table, ablation_study, scan_speed."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from config import load_config
from models import ABLATIONS, ablation_study, ablation_table, scan_speed
from tests.helpers import exit_code
from utils.benchmark import measure
from utils.training.amp import make_precision

RunMain = Callable[..., tuple[int, str, str]]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_ablation_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([ablation_table.Counts(30.8, 4.5), *[ablation_table.Counts(28.0, 4.5)] * 11])
    monkeypatch.setattr(ablation_table, "count", lambda _row: next(counts))
    assert ablation_table.main(["--output", str(tmp_path / "table.md")]) == 0
    text = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == text
    rows = cells(text)[2:]
    assert [row[0] for row in rows] == [row.label for row in ABLATIONS]
    assert rows[0][1:5] == ["30.80", "28 (+10.0%)", "4.50", "4.5 (+0.0%)"]
    assert rows[2][5:] == ["78.4", "743 (0.64)"]


def test_ablation_table_with_speeds() -> None:
    speeds = {row.name: 100.0 - i for i, row in enumerate(ABLATIONS)}
    rows = cells(ablation_table.table([ablation_table.Counts(28, 4.5)] * 12, speeds))[2:]
    assert [rows[0][-1], rows[10][-1]] == ["100 (1.00)", "90 (0.90)"]


def test_ablation_table_to_a_missing_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ablation_table, "count", lambda _row: ablation_table.Counts(28, 4.5))
    assert exit_code(ablation_table.main, ["--output", str(tmp_path / "no" / "table.md")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


@pytest.fixture
def scale(tmp_path: Path) -> Path:
    """A scale of one epoch of the digits at 8x8."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "DATA: {DATASET: digits, IMG_SIZE: 8, BATCH_SIZE: 128, NUM_WORKERS: 0}\n"
        "MODEL: {LINEAR_VIT: {EMBED_DIM: 8, DEPTHS: [1], NUM_HEADS: [2]}}\n"
        "TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 0, BASE_LR: 0.01}\nEMA: {ENABLED: False}\n"
        "AUG: {AUTO_AUGMENT: none, MIXUP: 0.0, CUTMIX: 0.0}\n"
    )
    return path


ACCURACY = {("mlla_like", 0): 96.0, ("baseline", 0): 90.0, ("rope", 0): 95.0, ("baseline", 1): 92.0, ("rope", 1): 95.0}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace main.py: record its command lines, and write the metrics of ACCURACY."""
    calls: list[list[str]] = []

    def call(command: list[str], **_settings: object) -> int:
        assert command[1] == "main.py"
        calls.append(command)
        flags = "--cfg", "--output", "--tag", "SEED", "TRAIN.EPOCHS"
        value = {flag: command[command.index(flag) + 1] for flag in flags}
        row = Path(value["--cfg"]).stem
        folder = Path(value["--output"]) / f"linear_vit_{row}" / value["--tag"]
        records = [{"epoch": i, "acc1": ACCURACY[row, int(value["SEED"])]} for i in range(int(value["TRAIN.EPOCHS"]))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.setattr(ablation_study, "measure_in_turns", lambda models, **_: dict.fromkeys(models, 50.0))
    return calls


def test_study_resumes_and_repeats_no_run(
    tmp_path: Path, scale: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--output", str(tmp_path / "out"), "--scale", str(scale), "--jobs", "1", "--rows", "baseline", "rope"]
    assert ablation_study.main([*args, "--seeds", "0", "1", "--minutes", "-1"]) == 3
    assert "0 runs finished, 4 left" in capsys.readouterr().out
    assert not trained
    assert ablation_study.main([*args, "--seeds", "0"]) == 0
    assert len(trained) == 2
    assert ablation_study.main([*args, "--seeds", "0", "1"]) == 0
    assert len(trained) == 4
    rows = cells((tmp_path / "out" / "results.md").read_text())[2:]
    assert rows[0] == ["baseline", "77.6", "91.00 ± 1.41", "1152 (1.00)", "50 (1.00)"]
    assert rows[1] == ["+ RoPE", "80.0", "95.00 ± 0.00", "1113 (0.97)", "50 (1.00)"]
    assert rows[-1][:2] == ["+ RoPE", "+2.4"]
    assert rows[-1][2].startswith("+4.00 (")
    assert Image.open(tmp_path / "out" / "results.png").width > 500
    assert ablation_study.main([*args, "--seeds", "0", "--epochs", "2"]) == 0  # another budget has its own runs
    assert len(trained) == 6


def test_a_row_that_the_paper_does_not_report(tmp_path: Path, scale: Path, trained: list[list[str]]) -> None:
    args = ["--output", str(tmp_path), "--scale", str(scale), "--seeds", "0", "--rows", "baseline", "mlla_like"]
    assert ablation_study.main(args) == 0
    assert len(trained) == 2
    rows = cells((tmp_path / "results.md").read_text())[2:]
    assert rows[1] == ["MLLA's block", "", "96.00", "", "50 (1.00)"]


def test_stopped_run_is_no_result(tmp_path: Path, scale: Path, trained: list[list[str]]) -> None:
    def stopped(command: list[str], **_settings: object) -> int:
        command = list(command)
        command[command.index("TRAIN.EPOCHS") + 1] = "1"  # of the requested two
        return finish(command)

    finish = subprocess.call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "call", stopped)
        args = ["--output", str(tmp_path), "--scale", str(scale), "--rows", "rope", "--seeds", "0", "--epochs", "2"]
        assert ablation_study.main(args) == 3
    assert not (tmp_path / "results.jsonl").exists()
    assert ablation_study.main(args) == 0
    assert len(trained) == 2


def test_results_are_kept_by_precision(
    tmp_path: Path, scale: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A line without `amp` is a float32 result."""
    old = {"row": "rope", "seed": 0, "epochs": 1, "scale": "tiny", "acc1": 50.0, "seconds": 1.0}
    (tmp_path / "results.jsonl").write_text(json.dumps(old) + "\n")
    args = ["--output", str(tmp_path), "--scale", str(scale), "--rows", "rope", "--seeds", "0"]
    assert ablation_study.main(args) == 0
    assert not trained
    assert "50.00" in capsys.readouterr().out
    assert ablation_study.main([*args, "--amp"]) == 0
    assert trained[0][trained[0].index("--tag") + 1] == "seed0_epochs1_amp"
    assert "95.00" in capsys.readouterr().out
    assert ablation_study.main([*args, "--amp"]) == 0
    assert len(trained) == 1


def test_torn_line_of_results(tmp_path: Path, scale: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for torn in ('{"row": "rope", "se', '{"row": "rope"}'):
        (tmp_path / "results.jsonl").write_text(torn)
        assert exit_code(ablation_study.main, ["--output", str(tmp_path), "--scale", str(scale)]) == 2
        assert f"{tmp_path / 'results.jsonl'}, line 1 is not a result" in capsys.readouterr().err


@pytest.mark.slow
def test_study_runs_main(tmp_path: Path, scale: Path, run_main: RunMain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real main.py runs with the row's switches and the scale's sizes."""
    monkeypatch.setattr(subprocess, "call", lambda command, **_: run_main(*command[2:])[0])
    monkeypatch.setattr(ablation_study, "measure_in_turns", lambda models, **_: dict.fromkeys(models, 50.0))
    args = ["--output", str(tmp_path), "--scale", str(scale), "--rows", "cpe", "--seeds", "7", "--amp"]
    assert ablation_study.main(args) == 0
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    folder = tmp_path / "runs/linear_vit_cpe/seed7_epochs1_amp"
    assert json.loads(line)["acc1"] == json.loads((folder / "metrics.jsonl").read_text())["acc1"]
    config = load_config(folder / "config.yaml")
    assert config.MODEL.LINEAR_VIT.CPE
    assert config.MODEL.LINEAR_VIT.EMBED_DIM == 8
    assert (config.SEED, config.AMP) == (7, True)


@pytest.mark.parametrize("rows", [["baseline", "softmax"], ["mamba_like"]])
def test_study_rejects_unknown_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[str]) -> None:
    assert exit_code(ablation_study.main, ["--output", str(tmp_path), "--rows", *rows]) == 2
    assert f"--rows {rows[-1]}: must be among baseline, input_gate" in capsys.readouterr().err


def test_failed_run_names_its_console_log(
    tmp_path: Path, scale: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "call", lambda *_, **__: 1)
    args = ["--output", str(tmp_path / "out"), "--scale", str(scale), "--rows", "ape", "--seeds", "3"]
    assert exit_code(ablation_study.main, args) == 2
    error = capsys.readouterr().err
    assert "ape, seed 3: main.py exited with code 1; see " in error
    assert "console.txt" in error


@pytest.mark.slow
def test_scan_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scan_speed.main(["--tokens", "4", "9", "--most-steps", "4", "--output", str(tmp_path)]) == 0
    head, _, *rows = cells((tmp_path / "scan_speed.md").read_text())
    assert len(head) == 7
    assert [row[0] for row in rows] == ["4", "9"]
    assert all(float(value) > 0 for value in rows[0][1:])
    assert rows[1][-1] == ""  # step by step with gradients, beyond --most-steps
    assert Image.open(tmp_path / "scan_speed.png").width > 500
    assert "float32" in capsys.readouterr().out
    assert scan_speed.main(["--tokens", "4", "--forward-only", "--cpu-time", "--output", str(tmp_path)]) == 0
    assert len(cells((tmp_path / "scan_speed.md").read_text())[0]) == 4
    with pytest.raises(SystemExit):
        scan_speed.main(["--tokens", "0", "--output", str(tmp_path)])


@pytest.mark.parametrize("command", [ablation_study.main, scan_speed.main])
def test_output_that_is_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], int]
) -> None:
    (tmp_path / "file").touch()
    assert exit_code(command, ["--output", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert re.search(r"/file: cannot be written: (File exists|Not a directory); choose another --output\n$", error)


@pytest.mark.slow
def test_models_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {"a": [1.0, 3.0, 100.0], "b": [5.0, 4.0, 6.0]}  # images per second
    seconds = {name: iter([1.0, 1.0, 1.0, *(1 / rate for rate in rates)]) for name, rates in rounds.items()}
    order = []

    class Model(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, images: Tensor) -> Tensor:
            order.append(self.name)
            return images

    def run_calls(call: Callable[[], object], _device: object, _count: int) -> float:
        call()
        return next(seconds[order[-1]])

    monkeypatch.setattr(measure, "run_calls", run_calls)
    cpu = torch.device("cpu")
    precision = make_precision(cpu, amp=False, dtype="auto")
    models = {name: Model(name) for name in rounds}
    medians = measure.measure_in_turns(models, device=cpu, precision=precision, batch_size=1, image_size=8, rounds=3)
    assert order == [*"aaabbb", *["a", "b"] * 3]  # warm-up and the length of a round come first
    assert medians == pytest.approx({"a": 3.0, "b": 5.0})
