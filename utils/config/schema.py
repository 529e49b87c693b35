"""Schema of a configuration (a tree of keys), and the merging and checking of values against it."""

import ast
import contextlib
import copy
import difflib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from yacs.config import CfgNode

from utils.config.errors import MAX_SHOWN, ConfigError, cut, file_errors, shown
from utils.config.yaml_file import StrictLoader, find_yaml, parse_yaml, read_yaml

MAX_ITEMS = 10_000  # of a list
MAX_FILES = 100  # read through BASE
YAML_BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}


class Rule(NamedTuple):
    """Constraint on a value, with the text that names it in errors and tables of keys."""

    text: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Rule:
    return Rule(f"at least {low}", lambda value: value >= low)


def above(low: float, high: float) -> Rule:
    return Rule(f"above {low}, at most {high}", lambda value: low < value <= high)


def between(low: float, high: float) -> Rule:
    return Rule(f"from {low} to {high}", lambda value: low <= value <= high)


def one_of(*values: object) -> Rule:
    return Rule("one of " + ", ".join(map(str, values)), lambda value: value in values)


ANY, YES_NO = Rule("any", lambda _: True), Rule("true or false", lambda _: True)
NOT_EMPTY = Rule("not empty", bool)
FRACTION = between(0, 1)
BELOW_ONE = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)
ABOVE_0_TO_1 = above(0, 1)


# What other programs call a setting
OTHER_NAMES = {
    **{"LR": "BASE_LR", "LEARNING_RATE": "BASE_LR", "WD": "WEIGHT_DECAY", "WORKERS": "NUM_WORKERS"},
    **{"IMAGE_SIZE": "IMG_SIZE", "NUM_EPOCHS": "EPOCHS"},
}


class Key:
    """A setting: its default, the rule that its values must hold, and its meaning.

    Args:
        default: a bool, int, float or str, a list of one of these, or None.
        rule: holds for the value, or for each element of a list; by default every value of the type.
        help: meaning and unit, for --help and the tables of keys.
        type: type of the value or of the list's elements; by default the default's.
        optional: accept null.
        is_list: accept a list, where the default does not show it.
        words: texts that are accepted beside the values of the type, in lower case.
    """

    def __init__(
        self,
        default: Any,
        rule: Rule | None = None,
        *,
        help: str,
        type: type | None = None,
        optional: bool = False,
        is_list: bool = False,
        words: Sequence[str] = (),
    ) -> None:
        self.is_list = is_list or isinstance(default, list)
        self.type = type or (default[0] if self.is_list else default).__class__
        self.default, self.help, self.optional = default, help, optional
        self.rule = rule or (YES_NO if self.type is bool else ANY)
        self.words = words
        if words:
            holds = self.rule.holds
            self.rule = Rule(f"{', '.join(words)} or {self.rule.text}", lambda value: value in words or holds(value))


Schema = Mapping[str, Key]


def setting(name: str, value: Any, origin: str) -> str:
    """Return a key, its value and where it stands, for messages."""
    return f"{cut(name)} {shown(value)} (in {origin})"


class Section:
    """Section of a schema: keys and further sections as attributes, in the order of their first assignment.

    Assigning a Key or a Section adds or replaces it; any other value becomes the default of a key that exists.
    """

    def __setattr__(self, name: str, member: Any) -> None:
        if not isinstance(member, Key | Section):
            key = copy.copy(getattr(self, name))
            key.default = member
            member = key
        super().__setattr__(name, member)

    def __getattr__(self, name: str) -> Any:  # for mypy; called only where there is no such attribute
        raise AttributeError(f"no key or section {name}; there are {', '.join(vars(self))}")

    def flatten(self, prefix: str = "") -> dict[str, Key]:
        """Return the keys by dotted name, such as "TRAIN.EPOCHS"."""
        schema: dict[str, Key] = {}
        for name, member in vars(self).items():
            schema |= member.flatten(f"{prefix}{name}.") if isinstance(member, Section) else {f"{prefix}{name}": member}
        return schema

    def subset(self, *names: str) -> "Section":
        """Return a copy of the keys and whole sections with these dotted names."""
        subset = Section()
        for name in names:
            *sections, leaf = name.split(".")
            source, target = self, subset
            for section in sections:
                source = getattr(source, section)
                if section not in vars(target):
                    setattr(target, section, Section())
                target = getattr(target, section)
            member = getattr(source, leaf)
            setattr(target, leaf, member.clone() if isinstance(member, Section) else member)
        return subset

    def clone(self) -> "Section":
        """Return a copy, to be changed apart from this one."""
        return self.subset(*vars(self))


