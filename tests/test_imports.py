"""Imports run one way, without cycles; nothing imports a command; and few files read a configuration."""

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

# What the files of each package may import of the others.
ALLOWED = {
    "config": {"utils"},
    "hubconf": {"models"},
    "models": {"models"},
    "data": {"data", "utils"},
    "utils": {"utils"},
    "downstream": {"downstream", "config", "models", "data", "utils"},
    "main": {"config", "models", "data", "utils"},
}
COMMAND = set(ALLOWED) - {"main"}  # of files that are run with `python -m`, as main.py is
# Folders of utils/ from the lowest to the highest layer: each imports only itself and lower ones.
UTILS_LAYERS = [{"config", "distributed"}, {"logs"}, {"checkpoint"}, {"speed"}, {"training"}, {"benchmark"}, {"tools"}]
NETWORK = ("mlla", "attention", "rope", "layers")  # read top to bottom, without kernels
ERRORS = "utils.config.errors"  # imports nothing, so that data may raise errors that users can mend
READERS = (
    "build.py",
    "config.py",
    "main.py",
    "dense_config.py",
    "schema.py",
    "task.py",
    "run.py",
    "training_run.py",
    "throughput.py",
    "loading.py",
)
FILES = [path for name in ALLOWED for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py")]]


def imported_modules(path: Path) -> set[str]:
    """Return the modules that a file imports; of `from package import module` both."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_command(path: Path) -> bool:
    return 'if __name__ == "__main__":' in path.read_text()


COMMANDS = {module_name(path) for path in FILES if is_command(path)}
MODULES = {module_name(path): path for path in FILES}
IMPORTS = {name: imported_modules(path) & set(MODULES) for name, path in MODULES.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    modules = imported_modules(path)
    own = {name.split(".")[0] for name in modules} & set(ALLOWED)
    if package == "models" and path.name == "build.py":  # raises errors that users can mend, but only when called
        own -= {"utils"}
    assert own <= (COMMAND if is_command(path) else ALLOWED[package])
    assert not modules & COMMANDS
    if package in ("data", "models") and not is_command(path):
        assert {name for name in IMPORTS[module_name(path)] if name.startswith("utils.")} <= {"utils.config", ERRORS}
    reads_config = any(name.split(".")[0] == "yacs" for name in modules)
    assert not reads_config or path.name in READERS or is_command(path)


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("utils.")])
def test_layers_of_utils(name: str) -> None:
    """A folder imports only itself and those before it in the list; the commands may import all."""
    if name in COMMANDS or name.count(".") < 2:
        return
    level = {folder: i for i, folders in enumerate(UTILS_LAYERS) for folder in folders}
    own = name.split(".")[1]
    higher = [
        other for other in IMPORTS[name] if other.startswith("utils.") and level[other.split(".")[1]] > level[own]
    ]
    assert not higher


def test_no_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in IMPORTS[name]:
                if other != name and MODULES[other].name != "__init__.py":
                    visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", NETWORK)
def test_the_network_does_not_know_kernels(name: str) -> None:
    assert not any("kernels" in module for module in imported_modules(ROOT / "models" / f"{name}.py"))


def test_user_errors_import_nothing_of_the_project() -> None:
    assert not IMPORTS[ERRORS]
