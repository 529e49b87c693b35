"""Imports run one way, nothing imports a command, and only build.py reads a configuration."""

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

ALLOWED = {
    "config": {"utils"},
    "hubconf": {"models"},
    "models": {"models"},
    "data": {"data", "utils.config.errors"},
    "utils": {"utils"},
    "downstream": {"downstream", "config", "models", "data", "utils"},
    "main": {"config", "models", "data", "utils"},
}
COMMAND = set(ALLOWED) - {"main"}  # of files that are run with `python -m`, as main.py is
READERS = ("build.py", "config.py", "main.py", "schema.py")
FILES = [path for name in ALLOWED for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py")]]


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def is_command(path: Path) -> bool:
    return 'if __name__ == "__main__":' in path.read_text()


COMMANDS = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if is_command(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    modules = imported_modules(path)
    allowed = COMMAND if is_command(path) else ALLOWED[package]
    assert {name.split(".")[0] for name in modules - allowed} & set(ALLOWED) <= allowed
    assert not modules & COMMANDS
    reads_config = any(name.split(".")[0] == "yacs" for name in modules)
    assert not reads_config or path.name in READERS or is_command(path)
