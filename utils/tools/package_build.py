"""What `pip install .` makes of this folder: one package, mlla, which leaves models, data and utils to others.

In the folder itself, modules are `models`, `data`, `utils`, ...: short names, for code that is read and run in place.
Put like that into an environment they would shut out other packages. So the build copies them below `mlla` and rewrites
the import statements, by their place in the syntax tree, so that `from models.mlla import MLLA` becomes
`from mlla.models.mlla import MLLA`. Only setuptools calls this module (pyproject.toml names it); it imports no other.
"""

import ast
import re
import shutil
from pathlib import Path

from setuptools.command.build_py import build_py

PACKAGE = "mlla"
OWN = ("config", "data", "downstream", "main", "models", "utils")
SUFFIXES = (".py", ".yaml", ".txt", ".html")
INIT = '''"""MLLA, Mamba-Like Linear Attention; importing this registers mlla_tiny, _small, _base and mila_* in timm."""

from mlla.models import *
from mlla.models import __all__
'''


class BuildPackage(build_py):
    """setuptools' build of Python files: those of this folder and its settings, with imports below `mlla`."""

    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit(f"error: {PACKAGE} has no editable install: run it in its folder, or `pip install .`")
        shutil.rmtree(self.target(Path()), ignore_errors=True)  # what an earlier build left
        for source in sources():
            target = self.target(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text()
            target.write_text(with_package_imports(text) if source.suffix == ".py" else text)
        self.target(Path("__init__.py")).write_text(INIT)

    def target(self, source: Path) -> Path:
        return Path(self.build_lib) / PACKAGE / source

    def get_source_files(self) -> list[str]:
        return list(map(str, sources()))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:  # noqa: ARG002
        return [str(self.target(source)) for source in [*sources(), Path("__init__.py")]]


def sources() -> list[Path]:
    """What goes into the package, relative to this folder, from which setuptools runs."""
    folders = [path for name in (*OWN, "cfgs") for path in Path(name).rglob("*") if path.suffix in SUFFIXES]
    return sorted([*folders, *(path for name in OWN for path in Path().glob(f"{name}.py"))])


def with_package_imports(source: str) -> str:
    """Source code whose imports of own modules are below `mlla`; nothing else in it changes.

    Raises:
        ValueError: an import that cannot be moved: a relative one, or `import models.mlla` without `as`.
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
            raise ValueError(f"line {node.lineno}: write `from ... import ...`, which can be moved below {PACKAGE}")
        lines[node.lineno - 1] = line
    return "".join(lines)
