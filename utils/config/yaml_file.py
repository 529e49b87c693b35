"""YAML files as flat dictionaries of dotted keys, with the mistakes that PyYAML lets pass."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml


class StrictLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key that stands twice in one section, where the first would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} stands twice in one section, near line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's values by dotted key, such as "TRAIN.EPOCHS"; empty sections come as None.

    Raises:
        ValueError: not a YAML file of sections and keys.
        OSError: it cannot be read.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict | None):
        raise ValueError(f"{path}: must hold 'KEY: value' lines, but holds a {type(content).__name__}")
    return dict(flatten(content or {}))


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested sections to (dotted key, value)."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
