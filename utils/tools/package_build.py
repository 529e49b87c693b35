"""Build step of `pip install .`: one package, mlla, so that the names models, data and utils stay free.

In the repository, modules have short names: `models`, `data`, `utils`. Installed under these names they would shadow
other packages. The build therefore copies them below `mlla` and rewrites the import statements, which it locates in the
syntax tree: `from models.mlla import MLLA` becomes `from mlla.models.mlla import MLLA`. Commands in help texts and
messages get their installed names: `python -m utils.predict` becomes `mlla-predict`. Only setuptools calls this module
(see pyproject.toml), so it imports no other module of this project.
"""

import ast
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from setuptools.command.build_py import build_py

PACKAGE = "mlla"
OWN = ("config", "data", "downstream", "main", "models", "utils")
SUFFIXES = (".py", ".yaml", ".txt", ".html")
INIT = '''"""MLLA, Mamba-Like Linear Attention; importing this registers mlla_tiny, _small, _base and mila_* in timm."""

from mlla.models import *
from mlla.models import __all__

__version__ = "{version}"
'''
COMMAND = re.compile(
    r"\b(?P<start>python|torchrun|python -m torch\.distributed\.launch)(?P<flags>(?: --\S+)*) "
    rf"(?:-m (?P<module>(?:{'|'.join(OWN)})(?:\.\w+)+)|main\.py\b)"
)


class BuildPackage(build_py):
    """Build command that copies the source files with their imports rewritten below `mlla`."""

    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit(f"error: {PACKAGE} has no editable install: use the repository itself, or `pip install .`")
        shutil.rmtree(self.target(Path()), ignore_errors=True)  # of an earlier build
        for source in sources():
            target = self.target(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text()
            if source.suffix == ".py":
                text = with_installed_commands(with_package_imports(text), self.console_commands())
            target.write_text(text)
        self.target(Path("__init__.py")).write_text(INIT.format(version=self.distribution.get_version()))

    def console_commands(self) -> dict[str, str]:
        """Return the console commands of pyproject.toml by module."""
        lines = (line.replace(" ", "") for line in self.distribution.entry_points["console_scripts"])
        return {entry.split(":")[0]: name for name, entry in (line.split("=") for line in lines)}

    def target(self, source: Path) -> Path:
        return Path(self.build_lib) / PACKAGE / source

    def get_source_files(self) -> list[str]:
        return list(map(str, sources()))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:  # noqa: ARG002
        return [str(self.target(source)) for source in [*sources(), Path("__init__.py")]]


def sources() -> list[Path]:
    """Return the files of the package, relative to the repository, in which setuptools runs."""
    folders = [path for name in (*OWN, "cfgs") for path in Path(name).rglob("*") if path.suffix in SUFFIXES]
    return sorted([*folders, *(path for name in OWN for path in Path().glob(f"{name}.py"))])


def with_installed_commands(source: str, commands: Mapping[str, str]) -> str:
    """Replace command lines of the repository by those of the installed package.

    Args:
        source: text of a module.
        commands: names of console commands by module.
    """

    def installed(match: re.Match[str]) -> str:
        module = f"{PACKAGE}.{match['module'] or 'main'}"
        if match["start"] == "python" and module in commands:
            return commands[module]
        return f"{match['start']}{match['flags']} -m {module}"

    return COMMAND.sub(installed, source)


def with_package_imports(source: str) -> str:
    """Rewrite the imports of own modules to be below `mlla`; nothing else changes.

    Raises:
        ValueError: an import that cannot be rewritten: a relative one, or `import models.mlla` without `as`.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"line {node.lineno}: a relative import")
        names = node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")]
        own = [name for name in names if name.name.split(".")[0] in OWN]
        if not own:
            continue
        line = lines[node.lineno - 1]
        if isinstance(node, ast.ImportFrom):
            line = re.sub(rf"\bfrom ({'|'.join(OWN)})\b", rf"from {PACKAGE}.\1", line, count=1)
        elif len(names) == 1 and "." not in own[0].name:
            line = line.replace("import ", f"from {PACKAGE} import ", 1)
        elif len(names) == 1 and own[0].asname:
            line = line.replace("import ", f"import {PACKAGE}.", 1)
        else:
            raise ValueError(f"line {node.lineno}: write `from ... import ...`, which can be rewritten below {PACKAGE}")
        lines[node.lineno - 1] = line
    return "".join(lines)
