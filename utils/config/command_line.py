"""Parsing of command lines, with the official script's flags, and one-line reports of user errors.

Light, for commands of every kind: imports neither torch nor anything else that takes long.
"""

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from utils.config.errors import UserError, memory_reason
from utils.config.launcher import tell_launcher
from utils.config.standard_streams import flush_standard_streams, prepare_standard_streams, print_error

if TYPE_CHECKING:
    from utils.config.schema import Key, Schema

SECONDARY_RANK_DELAY_SECONDS = 15.0
MAX_SIDE, MAX_WORKERS = 16384, 1024  # pixels of an image's side, and loader processes, above which it is a mistake
MAX_ARGUMENT, MAX_LINE = 80, 2000  # characters of an argument, and of a line, in errors

# Flags and the keys they set; a flag that is not typed sets nothing.
FLAGS = {
    "--data-path": "DATA.DATA_PATH",
    "--cache-mode": "DATA.CACHE_MODE",
    "--resume": "MODEL.RESUME",
    "--pretrained": "MODEL.PRETRAINED",
    "--output": "OUTPUT",
    "--baseline": "BENCHMARK.BASELINES",
    "--sizes": "BENCHMARK.SIZES",
    "--tag": "TAG",
    "--batch-size": "DATA.BATCH_SIZE",
    "--model-ema-decay": "EMA.DECAY",
    "--local-rank": "LOCAL_RANK",
    "--zip": "DATA.ZIP_MODE",
    "--use-checkpoint": "TRAIN.USE_CHECKPOINT",
    "--freeze-backbone": "TRAIN.FREEZE",
    "--amp": "AMP",
    "--eval": "EVAL_MODE",
    "--ema": "EVAL_EMA",
    "--throughput": "THROUGHPUT_MODE",
    "--train": "BENCHMARK.TRAIN",
    "--profile": "PROFILE_MODE",
    "--find-unused-params": "TRAIN.FIND_UNUSED_PARAMS",
    "--model-ema": "EMA.ENABLED",
    "--model-ema-force-cpu": "EMA.FORCE_CPU",
    "--accumulation-steps": "TRAIN.ACCUMULATION_STEPS",  # this one and the next are Swin's
    "--optim": "TRAIN.OPTIMIZER.NAME",
}
ALIASES = {
    "--resume": ["--weights"],  # as utils.predict and the tasks' predict call it, which know both names too
    "--local-rank": ["--local_rank"],  # as launchers before torch 2.0 write it
}
FUSED = "leave it out: MODEL.KERNELS auto, the default, uses fused kernels wherever they are supported"
REFUSED = {  # flags of Swin's main.py, and what to do instead
    "--fused_window_process": f"MLLA has no windows; {FUSED}",
    "--fused_layernorm": FUSED,
}
AMP_LEVELS = {"O0": False, "O1": True, "O2": True}  # Apex's, in Swin's flag


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors that suggest the nearest flag; unique abbreviations of flags work."""

    def __init__(self, description: str | None, *, prog: str | None = None) -> None:
        keep_lines = argparse.RawDescriptionHelpFormatter
        super().__init__(prog or program_name(), description=description, formatter_class=keep_lines)
        self.argv: list[str] = []
        self.schema: Mapping[str, Key] = {}  # what --opts takes

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self.argv = list(sys.argv[1:] if args is None else args)
        prepare_standard_streams()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = [arg for arg in self.argv if arg.startswith("--") and arg.split("=")[0] not in ("--", *flags)]
        if unknown and message.startswith("the following arguments are required"):  # maybe it is one of them, mistyped
            message = f"unrecognized arguments: {unknown[0]}"
        first = message.removeprefix("unrecognized arguments: ").split()[0]
        hint = self.hint(first.split("=")[0], flags)
        for arg in filter(lambda arg: len(arg) > MAX_ARGUMENT, self.argv):
            message = message.replace(arg, f"{arg[: MAX_ARGUMENT - 3]}...")
        end_with_error(f"{message}; {hint}")

    def hint(self, word: str, flags: Sequence[str]) -> str:
        """Return what to type in place of an unknown word: the setting or the flag that its name is nearest to."""
        from utils.config.schema import keys_called, keys_nearest  # whose own imports take long

        is_unknown = word.startswith("--") and not {word, word.replace("_", "-")} & set(flags)
        near = difflib.get_close_matches(word, flags, n=1) if word.startswith("-") else []
        keys = keys_called(self.schema, word) or ([] if near else keys_nearest(self.schema, word))
        if is_unknown and keys:
            return f"set it with --opts {keys[0]} VALUE"
        return f"did you mean {near[0]}?" if near else "see --help"


def program_name() -> str | None:
    """Return how a user started this process with `python -m`; None for a script or a console command."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else None


