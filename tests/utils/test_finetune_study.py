import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from yacs.config import CfgNode

from config import load_config
from tests.helpers import ROOT, add_records, exit_code
from utils import finetune_study
from utils.config.yaml_file import read_yaml
from utils.finetune_study import SETTINGS

DATASETS = {
    "fashion": finetune_study.Dataset("Fashion-MNIST", 2, 1),
    "digits": finetune_study.Dataset("Digits", 2, 1),
}


@pytest.fixture
def data_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fashion-MNIST of twelve images per class, of which pretraining holds out one."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    labels = np.arange(120, dtype=np.uint8) % 10
    images = np.random.default_rng(0).integers(0, 256, (120, 4, 4), dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    monkeypatch.setattr(finetune_study, "DATASETS", DATASETS)
    monkeypatch.setattr(finetune_study, "PRETRAINING_VAL", 1)
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Replace main.py: record flags, and write metrics by which the EMA is a point better where it is pretrained."""
    calls: list[dict[str, str]] = []

    def call(command: list[str], **_: Any) -> int:
        flags = dict(pairwise(command))
        calls.append(flags)
        config = load_config(flags["--cfg"], [*command[command.index("--opts") + 1 :], "MODEL.PRETRAINED", "x"])
        folder = Path(flags["--output"]) / config.MODEL.NAME / flags["--tag"]
        score = 90.0 + config.SEED
        for epoch in range(config.TRAIN.EPOCHS):
            metrics = {"acc1": score, "ema_acc1": score + ("--pretrained" in flags), "loss": 0.5, "ema_loss": 0.25}
            add_records(folder, metrics={"epoch": epoch, **metrics})
        (folder / f"ckpt_epoch_{config.TRAIN.EPOCHS - 1}.pth").touch()
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    return calls


def images(folder: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in folder.rglob("*.png")}


def test_study(
    tmp_path: Path, data_path: Path, trained: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    args = [
        "--output",
        output,
        "--data-path",
        data_path,
        "--settings",
        "finetune",
        "frozen",
        "scratch",
        "--epochs",
        "3",
    ]
    args += ["--seeds", "0", "1"]
    assert exit_code(finetune_study.main, [*args, "--minutes", "-1"]) == 3
    assert exit_code(finetune_study.main, args) == 0
    assert len(trained) == 1 + 3 * 2 * 2
    weights = str(output / "runs" / "study_pretrain" / "pretrain_epochs12_seed0" / "ckpt_epoch_11.pth")
    assert [call.get("--pretrained") for call in trained[1:]].count(weights) == 2 * 2 * 2
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| `", "| from"))]
    assert len(rows) == 2 * 3
    assert [*rows[0][1:3], rows[0][5]] == ["2", "91.50 ± 0.71", "0.250 |"]
    assert [*rows[2][1:3], rows[2][5]] == ["2", "90.50 ± 0.71", "0.500 |"]
    assert rows[2][3].startswith("-1.00 (")
    assert exit_code(finetune_study.main, [*args, "--seeds", "0"]) == 0  # none again
    assert len(trained) == 1 + 3 * 2 * 2


def test_images_of_pretraining_are_not_fine_tuned_on(
    tmp_path: Path, data_path: Path, trained: list[dict[str, str]]
) -> None:
    args = ["--output", tmp_path, "--data-path", data_path, "--settings", "finetune", "--epochs", "3"]
    assert exit_code(finetune_study.main, args) == 0
    pretraining = images(tmp_path / "images" / "pretrain")
    assert len(pretraining) == 5 * 6
    drawn = [images(tmp_path / "images" / f"fashion_seed{seed}") for seed in range(5)]
    assert all(len(names) == 10 * 3 and not names & pretraining for names in drawn)
    assert drawn[0] != drawn[1]
    assert all(not images(path / "train") & images(path / "val") for path in (tmp_path / "images").iterdir())
    assert {Path(call["--data-path"]).name for call in trained if "--pretrained" in call} == {
        f"{name}_seed{seed}" for name in DATASETS for seed in range(5)
    }


def differing_keys(first: Any, second: Any, prefix: str = "") -> set[str]:
    if not isinstance(first, dict):
        return {prefix} if first != second else set()
    return {key for name in first for key in differing_keys(first[name], second[name], f"{prefix}.{name}".strip("."))}


def compared_config(folder: Path, name: str) -> CfgNode:
    args = finetune_study.parse_args(["--output", str(folder)])
    finetune_study.write_configs(args, "digits")
    path = finetune_study.cfg_of(args, finetune_study.Run("digits", name, 0))
    return load_config(path, [*SETTINGS[name].opts.split(), "MODEL.PRETRAINED", "weights.pth"])


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("finetune", "recipe")])
def test_settings_change_what_they_name(name: str, tmp_path: Path) -> None:
    """None repeats what finetune.yaml has."""
    config, reference = (compared_config(tmp_path, other) for other in (name, "finetune"))
    assert differing_keys(reference, config) == set(SETTINGS[name].opts.split()[::2])


def test_the_dataset_changes_nothing_of_finetune_yaml(tmp_path: Path) -> None:
    recipe, config = (compared_config(tmp_path, name) for name in ("recipe", "finetune"))
    own = set(read_yaml(ROOT / "cfgs" / "finetune.yaml")) - {"BASE", "TRAIN.WARMUP_EPOCHS"}  # which is 2 in both
    assert differing_keys(recipe, config) == own
