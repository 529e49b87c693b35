"""Flags that are the same for all tasks, and opening a weights file with its configuration."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

import config as classification
from downstream import trained_model
from downstream.detection import config as detection
from downstream.segmentation import config as segmentation
from downstream.tasks import TASKS, task_of, task_with_keys
from downstream.trained_model import add_weights_flags, open_device, read_trained_model
from utils.checkpoint.weights_file import CheckpointError
from utils.config.command_line import Parser
from utils.config.errors import UserError

CONFIGS = {
    "classification": classification.load_config("digits", ["SEED", "7"]),
    "detection": detection.load_config("shapes", ["SEED", "7"]),
    "segmentation": segmentation.load_config("shapes", ["SEED", "7"]),
}


def parse(*args: object) -> argparse.Namespace:
    parser = Parser("")
    add_weights_flags(parser)
    return parser.parse_args(list(map(str, args)))


@pytest.fixture(params=[*CONFIGS])
def task(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def weights(task: str, tmp_path: Path) -> Path:
    content = {"model": {"w": torch.zeros(1)}, "state_dict_ema": {"w": torch.ones(1)}, "classes": ["a", "b"]}
    torch.save({**content, "config": CONFIGS[task].dump()}, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_the_file_names_configuration_and_task(task: str, weights: Path) -> None:
    trained = read_trained_model(parse("--resume", weights, "--no-ema", "--opts", "TAG", "x"), flags={"AMP": True})
    assert (trained.task, trained.classes, trained.weights) == (task, ["a", "b"], {"w": torch.zeros(1)})
    config = trained.config
    assert (config.SEED, config.TAG, config.AMP, config.EVAL_MODE) == (7, "x", True, True)


def test_a_named_configuration_wins(task: str, weights: Path) -> None:
    name = {"classification": "mlla_t", "detection": "mlla_t_mrcnn_1x", "segmentation": "mlla_t_upernet"}[task]
    trained = read_trained_model(parse("--weights", weights, "--cfg", name))
    assert (trained.task, trained.config.SEED) == (task, 0)


def test_weights_of_another_task(task: str, weights: Path) -> None:
    wanted = "detection" if task != "detection" else "segmentation"
    command = {"classification": "utils.predict"}.get(task, f"downstream.{task}.predict")
    with pytest.raises(CheckpointError, match=rf"w.pth: holds a model for {task}; use python -m {command}$"):
        read_trained_model(parse("--weights", weights), task=wanted)


def test_released_weights_have_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"model": {"w": torch.zeros(1)}, "config": {"of": "the official code"}}
    monkeypatch.setattr(trained_model, "load_checkpoint", lambda *_, **__: content)
    assert read_trained_model(parse("--weights", "mlla-s")).config.MODEL.NAME == "mlla_small"
    with pytest.raises(CheckpointError, match=r"s.pth: holds no configuration; name its YAML file with --cfg"):
        read_trained_model(parse("--weights", "s.pth"))


def test_task_of_a_configuration(task: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(CONFIGS[task].dump())
    assert task_of(str(tmp_path / "own.yaml")) == task_of(CONFIGS[task].dump()) == task
    assert task_with_keys([*TASKS[task].schema, "OF_ANOTHER_VERSION"]) == task
    assert task_of("nowhere") == "classification"  # whose reader says that it is missing


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cpu:", "cuda:99"])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(UserError, match=f"^--device {name}: "):
        open_device(name)
    assert open_device("cpu").type == "cpu"
