"""`pip install .` and torch.hub: the models as other projects import them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from utils.tools.package_build import OWN, sources, with_installed_commands, with_package_imports

ELSEWHERE = """
import contextlib, io, json, pkgutil, sys
from pathlib import Path
import mlla, timm
model = timm.create_model("mlla_tiny", embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), num_classes=3)
for module in pkgutil.walk_packages(mlla.__path__, "mlla."):
    if module.name == "mlla.utils.tools.package_build":  # which needs setuptools
        continue
    try:
        __import__(module.name)
    except ModuleNotFoundError as error:  # an optional package
        assert error.name.split(".")[0] not in ("mlla", "config", "data", "downstream", "models", "utils"), error
import mlla.main, mlla.utils.predict
config = mlla.main.load_config("mlla_t")
sys.argv[0] = "site/bin/mlla-predict"
help = io.StringIO()
with contextlib.redirect_stdout(help), contextlib.suppress(SystemExit):
    mlla.utils.predict.main(["--help"])
print(json.dumps({
    "file": mlla.__file__,
    "all": mlla.__all__,
    "version": mlla.__version__,
    "help": help.getvalue(),
    "name": config.MODEL.NAME,
    "type": type(model).__module__,
    "top": sorted({name.split(".")[0] for name in sys.modules}),
    "loaded": sum(name.startswith("mlla.") for name in sys.modules),
}))
"""


def console_commands() -> dict[str, str]:
    """Return the names of pyproject.toml by module."""
    text = (ROOT / "pyproject.toml").read_text()
    return {
        module: name for name, module in re.findall(r'^([\w-]+) = "(mlla[\w.]+):(?:main|command)"$', text, flags=re.M)
    }


def python(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(cwd), **environment}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from models.mlla import MLLA\n", "from mlla.models.mlla import MLLA\n"),
        ("from models import (\n    MLLA,\n)\n", "from mlla.models import (\n    MLLA,\n)\n"),
        ("import models\n", "from mlla import models\n"),
        ("import models as m\n", "from mlla import models as m\n"),
        ("import models.mlla as m\n", "import mlla.models.mlla as m\n"),
        ("def f():\n    from data.x import y  # data\n", "def f():\n    from mlla.data.x import y  # data\n"),
        ("text = 'from models import x'\n", "text = 'from models import x'\n"),
        (
            "from torch.utils.data import Dataset\nimport torch\n",
            "from torch.utils.data import Dataset\nimport torch\n",
        ),
        ("from config import SCHEMA\n", "from mlla.config import SCHEMA\n"),
    ],
)
def test_imports_are_rewritten_below_the_package(before: str, after: str) -> None:
    assert with_package_imports(before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("python main.py --cfg x", "mlla-train --cfg x"),
        ("see python -m utils.predict.", "see mlla-predict."),
        ("python -m data.verify PATH", "python -m mlla.data.verify PATH"),
        ("torchrun --nproc_per_node=8 main.py --cfg x", "torchrun --nproc_per_node=8 -m mlla.main --cfg x"),
        ("torchrun --a -m downstream.detection.main", "torchrun --a -m mlla.downstream.detection.main"),
        ("main.py failed; python -m pip", "main.py failed; python -m pip"),
    ],
)
def test_commands_get_their_installed_names(before: str, after: str) -> None:
    assert with_installed_commands(before, console_commands()) == after


def test_documented_console_commands() -> None:
    """Each starts a module that is there, and the pages name no others."""
    commands = console_commands()
    for module in commands:
        path = ROOT / module.removeprefix("mlla.").replace(".", "/")
        assert "\ndef main(" in path.with_suffix(".py").read_text()
    named = re.findall(r"\bmlla-(?:train|predict|export|convert|vis|rep|com)[a-z-]*", (ROOT / "README.md").read_text())
    assert set(named) <= set(commands.values())
    assert "mlla-train" in named


@pytest.mark.parametrize("source", ["import models.mlla\n", "from . import x\n", "import torch, models\n"])
def test_imports_that_cannot_be_rewritten(source: str) -> None:
    with pytest.raises(ValueError, match="line 1: "):
        with_package_imports(source)


def test_requirements_are_those_of_requirements_txt() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 or later
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, tools, *_ = (ROOT / "requirements.txt").read_text().split("\n\n")
    listed = re.findall(r"^[\w.-]+[<>=][^\s#]+", needed, flags=re.MULTILINE)
    assert project["dependencies"] == listed
    optional = {item for items in project["optional-dependencies"].values() for item in items}
    assert optional <= set(re.findall(r"^[\w.-]+[<>=][^\s#]+", tools, flags=re.MULTILINE))  # so that they are tested


@pytest.mark.slow
def test_installed_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    clone, site, elsewhere = tmp_path / "clone", tmp_path / "site", tmp_path / "elsewhere"
    for path in [*sources(), *map(Path, ("pyproject.toml", "README.md", "LICENSE"))]:
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, clone / path)
    elsewhere.mkdir()
    flags = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index", "--quiet")
    done = python("-m", "pip", "install", ".", *flags, "--target", str(site), cwd=clone)
    assert done.returncode == 0, done.stderr
    assert {path.name.split("-")[0] for path in site.iterdir()} == {"mlla", "bin"}
    assert {path.name for path in (site / "bin").iterdir()} == set(console_commands().values())
    done = python("-c", ELSEWHERE, cwd=elsewhere, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["file"] == str(site / "mlla" / "__init__.py")
    assert result["name"] == "mlla_tiny"
    assert f'version = "{result["version"]}"\n' in (ROOT / "pyproject.toml").read_text()
    assert result["help"].startswith("usage: mlla-predict ")
    assert "Classify images: mlla-predict IMAGES" in result["help"]
    assert result["type"] == "mlla.models.mlla"
    assert "mlla_tiny" in result["all"]
    assert not set(result["top"]) & set(OWN)
    assert result["loaded"] > 30


@pytest.mark.slow
def test_torch_hub(tmp_path: Path) -> None:
    code = f"""
import torch
model = torch.hub.load({str(ROOT)!r}, "mlla_tiny", source="local", embed_dim=8, num_heads=(1, 1, 1, 1), num_classes=3)
print(tuple(model(torch.randn(2, 3, 32, 32)).shape))
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 3)"
    (tmp_path / "models.py").touch()  # a module of the same name in the caller's code
    done = python("-c", "import models\n" + code, cwd=tmp_path)
    assert "another package named `models` is loaded" in done.stderr.splitlines()[-1]
