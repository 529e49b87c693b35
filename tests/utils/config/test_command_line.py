"""Parser and one-line errors; main.py's own flags are tested in test_main.py."""

import importlib
import re
import time
from typing import Any

import pytest

from config import SCHEMA
from data.errors import DataError
from downstream.segmentation import config as segmentation
from models.kernels.dispatch import KernelsUnavailableError
from tests.helpers import exit_code, run_python
from tests.test_imports import COMMANDS
from utils.checkpoint.weights_file import CheckpointError
from utils.config.command_line import (
    FLAGS,
    MAX_SIDE,
    SECONDARY_RANK_DELAY_SECONDS,
    Parser,
    at_least,
    parse_command_line,
    report_user_errors,
)
from utils.config.errors import ConfigError, MissingFileError, UserError
from utils.logs.output_dir import OutputError
from utils.tools.user_files import UserFileError

DENSE = ("detection", "segmentation")


@pytest.mark.parametrize(
    "error",
    [
        UserError("KEY 3: too many; lower it"),
        ConfigError("KEY 3: too many", key="KEY"),
        MissingFileError("x: no such file"),
        DataError("x: damaged"),
        CheckpointError("x: damaged"),
        OutputError("x: full"),
        UserFileError("x: no such file"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, report_user_errors():
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_user_error_of_several_lines_is_printed_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), report_user_errors():
        raise UserError("x: damaged\n  at line 3")
    assert capsys.readouterr().err == "error: x: damaged at line 3\n"


@pytest.mark.parametrize(
    "error", [RuntimeError("a defect"), ValueError("a defect"), OSError("a defect"), KeyError("a")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, report_user_errors():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("kind", ["ValueError", "OSError"])
def test_an_error_of_our_own_code_keeps_its_traceback(kind: str) -> None:
    code = f"""
from utils.config.command_line import report_user_errors
with report_user_errors():
    raise {kind}("a defect")
"""
    done = run_python("-c", code)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith(f"{kind}: a defect\n")


def test_other_kinds_can_be_user_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, report_user_errors((UserError, KernelsUnavailableError)):
        raise KernelsUnavailableError("MODEL.KERNELS triton: no GPU")
    assert (stop.value.code, capsys.readouterr().err) == (2, "error: MODEL.KERNELS triton: no GPU\n")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_memory_that_runs_out_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, report_user_errors():
        raise error
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (2, 1)
    assert err.startswith("error: out of memory (")
    with pytest.raises(type(error)), report_user_errors(out_of_memory=False):
        raise error


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("3", [SECONDARY_RANK_DELAY_SECONDS])])
def test_rank_0_prints_first(monkeypatch: pytest.MonkeyPatch, rank: str, waits: list[float]) -> None:
    slept: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(SystemExit), report_user_errors():
        raise UserError("x")
    assert slept == waits


def test_imports_nothing_slow() -> None:
    done = run_python(
        "-c", "import sys, utils.config.command_line; print(*{'torch', 'numpy', 'yacs'} & {*sys.modules})"
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_flags_set_keys_that_exist() -> None:
    assert set(FLAGS.values()) <= set(SCHEMA)
    assert set(segmentation.FLAGS.values()) <= set(segmentation.SCHEMA)
    args = ["--cfg", "x.yaml", "--weights", "w.pth", "--local_rank", "1", "--no-amp", "--opts", "TAG", "x"]
    assert parse_command_line("", args, schema=SCHEMA) == (
        "x.yaml",
        ["TAG", "x"],
        {"MODEL.RESUME": "w.pth", "LOCAL_RANK": 1, "AMP": False},
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--accumulation-steps 4", {"TRAIN.ACCUMULATION_STEPS": 4}),
        ("--optim AdamW", {"TRAIN.OPTIMIZER.NAME": "AdamW"}),
        ("--disable_amp", {"AMP": False}),
        ("--amp-opt-level O0", {"AMP": False}),
        ("--amp-opt-level O1", {"AMP": True}),
        ("--amp --amp-opt-level=O0", {"AMP": False}),
        (
            "--resum w.pth --data x --use-check",
            {"MODEL.RESUME": "w.pth", "DATA.DATA_PATH": "x", "TRAIN.USE_CHECKPOINT": True},
        ),
    ],
)
def test_flags_of_swin_and_abbreviations(args: str, expected: dict[str, Any]) -> None:
    for schema in (SCHEMA, segmentation.SCHEMA):
        assert parse_command_line("", ["--cfg", "x.yaml", *args.split()], schema=schema) == ("x.yaml", [], expected)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("--amp-opt-level O9", "argument --amp-opt-level: O9: must be one of O0, O1, O2; see --help"),
        ("--fused_window_process", "--fused_window_process: MLLA has no windows; leave it out: MODEL.KERNELS auto"),
        ("--fused_layer", "--fused_layernorm: leave it out: MODEL.KERNELS auto"),
    ],
)
def test_refused_flags_of_swin(args: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_command_line("", ["--cfg", "x.yaml", *args.split()], schema=SCHEMA)
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {line}")


@pytest.mark.parametrize(
    ("arg", "hint"),
    [
        ("--epochs", "set it with --opts TRAIN.EPOCHS VALUE"),
        ("--epoch", "set it with --opts TRAIN.EPOCHS VALUE"),
        ("--num-epochs", "set it with --opts TRAIN.EPOCHS VALUE"),
        ("--img_size", "set it with --opts DATA.IMG_SIZE VALUE"),
        ("--image-size", "set it with --opts DATA.IMG_SIZE VALUE"),
        ("--lr", "set it with --opts TRAIN.BASE_LR VALUE"),
        ("--data_path", "did you mean --data-path?"),
        ("--batchsize", "did you mean --batch-size?"),
        ("--qqq", "see --help"),
    ],
)
def test_hint_for_a_flag_that_there_is_not(arg: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command_line("", ["--cfg", "x.yaml", arg, "1"], schema=SCHEMA)
    assert capsys.readouterr().err == f"error: unrecognized arguments: {arg} 1; {hint}\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_suggests_the_nearest_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(importlib.import_module(name).main, ["--hepl"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --hepl; did you mean --help?\n"


@pytest.mark.parametrize(
    "name",
    [
        *("main", "utils.predict", "utils.export", "utils.visualize"),
        *(f"downstream.{task}.{command}" for task in DENSE for command in ("main", "predict")),
    ],
)
def test_resume_and_weights_are_one_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(importlib.import_module(name).main, ["--help"]) == 0
    assert re.search(r"--resume( \S+)?, --weights \S|--weights( \S+)?, --resume \S", capsys.readouterr().out)


@pytest.mark.parametrize(
    "name",
    [
        *("utils.predict", "utils.export", "utils.visualize"),
        *("downstream.detection.predict", "downstream.segmentation.predict"),
    ],
)
def test_commands_on_a_trained_model_have_the_same_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(importlib.import_module(name).main, ["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {flag}\b", text, re.M) for flag in ("--weights", "--cfg", "--opts", "--ema", "--force"))
    assert ("--device" in text) == (name != "utils.export")  # which writes a file for any device, on the CPU
    assert ("--output FOLDER" in text) == (name != "utils.export")  # whose file is an argument


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["x", "--image-sise", "3"], "unrecognized arguments: --image-sise 3; did you mean --image-size?"),
        (["x", "--image-sise=3"], "unrecognized arguments: --image-sise=3; did you mean --image-size?"),
        (["x", "-image-size", "3"], "unrecognized arguments: -image-size 3; did you mean --image-size?"),
        (["x", "--i", "3"], "ambiguous option: --i could match --image-size, --images; see --help"),
        (["x", "--zzz"], "unrecognized arguments: --zzz; see --help"),
        (["x", "y"], "unrecognized arguments: y; see --help"),
        (["x", "--image-size", "big"], "argument --image-size: big: must be a whole number, at least 8; see --help"),
        (["x", "--image-size", "7"], "argument --image-size: 7: must be a whole number, at least 8; see --help"),
        (
            ["x", "--image-size", "9" * 5000],
            f"argument --image-size: {'9' * 77}...: must be a whole number, at least 8; see --help",
        ),
        (
            ["x", "--image-size", "16385"],
            "argument --image-size: 16385: must be a whole number, at most 16384; see --help",
        ),
        ([], "the following arguments are required: path; see --help"),
        (["--", "--zzz", "y"], "unrecognized arguments: y; see --help"),
    ],
)
def test_error_line_of_a_wrong_command_line(args: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("A command.", prog="command")
    parser.add_argument("path")
    parser.add_argument("--image-size", type=at_least(8, MAX_SIDE))
    parser.add_argument("--images")
    assert parser.parse_args(["x", "--image-size", "8"]).image_size == 8
    assert parser.parse_args(["x", "--image-s", "8"]).image_size == 8
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(args)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"
