"""The command line: the official script's flags, and one line for mistakes in what a command is given.

Light, for commands of every kind: neither torch nor anything else that takes long to import.
"""

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

SECONDARY_RANK_DELAY_SECONDS = 5.0

# Flags and the keys they set; a flag that is not typed sets nothing.
TEXT_FLAGS = {
    "--data-path": ("DATA.DATA_PATH", "folder with train/ and val/"),
    "--cache-mode": ("DATA.CACHE_MODE", "no, part or full: what to keep in memory of zip archives"),
    "--resume": ("MODEL.RESUME", "checkpoint to go on from, or weights to evaluate: a path, a URL, or mlla-t, -s, -b"),
    "--pretrained": ("MODEL.PRETRAINED", "weights to start from, likewise"),
    "--output": ("OUTPUT", "results go to <output>/<MODEL.NAME>/<tag>"),
    "--baseline": ("BENCHMARK.BASELINES", "with --throughput: models to measure beside it, timm:NAME,..."),
    "--sizes": ("BENCHMARK.SIZES", "with --throughput: image sides for a table of the cost of a pixel"),
    "--tag": ("TAG", "tells runs of one model apart"),
}
NUMBER_FLAGS = {
    "--batch-size": ("DATA.BATCH_SIZE", int, "images per process and forward pass"),
    "--model-ema-decay": ("EMA.DECAY", float, "EMA decay per 4096 images"),
    "--local-rank": ("LOCAL_RANK", int, "set by torch.distributed.launch"),
}
SWITCHES = {
    "--zip": ("DATA.ZIP_MODE", "read zip archives"),
    "--use-checkpoint": ("TRAIN.USE_CHECKPOINT", "recompute blocks in the backward pass to save memory"),
    "--freeze-backbone": ("TRAIN.FREEZE", "train the classifier alone"),
    "--amp": ("AMP", "16-bit autocast"),
    "--eval": ("EVAL_MODE", "only evaluate"),
    "--throughput": ("THROUGHPUT_MODE", "only measure speed, on synthetic images"),
    "--train": ("BENCHMARK.TRAIN", "with --throughput: measure the training step"),
    "--profile": ("PROFILE_MODE", "only count parameters and MACs"),
    "--find-unused-params": ("TRAIN.FIND_UNUSED_PARAMS", "let DDP look for parameters without gradient"),
    "--model-ema": ("EMA.ENABLED", "keep an average of the weights"),
    "--model-ema-force-cpu": ("EMA.FORCE_CPU", "keep the average on the CPU"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, with the nearest flag; flags are written in full."""

    def __init__(self, description: str | None, *, prog: str | None = None) -> None:
        keep_lines = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=keep_lines, allow_abbrev=False)
        self.words: list[str] = []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = [word for word in self.words if word.startswith("--") and word.split("=")[0] not in ("--", *flags)]
        if unknown and message.startswith("the following arguments are required"):  # maybe it is one of them, mistyped
            message = f"unrecognized arguments: {unknown[0]}"
        words = message.removeprefix("unrecognized arguments: ").split()
        near = difflib.get_close_matches(words[0].split("=")[0], flags, n=1) if words[0].startswith("-") else []
        hint = f"; did you mean {near[0]}?" if near else "; see --help"
        print(f"error: {message}{hint}", file=sys.stderr)
        sys.exit(2)


def at_least(least: int) -> Callable[[str], int]:
    """A type for `Parser.add_argument`: a whole number, no smaller."""

    def number(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{word}: must be a whole number, at least {least}")
        return value

    return number


@contextmanager
def report_user_errors(kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """While a command is set up, what is wrong with its inputs ends it with one line and exit code 2.

    Of several processes the first speaks first; the launcher then ends the others, before they repeat it.
    """
    try:
        yield
    except kinds as error:
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(SECONDARY_RANK_DELAY_SECONDS)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_command_line(
    description: str,
    argv: Sequence[str] | None = None,
    *,
    keys: Container[str],
    switches: Mapping[str, tuple[str, str]] | None = None,
) -> tuple[str, list[str], dict[str, Any]]:
    """A command line (by default this process's) as (YAML file, words after --opts, values by key of typed flags).

    Offered are those flags that set one of `keys`, and `switches` (key and meaning by flag) beside them.
    A mistyped command line ends the process with one line and exit code 2.
    """
    parser = Parser(description)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file, such as cfgs/mlla_t.yaml")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="settings over the file's"
    )
    for flag, (key, about) in TEXT_FLAGS.items():
        if key in keys:
            parser.add_argument(flag, dest=key, metavar="TEXT", help=about)
    for flag, (key, kind, about) in NUMBER_FLAGS.items():
        aliases = ["--local_rank"] if flag == "--local-rank" else []  # launchers before torch 2.0 write it so
        if key in keys:
            parser.add_argument(flag, *aliases, dest=key, type=kind, metavar="NUMBER", help=about)
    for flag, (key, about) in {**SWITCHES, **(switches or {})}.items():
        if key in keys:
            parser.add_argument(flag, dest=key, action=argparse.BooleanOptionalAction, help=about)
    arguments = vars(parser.parse_args(argv))
    path, opts = arguments.pop("cfg"), arguments.pop("opts")
    return path, opts, {key: value for key, value in arguments.items() if value is not None}
