import json
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from downstream.segmentation import main as command
from downstream.segmentation.config import load_config
from downstream.segmentation.task import Segmentation
from tests.downstream.segmentation.segmentation_worker import CONFIG, SMALL, make_data
from tests.helpers import exit_code

pytestmark = pytest.mark.slow

Runner = Callable[..., tuple[int, str]]
STEPS = {"TRAIN.STEPS": 6, "TRAIN.EVAL_STEPS": 3, "TRAIN.SAVE_STEPS": 2, "DATA.BATCH_SIZE": 2, "PRINT_FREQ": 1}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    """Hide the GPU, which adds gradients in any order: runs are compared bit by bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "shapes", val=3)


@pytest.fixture
def start(data: Path, capfd: pytest.CaptureFixture[str]) -> Runner:
    """Call the command with a small model: (exit code, what it printed)."""

    def run(output: Path, *words: Any, **opts: Any) -> tuple[int, str]:
        pairs = [str(x) for pair in {**SMALL, **STEPS, "DATA.DATA_PATH": data, **opts}.items() for x in pair]
        code = exit_code(command.main, ["--cfg", CONFIG, "--output", output, *words, "--opts", *pairs])
        out, err = capfd.readouterr()
        return code, out + err

    return run


def run_folder(output: Path) -> Path:
    return output / "shapes_upernet" / "default"


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("finished")
    pairs = [str(x) for pair in {**SMALL, **STEPS, "DATA.DATA_PATH": data}.items() for x in pair]
    assert command.main(["--cfg", CONFIG, "--output", str(output), "--opts", *pairs]) == 0
    return run_folder(output)


def test_what_a_run_leaves(finished: Path) -> None:
    names = {"config.yaml", "metrics.jsonl", "curves.png", "predictions.png", "max_miou.pth", "max_ema_miou.pth"}
    assert names <= {path.name for path in finished.iterdir()}
    first, last = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert (first["step"], last["step"]) == (3, 6)
    assert {"miou", "mean_accuracy", "pixel_accuracy", "ema_miou", "train_decode", "train_auxiliary"} <= last.keys()
    assert last["train_loss"] == pytest.approx(last["train_decode"] + last["train_auxiliary"])


class Fault:
    """Does something in the given call of Segmentation.batch_losses, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: int, action: Callable[[dict[str, Any]], Any]) -> None:
        self.calls = 0
        original = Segmentation.batch_losses

        def losses(task: Segmentation, *args: Any) -> dict[str, Any]:
            self.calls += 1
            result = dict(original(task, *args))
            if self.calls == call:
                action(result)
            return result

        monkeypatch.setattr(Segmentation, "batch_losses", losses)
        monkeypatch.setattr("utils.training.training_run.memory_warning", lambda *_: "")  # which calls it, too


def interrupt(_: dict[str, Any]) -> None:
    raise KeyboardInterrupt


def terminate(_: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("action", "code", "steps"), [(interrupt, 130, 4), (terminate, 0, 5)])
def test_an_interrupted_run_ends_with_the_same_weights(
    finished: Path, tmp_path: Path, start: Runner, monkeypatch: pytest.MonkeyPatch, action: Any, code: int, steps: int
) -> None:
    """In the second of three steps after an evaluation: after Ctrl-C from the checkpoint of step 4, after SIGTERM from
    where it was. Dropout draws random numbers.
    """
    fault = Fault(monkeypatch, 5, action)
    assert start(tmp_path)[0] == code
    assert start(tmp_path)[0] == 0
    assert fault.calls == 5 + 6 - steps
    folder = run_folder(tmp_path)
    ours, theirs = (torch.load(path / "ckpt_epoch_1.pth") for path in (folder, finished))
    for kind in ("model", "state_dict_ema"):
        assert all(torch.equal(value, theirs[kind][name]) for name, value in ours[kind].items())
    assert (folder / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, start: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fault(monkeypatch, 5, lambda losses: losses.update(decode=losses["decode"] * float("nan")))
    code, output = start(tmp_path)
    assert code == 1
    assert "not finite in epoch 2, step 2 (step 5 of the run)" in output
    weights = torch.load(run_folder(tmp_path) / "ckpt_epoch_1_step_1.pth")["model"]
    assert all(value.isfinite().all() for value in weights.values())


def test_evaluation_repeats_what_training_found(finished: Path, tmp_path: Path, start: Runner) -> None:
    code, output = start(tmp_path, "--eval", "--resume", finished / "ckpt_epoch_1.pth", "--save-predictions")
    assert code == 0
    assert "model mIoU" in output
    model, average = [json.loads(x) for x in (run_folder(tmp_path) / "evaluations.jsonl").read_text().splitlines()]
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert (model["miou"], average["miou"]) == (last["miou"], last["ema_miou"])
    assert list(model["class_iou"]) == ["background", "circle", "square", "triangle", "star", "cross"]
    folder = run_folder(tmp_path) / "predictions_EMA_1"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"0000{i}{end}" for i in range(3) for end in (".png", "_overlay.jpg")
    ]
    with Image.open(folder / "00000.png") as picture:
        assert picture.mode == "P"
        assert set(np.unique(picture)) <= set(range(6))


