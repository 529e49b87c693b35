"""Settings of a run: declared as keys with default, range and meaning; merged from files, pairs and flags; checked."""

import ast
import contextlib
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from utils.config.yaml_file import read_yaml


class ConfigError(ValueError):
    """A mistake in a configuration file, in --opts or in a flag: one line with key, value, what is allowed, remedy."""


class Rule(NamedTuple):
    text: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Rule:
    return Rule(f"at least {low}", lambda value: value >= low)


def above(low: float) -> Rule:
    return Rule(f"above {low}", lambda value: value > low)


def between(low: float, high: float) -> Rule:
    return Rule(f"from {low} to {high}", lambda value: low <= value <= high)


def one_of(*values: object) -> Rule:
    return Rule("one of " + ", ".join(map(str, values)), lambda value: value in values)


ANY, YES_NO = Rule("any", lambda _: True), Rule("true or false", lambda _: True)
FRACTION = between(0, 1)
BELOW_ONE = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)


class Key(NamedTuple):
    default: Any
    rule: Rule
    about: str
    kind: type | None = None  # of the value, or of a list's elements; that of the default where None
    optional: bool = False  # may be null
    many: bool = False  # a list, though the default does not show it


Schema = Mapping[str, Key]


def merge_settings(
    schema: Schema, path: str | Path, opts: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Values by key, later ones winning: defaults, the files under BASE, the file itself, `KEY VALUE ...` pairs, flags.

    Args:
        schema: the known keys; "BASE" must be one of them.
        path: the YAML file.
        opts: alternating keys and values, as typed after --opts.
        flags: values by key, of those flags that were typed.

    Raises:
        ConfigError: a missing file, an unknown key, a wrong type or a value out of range.
    """
    values = {name: key.default for name, key in schema.items()}
    for name, value, source in read_file(schema, Path(path)):
        values[name] = checked(schema, name, value, source)
    if len(opts) % 2:
        raise ConfigError(f"--opts takes pairs of KEY VALUE, got {len(opts)} words: {' '.join(opts)}")
    if "BASE" in opts[::2]:
        raise ConfigError("BASE (in --opts): only a configuration file can name files to start from")
    for name, text in zip(opts[::2], opts[1::2], strict=True):
        values[name] = checked(schema, name, parse_text(schema, name, text), "--opts")
    for name, value in (flags or {}).items():
        values[name] = checked(schema, name, value, "command line")
    return values


def frozen_node(values: Mapping[str, Any]) -> CfgNode:
    """Values by dotted key as a tree of sections that cannot be changed."""
    config = CfgNode()
    for name, value in values.items():
        *sections, leaf = name.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[leaf] = list(value) if isinstance(value, list) else value
    config.freeze()
    return config


def read_file(schema: Schema, path: Path, within: tuple[Path, ...] = ()) -> Iterator[tuple[str, Any, str]]:
    """(key, value, file) of a YAML file, those of its BASE files first."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; see cfgs/ for those that come with the project")
    if path.resolve() in within:
        raise ConfigError(f"{path}: BASE files include each other in a circle")
    content = read_yaml(path)
    for base in checked(schema, "BASE", content.pop("BASE", [""]), str(path)):
        if base:
            yield from read_file(schema, path.parent / base, (*within, path.resolve()))
    for name, value in content.items():
        is_empty_section = not value and any(key.startswith(f"{name}.") for key in schema)
        if not is_empty_section:
            yield name, value, str(path)


def parse_text(schema: Schema, name: str, text: str) -> Any:
    """A value typed after --opts: text as it stands for text keys, else a Python or YAML literal."""
    if name in schema and isinstance(schema[name].default, str):
        return text
    for parse in (ast.literal_eval, yaml.safe_load):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError, yaml.YAMLError):
            return parse(text)
    return text


def checked(schema: Schema, name: str, value: Any, source: str) -> Any:
    """The value in the key's own type, once its type and range are found right."""
    if name not in schema:
        near = [key for key in schema if key.split(".")[-1] == name.split(".")[-1]]
        near = near or difflib.get_close_matches(name, schema, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{name} (in {source}): unknown key{hint}")
    key = schema[name]
    if value is None and key.optional:
        return None
    is_list = isinstance(key.default, list) or key.many
    kind = key.kind or type(key.default[0] if is_list else key.default)
    if is_list and not (isinstance(value, list | tuple) and value):
        raise ConfigError(f"{name} {value!r} (in {source}): must be a list of {kind.__name__}")
    items = [coerced(name, item, kind, key.rule, source) for item in (value if is_list else [value])]
    if not all(map(key.rule.holds, items)):
        raise ConfigError(f"{name} {value!r} (in {source}): must be {key.rule.text}")
    return items if is_list else items[0]


def coerced(name: str, value: Any, kind: type, rule: Rule, source: str) -> Any:
    """The value as a bool, int, float or str; YAML reads 5e-4 as text, so text is tried as a number."""
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is str and value is False:  # YAML reads a bare off or no so
        value = "off" if rule.holds("off") else "no"
    if type(value) is not kind or value in (math.inf, -math.inf) or value != value:
        raise ConfigError(f"{name} {value!r} (in {source}): must be of type {kind.__name__}")
    return value
