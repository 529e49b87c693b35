import re
from pathlib import Path
from typing import Any

import pytest

from downstream.detection.config import SCHEMA, load_config
from downstream.detection.task import Detection
from tests.helpers import ROOT
from utils.config.errors import ConfigError

FOLDER = ROOT / "downstream" / "detection"
SIZES = {"t": (64, [2, 4, 8, 4]), "s": (64, [3, 6, 21, 6]), "b": (96, [3, 6, 21, 6])}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("schedule", "epochs", "falls", "drop_path"), [("1x", 12, [8, 11], 0.1), ("3x", 36, [27, 33], 0.3)]
)
def test_the_published_recipe(size: str, schedule: str, epochs: int, falls: list[int], drop_path: float) -> None:
    config = load_config(FOLDER / "cfgs" / f"mlla_{size}_mrcnn_{schedule}.yaml")
    assert SIZES[size] == (config.MODEL.MLLA.EMBED_DIM, config.MODEL.MLLA.DEPTHS)
    assert drop_path == config.MODEL.DROP_PATH_RATE
    assert schedule in config.MODEL.NAME
    assert Detection().lengths(config, 8, 117_266) == (epochs, 7329)
    rates = Detection().schedule(config, Detection().derive(config, num_processes=8, num_train_images=117_266))
    assert rates.lr_at(0) == pytest.approx(1e-7)
    assert rates.lr_at(500) == pytest.approx(1e-4)
    assert rates.lr_at(falls[0] * 7329) == pytest.approx(1e-5)
    assert rates.lr_at(falls[1] * 7329 - 1) == pytest.approx(1e-5)
    assert rates.lr_at(falls[1] * 7329) == pytest.approx(1e-6)
    assert (config.TRAIN.WEIGHT_DECAY, config.TRAIN.CLIP_GRAD, config.AMP, config.EMA.ENABLED) == (
        0.05,
        0,
        False,
        False,
    )
    assert config.TRAIN.OPTIMIZER.BETAS == [0.9, 0.999]


def test_every_key_has_a_help_text_of_its_own() -> None:
    helps = [key.help for key in SCHEMA.values()]
    assert all(helps)
    assert len(set(helps)) == len(helps)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("AUG.CROP_SIZE", [600]),
        ("AUG.CROP_SIZE", [600, 384]),
        ("AUG.LONG_SIDE", 799),
        ("TEST.LONG_SIDE", 799),
        ("TRAIN.OPTIMIZER.BETAS", [0.9]),
        ("TRAIN.COMPILE", "fast"),
        ("MODEL.MLLA.DEPTHS", [2, 4, 8]),
        ("MODEL.MLLA.NUM_HEADS", [2, 4, 8]),
        ("MODEL.MLLA.NUM_HEADS", [3, 4, 8, 16]),
        ("MODEL.MLLA.IN_CHANS", 4),
    ],
)
def test_wrong_settings(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(FOLDER / "cfgs" / "mlla_t_mrcnn_1x.yaml", flags={key: value})
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key} {value!r}")


def test_readme_lists_every_key() -> None:
    rows = [f"| `{name}` | `{key.default!r}` | {key.rule.text} | {key.help} |" for name, key in SCHEMA.items()]
    listed = re.findall(r"^\| `[A-Z_.]+` \| .*$", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert listed == rows


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (FOLDER / "README.md").read_text()
    links = [Path(link) for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
    assert len(links) >= 3
    assert all((FOLDER / link).exists() for link in links)
    assert "@@" not in text
