import re
from pathlib import Path
from typing import Any

import pytest

from downstream.segmentation.config import SCHEMA, load_config
from tests.helpers import ROOT
from utils.config.errors import ConfigError

README = (ROOT / "downstream/segmentation/README.md").read_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("AUG.RATIO", [0.5]),
        ("AUG.RATIO", [2.0, 0.5]),
        ("DATA.SCALE", [2048]),
        ("DATA.SCALE", [512, 2048]),
        ("AUG.RATIO", [0.5, 19.0]),
        ("TEST.FACTORS", [1.0, 19.0]),
        ("MODEL.NAME", ""),
        ("TRAIN.EVAL_STEPS", 7),
        ("TRAIN.WARMUP_STEPS", 160000),
        ("TEST.STRIDE", 600),
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
        load_config(ROOT / "downstream/segmentation/cfgs/mlla_t_upernet.yaml", flags={key: value})
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key} {value!r}")


def test_readme_lists_every_key() -> None:
    rows = [f"| `{name}` | `{key.default!r}` | {key.rule.text} | {key.help} |" for name, key in SCHEMA.items()]
    assert re.findall(r"^\| `[A-Z_.]+` \| .*$", README, flags=re.MULTILINE) == rows


def test_every_key_has_a_help_text_of_its_own() -> None:
    helps = [key.help for key in SCHEMA.values()]
    assert all(helps)
    assert len(set(helps)) == len(helps)


def test_dump_can_be_used_again(tmp_path: Path) -> None:
    config = load_config(ROOT / "downstream/segmentation/cfgs/shapes.yaml", ["DATA.REDUCE_ZERO_LABEL", "True"])
    (tmp_path / "config.yaml").write_text(config.dump())
    assert load_config(tmp_path / "config.yaml") == config
