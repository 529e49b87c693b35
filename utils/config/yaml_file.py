"""YAML as flat dictionaries of dotted keys; refuses the mistakes that PyYAML lets pass."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.config.errors import ConfigError, file_errors

MAX_NODES = 100_000  # of a file, with aliases written out
PROJECT = Path(__file__).parents[2]


class StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses two kinds of text.

    A key that stands twice in one section, where the first would be lost silently; and aliases that contain themselves,
    or that refer to each other so often that written out they would fill the memory.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        count_nodes(node, {})
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} stands twice in one section, near line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def count_nodes(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of nodes from this one on, counting a shared one as often as it is referred to.

    Raises:
        yaml.YAMLError: a node contains itself, or the number is above MAX_NODES.
    """
    line = node.start_mark.line + 1
    if id(node) not in counts:
        counts[id(node)] = 0  # until it is known
        items = [] if isinstance(node, yaml.ScalarNode) else node.value
        children = [child for pair in items for child in (pair if isinstance(pair, tuple) else (pair,))]
        counts[id(node)] = 1 + sum(count_nodes(child, counts) for child in children)
    if not counts[id(node)]:
        raise yaml.YAMLError(f"what begins in line {line} contains itself by an alias")
    if counts[id(node)] > MAX_NODES:
        raise yaml.YAMLError(f"what begins in line {line} has, with its aliases written out, over {MAX_NODES:,} values")
    return counts[id(node)]


def find_yaml(name: Path, own: Path, *, start: Path = Path()) -> Path:
    """Return the configuration file of a path or a name, such as mlla_t; `.yaml` may be left out.

    A file of the user's wins. Only then it is looked for among the project's.

    Args:
        name: a path relative to `start`, to `own` or to the project.
        own: the folder of the task's configurations in the project.
        start: the folder that the user's paths start from.

    Raises:
        ConfigError: there is none, or it cannot be looked for.
    """
    for folder in (start, own, PROJECT):
        for path in (folder / name, folder / f"{name}.yaml"):
            with file_errors(ConfigError, name, "read"):
                if path.is_file():
                    return path
    known = ", ".join(sorted(path.stem for path in own.glob("*.yaml")))
    raise ConfigError(f"{start / name}: no such configuration file; the project's own are {known}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML file's values by dotted key, such as "TRAIN.EPOCHS"; empty sections come as None.

    Raises:
        ConfigError: it cannot be read, or is not a YAML file of sections and keys.
    """
    with file_errors(ConfigError, path, "read"):
        text = path.read_text(encoding="utf-8")
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """Return the values of YAML text, as `read_yaml` does; errors name its origin."""
    try:
        content = yaml.load(text, StrictLoader)
    except (yaml.YAMLError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"{origin}: must hold 'KEY: value' lines, but holds a {type(content).__name__}")
    return dict(flatten(content or {}))


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested sections."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