@pytest.mark.parametrize("switch", ["--multi-scale", "--slide"])
def test_other_ways_to_evaluate(finished: Path, tmp_path: Path, start: Runner, switch: str) -> None:
    opts = {"TEST.WINDOW": 32, "TEST.STRIDE": 20, "TEST.FACTORS": [0.5, 1.0]}
    assert start(tmp_path, "--eval", "--resume", finished / "max_miou.pth", switch, **opts)[0] == 0
    record = json.loads((run_folder(tmp_path) / "evaluations.jsonl").read_text().splitlines()[0])
    assert (record["multi_scale"], record["slide"]) == (switch == "--multi-scale", switch == "--slide")
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["miou"] != last["miou"]


class Plugin:
    """An object of a class that is not installed, as OpenMMLab files contain beside the weights."""


def test_weights_in_the_published_format(
    finished: Path, tmp_path: Path, start: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `state_dict`, with rotary tables, beside an unknown object."""
    own = torch.load(finished / "ckpt_epoch_1.pth")["model"]
    tables = {"backbone.layers.0.blocks.0.attn.rope.rotations": torch.zeros(12, 12, 4, 2)}
    monkeypatch.setattr(Plugin, "__module__", "mmplugin")
    monkeypatch.setitem(sys.modules, "mmplugin", types.SimpleNamespace(Plugin=Plugin))
    torch.save({"meta": {"hooks": Plugin()}, "state_dict": {**own, **tables}}, tmp_path / "published.pth")
    monkeypatch.delitem(sys.modules, "mmplugin")
    assert start(tmp_path, "--eval", "--resume", tmp_path / "published.pth")[0] == 0
    record = json.loads((run_folder(tmp_path) / "evaluations.jsonl").read_text())
    assert record["miou"] == json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])["miou"]


def test_a_bad_mask_in_mid_run_is_one_line(tmp_path: Path, start: Runner) -> None:
    folder = make_data(tmp_path / "shapes", val=2)
    Image.new("L", (48, 48), 77).save(folder / "masks/train/00003.png")
    code, output = start(tmp_path, **{"DATA.DATA_PATH": folder})
    assert code == 2
    assert "masks/train/00003.png: the mask holds 77; with 6 classes" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ({"DATA.DATA_PATH": "nowhere"}, "nowhere/classes.txt: cannot be read"),
        ({"DATA.DATA_PATH": ""}, "DATA.DATA_PATH is empty"),
        ({"DATA.BATCH_SIZE": 1}, "DATA.BATCH_SIZE 1: the heads' batch norm needs two images"),
        ({"MODEL.NUM_CLASSES": 5}, "MODEL.NUM_CLASSES 5: the dataset has 6 classes"),
        ({"TRAIN.EVAL_STEPS": 4}, "TRAIN.EVAL_STEPS 4: must divide TRAIN.STEPS, which is 6"),
        ({"TEST.STRIDE": 600}, "TEST.STRIDE 600: must not be above TEST.WINDOW, 512"),
        ({"DATA.SCALE": "[512, 2048]"}, "DATA.SCALE [512, 2048]: must have the long side first"),
        ({"MODEL.TYPE": "timm:nothing"}, "timm:nothing: timm has no such model"),
    ],
)
def test_mistakes_in_one_line(tmp_path: Path, start: Runner, opts: dict[str, Any], message: str) -> None:
    code, output = start(tmp_path, **opts)
    assert code == 2
    assert [line for line in output.splitlines() if line.startswith("error: ")] == [output.splitlines()[-1]]
    assert message in output


def test_shipped_recipe() -> None:
    configs = {size: load_config(f"downstream/segmentation/cfgs/mlla_{size}_upernet.yaml") for size in "tsb"}
    for config in configs.values():
        train = config.TRAIN
        assert (train.STEPS, train.EVAL_STEPS, train.WARMUP_STEPS, config.DATA.BATCH_SIZE) == (160000, 16000, 1500, 2)
        assert (train.BASE_LR, train.WARMUP_FACTOR, train.WEIGHT_DECAY, train.CLIP_GRAD) == (6e-5, 1e-6, 0.01, 0)
        assert (config.DATA.SCALE, config.AUG.RATIO, config.AUG.CROP_SIZE) == ([2048, 512], [0.5, 2.0], 512)
        assert not config.EMA.ENABLED
    assert [configs[size].MODEL.DROP_PATH_RATE for size in "tsb"] == [0.2, 0.3, 0.5]


@pytest.mark.parametrize(
    ("size", "parameters", "gmacs"), [("t", 54.19, 928.6), ("s", 72.81, 993.7), ("b", 127.64, 1182.0)]
)
def test_parameters_and_macs(capsys: pytest.CaptureFixture[str], size: str, parameters: float, gmacs: float) -> None:
    assert command.main(["--cfg", f"downstream/segmentation/cfgs/mlla_{size}_upernet.yaml", "--profile"]) == 0
    total = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("total")).split()
    assert int(total[1].replace(",", "")) / 1e6 == pytest.approx(parameters, abs=0.005)
    assert float(total[2]) == pytest.approx(gmacs, abs=0.1)
