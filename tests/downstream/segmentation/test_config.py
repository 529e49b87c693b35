import re
from pathlib import Path

from downstream.segmentation.config import SCHEMA, load_config
from tests.helpers import ROOT

README = (ROOT / "downstream/segmentation/README.md").read_text()


def test_readme_lists_every_key() -> None:
    rows = [f"| `{name}` | `{key.default!r}` | {key.rule.text} | {key.help} |" for name, key in SCHEMA.items()]
    assert re.findall(r"^\| `[A-Z_.]+` \| .*$", README, flags=re.MULTILINE) == rows


def test_every_key_is_explained_once() -> None:
    helps = [key.help for key in SCHEMA.values()]
    assert all(helps)
    assert len(set(helps)) == len(helps)


def test_dump_can_be_used_again(tmp_path: Path) -> None:
    config = load_config(ROOT / "downstream/segmentation/cfgs/shapes.yaml", ["DATA.REDUCE_ZERO_LABEL", "True"])
    (tmp_path / "config.yaml").write_text(config.dump())
    assert load_config(tmp_path / "config.yaml") == config
