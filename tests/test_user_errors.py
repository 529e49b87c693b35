"""User errors of every kind are one line and exit code 2 in every command."""

import importlib
from pathlib import Path

import pytest

from tests.helpers import exit_code

LONG = "x" * 300  # the system refuses such a name, as it refuses a folder that may not be read
DETECTION, SEGMENTATION = (f"downstream/{task}/cfgs/shapes.yaml" for task in ("detection", "segmentation"))
RUNS = {
    "main": ["--cfg", "cfgs/digits.yaml"],
    "downstream.detection.main": ["--cfg", DETECTION],
    "downstream.segmentation.main": ["--cfg", SEGMENTATION],
}
# Command, arguments, and what the line must name; FILE is a file of text, EMPTY an empty folder, OUT does not exist.
CASES = [
    *((command, ["--cfg", file], file) for command in RUNS for file in ("FILE", "EMPTY", LONG)),
    *((command, [*args, "--output", "FILE"], "FILE/") for command, args in RUNS.items()),
    *((command, [*args, "--output", "/dev/full"], "/dev/full/") for command, args in RUNS.items()),
    *((command, [*args, "--opts", "TAG", "a\0b"], "TAG ") for command, args in RUNS.items()),
    ("main", ["--cfg", "cfgs/digits.yaml", "--output", "OUT", "--eval"], "MODEL.RESUME"),
    *(
        ("main", ["--cfg", "cfgs/digits.yaml", "--output", "OUT", "--eval", "--resume", file], file)
        for file in ("FILE", "EMPTY", "OUT", "FILE/x.pth", LONG, "http://[::1/x.pth", "http://127.0.0.1:9/x.pth")
    ),
    *(
        ("main", ["--cfg", "cfgs/mlla_t.yaml", "--output", "OUT", "--data-path", folder, *flags], folder)
        for folder in ("FILE", "EMPTY", "OUT", LONG)
        for flags in ([], ["--zip"], *(["--opts", "DATA.DATASET", name] for name in ("wds/", "idx")))
    ),
    *(
        (command, [*args, "--output", "OUT", "--data-path", folder], folder)
        for command, args in [*RUNS.items()][1:]
        for folder in ("FILE", "EMPTY", "OUT", LONG)
    ),
    ("utils.predict", ["OUT", "--weights", "FILE"], "OUT"),
    ("downstream.segmentation.predict", ["OUT", "--weights", "FILE", "--output", "OUT.json"], "OUT"),
    ("downstream.detection.predict", ["OUT", "--weights", "FILE"], "OUT"),
    ("utils.predict", [LONG, "--weights", "FILE"], LONG),
    ("utils.predict", ["FILE", "--model", "no_such_model", "--weights", "FILE"], "--model no_such_model"),
    *(("utils.convert", ["FILE", target, "--to", "ours"], target) for target in ("EMPTY", "FILE/x.pth", LONG)),
    ("utils.export", ["OUT.pt", "--cfg", "OUT.yaml", "--resume", "FILE", "--to", "torchscript"], "OUT.yaml"),
    ("utils.export", [LONG + ".pt", "--cfg", "OUT", "--resume", "FILE", "--to", "torchscript"], LONG),
    ("utils.visualize", ["--resume", "FILE"], "FILE"),
    *(("utils.report", [folder], folder) for folder in ("FILE", "EMPTY", LONG)),
    *(("utils.compare", [folder, "--output", "OUT.png"], folder) for folder in ("FILE", "EMPTY", LONG)),
    *(("data.make_zip", [folder, "OUT"], folder) for folder in ("FILE", "EMPTY", LONG)),
    *(("data.verify", [folder, "--output", "OUT"], folder) for folder in ("FILE", "EMPTY", LONG)),
    *(("data.verify", ["EMPTY", "--output", output], output) for output in ("FILE", "FILE/x", LONG)),
    *(
        (f"downstream.{task}.make_shapes", [folder], folder)
        for task in ("detection", "segmentation")
        for folder in ("FILE", "FILE/x", LONG)
    ),
    ("downstream.detection.benchmark", ["--models", "nothing"], "--models nothing"),
    *(
        ("downstream.segmentation.benchmark", ["--backbones", name, "--rounds", "1"], f"MODEL.TYPE {name}")
        for name in ("timm:nothing", "timm:resnet18.no_such_tag", "timm:")
    ),
    ("downstream.segmentation.benchmark", ["--backbones", "nothing"], "MODEL.TYPE"),
    *(
        ("utils.predict", ["FILE", "--model", name, "--weights", "FILE"], f"--model {name}")
        for name in ("resnet18.no_such_tag", "timm/resnet18")
    ),
    ("models.ablation_study", ["--output", "FILE"], "FILE"),
    ("utils.time_to_accuracy", ["--cfg", "cfgs/digits.yaml", "--target", "9", "--output", "FILE"], "FILE"),
    ("models.mesa_study", ["--output", "FILE"], "FILE"),
    ("models.mesa_study", ["--output", "OUT", "--equal-time"], "--equal-time"),
    ("utils.finetune_study", ["--output", "FILE"], "FILE"),
    ("utils.finetune_study", ["--output", "OUT", "--data-path", "EMPTY"], "EMPTY"),
    ("utils.time_to_accuracy", ["--cfg", "OUT", "--target", "9", "--output", "EMPTY"], "OUT"),
    ("models.ablation_study", ["--output", "OUT", "--rows", "nothing"], "--rows nothing"),
    ("models.ablation_study", ["--output", "OUT", "--scale", "EMPTY"], "EMPTY"),
    ("models.scan_speed", ["--tokens", "1", "--output", "FILE"], "FILE"),
]


@pytest.mark.parametrize(("command", "args", "named"), CASES)
def test_one_line_and_exit_code_2(
    command: str, args: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").write_text("neither YAML keys nor weights")
    (tmp_path / "EMPTY").mkdir()

    def real(text: str) -> str:
        return str(tmp_path / text) if text.startswith(("FILE", "EMPTY", "OUT")) else text

    assert exit_code(importlib.import_module(command).main, map(real, args)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert real(named) in error


@pytest.mark.parametrize(
    "variables", [{"RANK": "abc"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"LOCAL_RANK": "-1"}]
)
def test_variables_of_a_launcher(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda _: None)
    args = ["--cfg", "cfgs/digits.yaml", "--output", tmp_path]
    assert exit_code(importlib.import_module("main").main, args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "torchrun" in error