def merge_settings(
    schema: Schema,
    source: str | Path,
    opts: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    *,
    own: Path,
) -> dict[str, Any]:
    """Return values by key. Later ones win: defaults, BASE files, the file itself, `KEY VALUE ...` pairs, flags.

    Args:
        schema: the known keys; "BASE" must be one of them.
        source: a YAML file by path or name, see `find_yaml`; or YAML text, which is a str with a newline in it.
        opts: alternating keys and values, as typed after --opts.
        flags: values by key, of those flags that were typed.
        own: the folder of the task's configurations in the project.

    Raises:
        ConfigError: a missing or unreadable file, an unknown key, a wrong type or a value out of range.
    """
    values = {name: key.default for name, key in schema.items()}
    for name, value, origin in read_source(schema, source, own):
        values[name] = checked(schema, name, value, origin)
    if len(opts) % 2:
        raise ConfigError(f"--opts takes pairs of KEY VALUE, got {len(opts)} values: {cut(' '.join(opts))}")
    if "BASE" in opts[::2]:
        raise ConfigError("BASE (in --opts): only a configuration file can name files to start from", key="BASE")
    for name, text in zip(opts[::2], opts[1::2], strict=True):
        values[name] = checked(schema, name, parse_text(schema, name, text), "--opts")
    for name, value in (flags or {}).items():
        values[name] = checked(schema, name, value, "command line")
    return values


def refuse(values: Mapping[str, Any], name: str, reason: str) -> NoReturn:
    """Raise ConfigError about a key's value, for a reason that says what is allowed."""
    raise ConfigError(f"{name} {shown(values[name])}: {reason}", key=name)


def frozen_node(values: Mapping[str, Any]) -> CfgNode:
    """Return values by dotted key as a tree of sections that cannot be changed."""
    config = CfgNode()
    for name, value in values.items():
        *sections, leaf = name.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[leaf] = list(value) if isinstance(value, list) else value
    config.freeze()
    return config


def with_setting(config: CfgNode, name: str, value: Any) -> CfgNode:
    """Return a frozen copy of a configuration with another value of a dotted key."""
    changed = config.clone()
    changed.defrost()
    *sections, leaf = name.split(".")
    node = changed
    for section in sections:
        node = node[section]
    node[leaf] = value
    changed.freeze()
    return changed


def read_source(schema: Schema, source: str | Path, own: Path) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, origin) of a configuration file or text; for the arguments see `merge_settings`."""
    if isinstance(source, str) and "\n" in source:
        return read_text(schema, source)
    return read_file(schema, find_yaml(Path(source), own), own)


def read_file(
    schema: Schema, path: Path, own: Path, within: tuple[Path, ...] = (), count: Iterator[int] | None = None
) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, file) of a YAML file, the BASE files' first, which are found like files of --cfg."""
    count = itertools.count(1) if count is None else count
    if next(count) > MAX_FILES:
        raise ConfigError(f"{path}: BASE names over {MAX_FILES} files, or some many times; merge them", key="BASE")
    with file_errors(ConfigError, path, "read"):
        resolved = path.resolve()
    if resolved in within:
        raise ConfigError(f"{path}: BASE files include each other in a circle", key="BASE")
    content = read_yaml(path)
    for base in checked(schema, "BASE", content.pop("BASE", [""]), str(path)):
        if base:
            yield from read_file(schema, find_yaml(Path(base), own, start=path.parent), own, (*within, resolved), count)
    yield from settings_in(schema, content, str(path))


