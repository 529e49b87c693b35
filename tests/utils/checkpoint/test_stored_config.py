"""Configurations that weights files name."""

from pathlib import Path

import pytest
import torch

from config import SCHEMA, load_config
from utils.checkpoint.stored_config import load_config_of, stored_config
from utils.checkpoint.weights_file import CheckpointError
from utils.config.command_line import parse_command_line
from utils.config.errors import ConfigError


def test_the_configuration_of_the_checkpoint_or_of_cfg(tmp_path: Path) -> None:
    torch.save({"config": load_config("digits", ["SEED", "7"]).dump()}, tmp_path / "w.pth")
    args = ["--resume", str(tmp_path / "w.pth"), "--eval", "--opts", "TAG", "x"]
    config = load_config_of(load_config, *parse_command_line("", args, schema=SCHEMA))
    assert (config.DATA.DATASET, config.SEED, config.TAG, config.EVAL_MODE) == ("digits", 7, "x", True)
    config = load_config_of(load_config, *parse_command_line("", ["--cfg", "mlla_t", *args], schema=SCHEMA))
    assert (config.DATA.DATASET, config.SEED) == ("imagenet", 0)


def test_a_configuration_of_another_task(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"config": "MODEL:\n  DETECTOR:\n    WIDTH: 8\n"}, path)
    with pytest.raises(ConfigError, match=r"w.pth: its configuration is not for this command, .*MODEL.DETECTOR.WIDTH"):
        load_config_of(load_config, "", [], {"MODEL.RESUME": str(path)})
    torch.save({"config": "SEED: 1\n"}, path)
    with pytest.raises(ConfigError, match=r"^NO.SUCH.KEY \(in --opts\): unknown key"):
        load_config_of(load_config, "", ["NO.SUCH.KEY", "1"], {"MODEL.RESUME": str(path)})


def test_neither_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_command_line("", ["--eval"], schema=SCHEMA)
    assert stop.value.code == 2
    assert "required: --cfg, or --resume with a run's checkpoint" in capsys.readouterr().err


def test_released_weights_and_others() -> None:
    official = {"config": {"of": "the official code"}}
    assert [stored_config(official, name) for name in ("mlla-t", "mlla_small")] == ["mlla_t", "mlla_s"]
    with pytest.raises(CheckpointError, match=r"^w.pth: holds no configuration; name its YAML file with --cfg"):
        stored_config(official, "w.pth")
