"""YAML as flat dictionaries of dotted keys; refuses the mistakes that PyYAML lets pass."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.config.errors import ConfigError, file_errors

MAX_NODES = 100_000  # of a file, with aliases written out
MAX_CHARACTERS = 1_000_000  # of a file, which takes some seconds to parse
MAX_REASON = 300  # characters of PyYAML's reason
PROJECT = Path(__file__).parents[2]


class StrictLoader(yaml.SafeLoader):
    """A SafeLoader that loses nothing silently, and whose errors say line and value.

    It refuses a key that stands twice in one section, where the first would be lost; and aliases that contain
    themselves, or that refer to each other so often that written out they would fill the memory. Bare off, no, on and
    yes, and dates, are text: which keys are booleans is the schema's matter.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        count_nodes(node, {})
        return super().construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # of any kind: PyYAML takes the text to be what its tag says
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {str(node.value)[:80]} is no {kind}") from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                where = f"near line {node.start_mark.line + 1}"
                raise yaml.YAMLError(f"{key.value[:80]} stands twice in one section, {where}")
            names.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


BOOLEAN = "tag:yaml.org,2002:bool"
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in (BOOLEAN, "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver(BOOLEAN, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


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
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{origin}: has {len(text):,} characters; a configuration has up to {MAX_CHARACTERS:,}")
    try:
        content = yaml.load(text, StrictLoader)
    except RecursionError:
        raise ConfigError(f"{origin}: not a YAML file: nested too deeply") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not a YAML file: {' '.join(str(error).split())[:MAX_REASON]}") from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"{origin}: must hold 'KEY: value' lines, but holds a {type(content).__name__}")
    values: dict[str, Any] = {}
    for name, value in flatten(content or {}):
        if name in values:
            reason = "stands twice, with a dot and within its section; keep one of them"
            raise ConfigError(f"{name[:80]} (in {origin}): {reason}", key=name)
        values[name] = value
    return values


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested sections."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
