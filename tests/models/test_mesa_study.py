import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from config import load_config
from models import build_model, mesa_study
from tests.helpers import add_records, exit_code

ACCURACY = {"mlla": 94.0, "convnext": 93.0, "swin": 92.0, "resnet": 91.0}
EPOCH_SECONDS = {"mlla": 4.0, "convnext": 2.0, "swin": 4.0, "resnet": 1.0}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace main.py: record its command lines, and write metrics in which MESA adds a point and doubles the time."""
    calls: list[list[str]] = []

    def call(command: list[str], **_: Any) -> int:
        calls.append(command)
        flags = "--cfg", "--output", "--tag", "SEED", "TRAIN.EPOCHS", "AUG.MESA"
        value = {flag: command[command.index(flag) + 1] for flag in flags}
        model, mesa = Path(value["--cfg"]).stem, float(value["AUG.MESA"])
        folder = Path(value["--output"]) / f"mesa_{model}" / value["--tag"]
        score = ACCURACY[model] + mesa + 0.1 * int(value["SEED"])
        for epoch in range(int(value["TRAIN.EPOCHS"])):
            metrics = {"epoch": epoch, "acc1": score, "ema_acc1": score - 0.5}
            speed = {"epoch": epoch, "train_seconds": EPOCH_SECONDS[model] * (1 + mesa)}
            add_records(folder, metrics=metrics, speed=speed)
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    return calls


def cells(path: Path) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in path.read_text().splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_both_budgets(tmp_path: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--output", tmp_path, "--seeds", "0", "1", "--epochs", "8"]
    assert exit_code(mesa_study.main, [*args, "--equal-time"]) == 2
    assert "no runs of equal steps of mlla; run the command without it first" in capsys.readouterr().err
    assert exit_code(mesa_study.main, [*args, "--minutes", "-1"]) == 3
    assert exit_code(mesa_study.main, args) == 0
    assert len(trained) == 4 * 2 * 2
    rows = cells(tmp_path / "equal_steps.md")
    assert rows["MLLA"][:3] == ["8", "94.05 ± 0.07", "95.05 ± 0.07"]
    assert rows["MLLA"][3].startswith("+1.00 (")
    assert exit_code(mesa_study.main, args) == 0
    assert len(trained) == 16
    assert exit_code(mesa_study.main, [*args, "--equal-time"]) == 0
    epochs = {name: row[0] for name, row in cells(tmp_path / "equal_time.md").items()}
    assert epochs == {"MLLA": "8, 4", "ConvNeXt": "16, 8", "Swin": "8, 4", "ResNet": "32, 16"}
    assert Image.open(tmp_path / "equal_time.png").width > 300


def test_one_seed(tmp_path: Path, trained: list[list[str]]) -> None:
    args = ["--output", tmp_path, "--seeds", "0", "--models", "resnet", "--epochs", "1", "--amp", "--opts", "TAG", "x"]
    assert exit_code(mesa_study.main, args) == 0
    assert cells(tmp_path / "equal_steps.md") == {"ResNet": ["1", "91.00", "92.00", "+1.00", ""]}
    assert "--amp" in trained[0]


@pytest.mark.parametrize("name", list(ACCURACY))
def test_models_have_equal_size_and_one_recipe(name: str) -> None:
    config, reference = (load_config(f"cfgs/mesa/{model}.yaml") for model in (name, "mlla"))
    assert {**config, "MODEL": None} == {**reference, "MODEL": None}
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in build_model(c).parameters()) for c in (config, reference)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.03)
