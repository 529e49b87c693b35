"""Every command and every piece of Python in the documentation: run at small scale, or where that takes long parsed."""

import argparse
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import timm
import torch
from torch.distributed import launch
from torch.distributed import run as torchrun

from downstream.segmentation.config import FLAGS
from models import variants
from tests import documentation
from tests.documentation import SMALL, SMALL_TIMM, TASKS, Block
from tests.helpers import ROOT, exit_code
from utils import convert
from utils.config import command_line


class Rule(NamedTuple):
    """How the commands are checked that a pattern fits.

    Attributes:
        pattern: of the whole command.
        check: called with the command's words.
        swap: words in place of others, to make less work of it.
    """

    pattern: str
    check: Callable[[list[str]], None]
    swap: dict[str, str] = {}  # noqa: RUF012, a default that nothing changes


class Parsed(BaseException):
    """Raised once a command has understood its command line, in place of its work."""


def entry_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command line starts, by Python or a launcher, and the words that it gets."""
    if words[0] == "torchrun" or words[:3] == ["python", "-m", "torch.distributed.launch"]:
        is_torchrun = words[0] == "torchrun"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.distributed.launch is deprecated, and works
            parsed = torchrun.parse_args(words[1:]) if is_torchrun else launch.parse_args(words[3:])
        name, rest = parsed.training_script, parsed.training_script_args
        if not parsed.module:
            assert (ROOT / name).is_file()
        return name.removesuffix(".py").removeprefix("mlla."), rest if is_torchrun else ["--local-rank=0", *rest]
    assert words[0] == "python"
    name, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    name = name.removeprefix("mlla.").replace("/", ".")  # mlla is the name of the installed package
    assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file(), f"there is no {name}"
    return name, rest


def call(name: str, words: list[str]) -> None:
    """Run a module's main, which must succeed."""
    code = exit_code(importlib.import_module(name).main, words)
    assert code == 0, f"exit code {code}"


def runs(words: list[str]) -> None:
    """Settings are right as they stand; what is run, in this process, has those of SMALL after them.

    tests/utils/distributed/test_process.py and others start real launchers.
    """
    name, words = entry_of(words)
    words = [path for word in words for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    if name in TASKS:
        check_settings(name, words)
    small = ["--opts", *SMALL[name].split()] if name in SMALL else []
    call(name, [*words, *small])


def settles(words: list[str]) -> None:
    """The flags are known, and the configuration with them and with what is typed after --opts is right."""
    name, words = entry_of(words)
    check_settings(name, words)


def check_settings(name: str, words: list[str]) -> None:
    schema = TASKS[name].SCHEMA
    extra_flags = FLAGS if name == "downstream.segmentation.main" else None
    TASKS[name].load_config(*command_line.parse_command_line("", words, schema=schema, extra_flags=extra_flags))


def parses(words: list[str]) -> None:
    """Let a command that takes long only parse its arguments."""
    name, words = entry_of(words)
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, words: Any = None, namespace: Any = None) -> NoReturn:
        parse(self, words, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed):
            call(name, words)


def helps(words: list[str]) -> None:
    """A command is named without its words, or with `...` for them."""
    name, words = entry_of(words)
    assert words in ([], ["..."], ["--local-rank=0", "..."])
    call(name, ["--help"])


