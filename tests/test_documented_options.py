"""Flags and settings that the documentation names within sentences and tables exist, with values that they take."""

import argparse
import contextlib
import importlib
import re
import shlex
from typing import Any, NoReturn

import pytest
from torch.distributed import run as torchrun

from tests import documentation
from tests.documentation import TASKS
from tests.helpers import ROOT
from utils.config.errors import ConfigError
from utils.config.schema import checked, parse_text

DOCUMENTED = ("tests.soak", "tests.gpus")  # commands for users too


class Parsed(BaseException):
    """Raised by a command that is about to read its command line; holds its parser."""


def raise_parsed(self: argparse.ArgumentParser, *_: Any) -> NoReturn:
    raise Parsed(self)


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag of every documented command, and of torchrun."""
    parsers = [torchrun.get_args_parser()]
    for path in [ROOT / "main.py", *ROOT.glob("[!.]*/**/*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        is_test = name.startswith("tests.") and name not in DOCUMENTED
        if is_test or 'if __name__ == "__main__"' not in path.read_text():
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", raise_parsed)
            with pytest.raises(Parsed) as stop:
                importlib.import_module(name).main([])
        parsers.append(stop.value.args[0])
    return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


def test_flags_within_sentences(flags: set[str]) -> None:
    for page, text in documentation.code_spans():
        if text.startswith("--"):
            named = set(re.findall(r"(?<!\S)--[\w-]+(?=[ =\]]|$)", text)) - {"--no-"}
            assert named <= flags, f"{page}: no command has {named - flags}"


def is_taken(name: str, text: str) -> bool:
    """Return whether a task accepts a value, as typed after --opts, for a key."""
    for task in TASKS.values():
        with contextlib.suppress(ConfigError):
            checked(task.SCHEMA, name, parse_text(task.SCHEMA, name, text), "")
            return True
    return False


def test_settings_within_sentences() -> None:
    """KEY, SECTION.*, or KEY VALUE once or several times; `N` and `<...>` stand for values."""
    known = set().union(*(task.SCHEMA for task in TASKS.values()))
    values = 0
    for page, text in documentation.code_spans():
        text = text.removeprefix("--opts ")
        if not re.match(r"[A-Z]+\.[A-Z_.*]+( |$)", text):
            continue
        words = shlex.split(text)
        for name in words[::2]:
            section = f"{name.rstrip('.*')}."
            assert name in known or any(key.startswith(section) for key in known), f"{page}: {text}"
        for name, value in zip(words[::2], words[1::2], strict=False):
            assert value == "N" or "<" in value or is_taken(name, value), f"{page}: {name} does not take {value}"
            values += 1
    assert values > 10