def read_text(schema: Schema, text: str) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, origin) of a configuration's text, such as the dump in a checkpoint."""
    origin = "configuration text"
    content = parse_yaml(text, origin)
    if any(checked(schema, "BASE", content.pop("BASE", [""]), origin)):
        raise ConfigError(f"BASE (in {origin}): only a configuration file can name files to start from", key="BASE")
    yield from settings_in(schema, content, origin)


def settings_in(schema: Schema, content: Mapping[str, Any], origin: str) -> Iterator[tuple[str, Any, str]]:
    sections = {name[:end] for name in schema for end, letter in enumerate(name) if letter == "."}
    for name, value in content.items():
        if name not in sections:
            yield name, value, origin
        elif value is not None and value != {}:
            reason = (
                f"is a section; write its keys below it, such as {next(key for key in schema if key.startswith(name))}"
            )
            raise ConfigError(f"{setting(name, value, origin)}: {reason}", key=name)


def parse_text(schema: Schema, name: str, text: str) -> Any:
    """Return a value typed after --opts: text as it stands for text keys, else a Python or YAML literal."""
    if name in schema and isinstance(schema[name].default, str) and not schema[name].words:
        return text
    for parse in (ast.literal_eval, lambda text: yaml.load(text, StrictLoader)):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError, yaml.YAMLError):
            return parse(text)
    return text


def keys_called(schema: Schema, name: str) -> list[str]:
    """Return the keys whose last part is the same as in `name`, which may be a flag such as --weight-decay or --lr."""
    last = last_part(name)
    return [key for key in schema if last_part(key) == OTHER_NAMES.get(last, last)]


def keys_nearest(schema: Schema, name: str) -> list[str]:
    """Return the keys whose last part is the nearest to the one in `name`: TRAIN.EPOCHS for --epoch; [] if none is."""
    near = difflib.get_close_matches(last_part(name), {last_part(key) for key in schema}, n=1, cutoff=0.8)
    return [key for key in schema if last_part(key) in near]


def last_part(name: str) -> str:
    return name.split(".")[-1].lstrip("-").upper().replace("-", "_")


def checked(schema: Schema, name: str, value: Any, origin: str) -> Any:
    """Return the value in the key's own type.

    Raises:
        ConfigError: an unknown key, a wrong type, or a value that its rule does not hold for.
    """
    if name not in schema:
        near = keys_called(schema, name) or difflib.get_close_matches(name[:MAX_SHOWN], schema, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{cut(name)} (in {origin}): unknown key{hint}", key=name)
    key = schema[name]
    if value is None and key.optional:
        return None
    if key.is_list and not (isinstance(value, list | tuple) and value):
        raise ConfigError(f"{setting(name, value, origin)}: must be a list of {key.type.__name__}", key=name)
    if key.is_list and len(value) > MAX_ITEMS:
        raise ConfigError(f"{setting(name, value, origin)}: must have at most {MAX_ITEMS} values", key=name)
    items = [coerced(name, item, key, origin) for item in (value if key.is_list else [value])]
    if not all(map(key.rule.holds, items)):
        raise ConfigError(f"{setting(name, value, origin)}: must be {key.rule.text}", key=name)
    return items if key.is_list else items[0]


def coerced(name: str, value: Any, key: Key, origin: str) -> Any:
    """Return the value as a bool, int, float or str.

    YAML reads 5e-4 and off as text, so text is tried as a number and as a boolean. Names of a fixed set may be in
    capitals.
    """
    if isinstance(value, str) and value.lower() in key.words:
        return value.lower()
    if key.type is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if key.type is bool and isinstance(value, str):
        value = YAML_BOOLEANS.get(value.lower(), value)
    if key.type is str and isinstance(value, str) and not key.rule.holds(value) and key.rule.holds(value.lower()):
        value = value.lower()  # such as AdamW
    if isinstance(value, str) and "\0" in value:  # the system refuses it in names of files
        raise ConfigError(f"{setting(name, value, origin)}: must not hold a NUL character", key=name)
    hint = ", in quotes" if key.type is str else "".join(f" or {word}" for word in key.words)
    if type(value) is not key.type or value in (math.inf, -math.inf) or value != value:
        raise ConfigError(f"{setting(name, value, origin)}: must be of type {key.type.__name__}{hint}", key=name)
    return value