def makes(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.replace("\\\n", " ").splitlines():  # what it runs is there
        for name in re.findall(r"python -m ((?:data|models|utils|downstream)[\w.]+)", line):
            assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()
        assert all((ROOT / path).is_file() for path in re.findall(r"[\w/]+\.yaml", line))


def installs(words: list[str]) -> None:
    """tests/utils/tools/test_package_build.py installs; here: that extras and packages are those of the project."""
    name = words[-1]
    if words[2] == "-r":
        assert (ROOT / name).is_file()
        return
    extra = re.fullmatch(r"\.\[(\w+)\]", name)
    file = "pyproject.toml" if extra else "requirements.txt"
    assert name == "." or re.search(rf"\b{extra[1] if extra else name}\b", (ROOT / file).read_text())


def activates(words: list[str]) -> None:
    """The environment is the one that `make` builds."""
    folder, _, script = words[1].partition("/")
    assert script == "bin/activate"
    assert f"-m venv {folder}\n" in (ROOT / "Makefile").read_text()


def shows(words: list[str]) -> None:
    from tensorboard.program import TensorBoard

    TensorBoard().configure(words)


def converts(words: list[str]) -> None:
    """The synopsis: every format, bare and with all that stands in brackets."""
    name, (source, target, to, forms, *options) = entry_of(words)
    assert forms.strip("{}").split(",") == sorted(convert.FORMATS)
    for form in convert.FORMATS:
        path = f"{target}_{form}" + (".safetensors" if form == "safetensors" else ".pth")
        call(name, [source, path, to, form])
        typed = re.sub(r"[][]", "", " ".join(options)).replace("H W", "64 64")
        typed = typed.replace("--training-state", "")  # not with --ema; tests/utils/test_convert.py has it
        if form != "official":
            typed = typed.replace("--size 64 64", "")
        call(name, [source, path, to, form, *typed.split()])


def both(words: list[str]) -> None:
    """Return the command with and without the word in brackets."""
    runs([word for word in words if word[0] != "["])
    runs([word.strip("[]") for word in words])


def fine_tunes(words: list[str]) -> None:
    """The program of the page that names it."""
    (block,) = [block for block in documentation.blocks() if "sys.argv" in block.text]
    assert len(block.text.splitlines()) <= 60
    run_python_block(block, words[2:])


SAFETENSORS = {f"{name}onnx": f"{name}safetensors" for name in ("", "mlla_t.", "maps.", "backbone.")}
RULES = [
    Rule(r"make [\w-]+( ABLATION=.*)?", makes),
    Rule(r"pip install (-r )?\S+", installs),
    Rule(r"source \S+", activates),
    Rule(r"tensorboard .*", shows),
    Rule(r"(python|torchrun) .*\.\.\.", helps),
    Rule(r"torchrun --max-restarts 3", lambda words: helps([*words, "main.py"])),
    Rule(r"python -m (data|utils|mlla)\.\w+", helps),
    Rule(r"python -m utils\.(time_to_accuracy|finetune_study) .*", parses),
    Rule(r"python -m models\.\w+( .*)?", parses),
    Rule(r"python tests/(soak|gpus)\.py --\w+( \d+)?", parses),
    Rule(r"python -m [\w.]+\.benchmark .*", parses),
    Rule(r"python -m utils\.convert IN OUT --to .*", converts),
    Rule(r"python -m data\.verify PATH( \[--zip\])?", both),
    Rule(r"python -m data\.make_zip IMAGENET_DIR OUT_DIR", runs),
    Rule(r"python main\.py .*<row>\.yaml --profile", runs, {"cfgs/ablation/<row>.yaml": "cfgs/ablation/lepe.yaml"}),
    # Measuring takes long, and tests/test_main.py does it.
    Rule(r"(python|torchrun) .* --throughput .*", settles),
    # It needs their package, and tests/utils/logs/test_wandb_logger.py has a stand-in.
    Rule(r"(python|torchrun) .* LOG\.WANDB .*", settles),
    Rule(r"(python|torchrun) .*\bfashion_mnist.*", settles),  # its files may be missing, and are 60,000 images
    # The other launcher's command beside it is run.
    Rule(r"python -m torch.distributed.launch .*(downstream|ablation).*", settles),
    Rule(r"torchrun --nproc_per_node=8 main.py --cfg cfgs/mlla_t.yaml .*", settles),
    Rule(r"(python|torchrun) .*\bmain(\.py)? .*", runs),
    # ONNX and dynamic sizes take long, and tests/utils/test_export.py has them.
    Rule(r"python -m utils\.export (mlla_t|maps|backbone)\.onnx .*", runs, SAFETENSORS),
    Rule(r"python -m utils\.(predict|visualize|compare|report) .*", runs),
    Rule(r"python -m downstream\.\w+\.predict .*", runs),
    Rule(r"python finetune\.py photos", fine_tunes),
]
# Indented blocks that nobody types: trees of folders, and what is printed. They begin like this.
NO_COMMANDS: tuple[str, ...] = ("COCO/annotations/", "garden/classes.txt", "error: ", "out of GPU memory")
# For SLURM; tests/test_interruptions.py runs its launcher.
NO_COMMANDS += ("#!/bin/bash\n#SBATCH", "epoch 7/30: ", "a step with ")
COMMANDS = documentation.commands()


def rule_for(command: str) -> Rule | None:
    return next((rule for rule in RULES if re.fullmatch(rule.pattern, command)), None)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return documentation.make_folder(tmp_path_factory.mktemp("documented") / "folder")


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: it has what documented commands name, released weights are where downloads are kept, and
    mlla_tiny is small.
    """
    root = shutil.copytree(prepared, tmp_path / "folder", symlinks=True)
    monkeypatch.chdir(root)
    monkeypatch.setenv("TORCH_HOME", str(root))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setitem(variants.SIZES, "tiny", SMALL_TIMM)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.replace("/", "|"))
def test_command(command: str, folder: Path) -> None:  # noqa: ARG001
    rule = rule_for(command)
    assert rule is not None, f"no rule in RULES for what {COMMANDS[command]} documents: {command}"
    rule.check([rule.swap.get(word, word) for word in shlex.split(command)])


def test_rules_and_blocks_are_all_accounted_for() -> None:
    unused = [rule.pattern for rule in RULES if not any(rule_for(command) == rule for command in COMMANDS)]
    assert not unused
    others = [b for b in documentation.blocks() if b.language in ("", "bash", "sh")]
    others = [b for b in others if " ".join(b.text.split("\n")[0].rstrip("\\").split()) not in " ".join(COMMANDS)]
    assert {b.text for b in others if not b.text.startswith(NO_COMMANDS)} == set()
    assert {b.language for b in documentation.blocks()} <= {"", "bash", "python", "bibtex", "yaml", "text"}


def run_python_block(block: Block, argv: list[str]) -> dict[str, Any]:
    """Run Python as it stands but for the sizes in the example of fine-tuning; gives its variables."""
    text = block.text.replace("sys.argv[1], 224, 64, 30, 3", "sys.argv[1], 32, 4, 2, 1")
    text = text.replace('"num_workers": 4', '"num_workers": 1')
    assert (text != block.text) == ("sys.argv" in text)
    variables: dict[str, Any] = {"__name__": "documented"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["documented.py", *argv])
        exec(compile(text, block.page, "exec"), variables)
    return variables


def shapes_of(value: Any) -> list[tuple[int, ...]]:
    return [tuple(value.shape)] if isinstance(value, torch.Tensor) else [tuple(item.shape) for item in value]


PYTHON = [block for block in documentation.blocks() if block.language == "python"]


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}: {block.text.splitlines()[0]}")
def test_python(
    block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = dict(re.findall(r"^(\w+) = .*# (\(\d.*\))", block.text, re.M))
    if shapes:
        monkeypatch.undo()  # the sizes are those of the real model
        monkeypatch.chdir(folder)
    variables = run_python_block(block, ["my_images"])
    for name, written in shapes.items():
        assert shapes_of(variables[name]) == [
            tuple(map(int, shape.split(","))) for shape in re.findall(r"\(([\d, ]+)\)", written)
        ]
    if "sys.argv" in block.text:
        assert len(re.findall(r"epoch \d: loss \d+\.\d+, top-1 \d+\.\d+%", capsys.readouterr().out)) == 2
        assert torch.load(folder / "best.pth")["classes"] == ["cat", "dog"]
        timm.create_model("mlla_tiny", num_classes=2, checkpoint_path="best.pth")
        call("utils.predict", ["new_photos", "--model", "mlla_tiny", "--weights", "best.pth"])
        assert re.search(r"c\.jpg +(cat|dog) \d+\.\d%  (cat|dog) \d+\.\d%\n$", capsys.readouterr().out)