class Refuse(argparse.Action):
    """Ends the command at a flag of another program, and says what to use instead."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, __: object, name: str | None = None) -> NoReturn:  # noqa: ARG002
        end_with_error(f"{name}: {self.const}")


def at_least(low: int, high: int = 1_000_000_000) -> Callable[[str], int]:
    """Return a type for `Parser.add_argument` that accepts integers from `low` to `high`."""

    def parse(arg: str) -> int:
        try:
            value = int(arg)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{arg}: must be a whole number, at least {low}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{arg}: must be a whole number, at most {high}")
        return value

    return parse


def amp_of_level(level: str) -> bool:
    """Return whether a level of --amp-opt-level means mixed precision."""
    if level not in AMP_LEVELS:
        raise argparse.ArgumentTypeError(f"{level}: must be one of {', '.join(AMP_LEVELS)}")
    return AMP_LEVELS[level]


@contextmanager
def report_user_errors(
    kinds: tuple[type[Exception], ...] = (UserError,), *, out_of_memory: bool = True
) -> Iterator[None]:
    """Print errors of these kinds, which a user can mend, in one line and exit with code 2; others pass.

    With `out_of_memory` also errors of allocating memory. Of several processes, rank 0 prints first; the launcher then
    ends the others before they repeat it.
    """
    try:
        yield
    except kinds as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SECONDARY_RANK_DELAY_SECONDS)
        end_with_error(" ".join(str(error).split()))
    except (MemoryError, RuntimeError) as error:
        reason = memory_reason(error)
        if not (out_of_memory and reason):
            raise
        end_with_error(f"out of memory ({reason}); lower the sizes and numbers that this command was given")


def end_with_error(line: str) -> NoReturn:
    """Print a user's mistake and exit with code 2."""
    print_error(f"error: {line[:MAX_LINE]}")
    tell_launcher(f"error: {line[:MAX_LINE]}")
    flush_standard_streams()
    sys.exit(2)


def parse_command_line(
    description: str,
    argv: Sequence[str] | None = None,
    *,
    schema: "Schema",
    extra_flags: Mapping[str, str] | None = None,
) -> tuple[str, list[str], dict[str, Any]]:
    """Parse a command line (by default this process's) into the arguments of `load_config`.

    Args:
        description: text for --help.
        argv: the command line without the program's name.
        schema: the task's keys; each of FLAGS is offered if its key is one of them, with the key's type and help.
        extra_flags: further flags of the task, and the keys they set.

    Returns:
        The YAML file, "" where the weights of --resume name it; the KEY VALUE pairs after --opts; and the values by key
        of the flags that were typed.
        A wrong command line ends the process with one line and exit code 2.
    """
    parser = Parser(description)
    parser.schema = schema
    about = "YAML file, or the name of one of the project's; by default the configuration in the weights of --resume"
    parser.add_argument("--cfg", default="", metavar="FILE", help=about)
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="settings over the file's"
    )
    for flag, key in {**FLAGS, **(extra_flags or {})}.items():
        if key not in schema:
            continue
        names, about = [flag, *ALIASES.get(flag, [])], schema[key].help
        if schema[key].type is bool:
            parser.add_argument(*names, dest=key, action=argparse.BooleanOptionalAction, help=about)
        else:
            metavar = "TEXT" if schema[key].type is str else "NUMBER"
            parser.add_argument(*names, dest=key, type=schema[key].type, metavar=metavar, help=about)
    if "AMP" in schema:
        parser.add_argument("--disable_amp", dest="AMP", action="store_const", const=False, help="as --no-amp")
        parser.add_argument(
            "--amp-opt-level",
            dest="AMP",
            type=amp_of_level,
            metavar="LEVEL",
            help="O0: as --no-amp, O1 and O2: as --amp",
        )
    for flag, reason in REFUSED.items():
        parser.add_argument(
            flag, dest=flag, action=Refuse, nargs=0, const=reason, help=argparse.SUPPRESS, default=argparse.SUPPRESS
        )
    args = vars(parser.parse_args(argv))
    path, opts = args.pop("cfg"), args.pop("opts")
    if not (path or args.get("MODEL.RESUME")):
        parser.error("the following arguments are required: --cfg, or --resume with a run's checkpoint")
    return path, opts, {key: value for key, value in args.items() if value is not None}
