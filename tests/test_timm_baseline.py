"""A classifier of timm under the same recipe: trained, resumed, evaluated, and used by every command."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import main
from models.timm_classifier import create_timm_classifier
from tests.helpers import exit_code, photo
from utils import compare, export, predict, visualize
from utils.checkpoint.weights import load_pretrained, load_weights
from utils.checkpoint.weights_file import CheckpointError

RunMain = Callable[..., tuple[int, str, str]]
SETTINGS = "DATA.CLASSES ['0','1'] DATA.IMG_SIZE 32 DATA.BATCH_SIZE 96 MODEL.TYPE timm:test_resnet MODEL.NAME resnet"


def command(output: Path, *opts: str, epochs: int = 2) -> list[str]:
    words = ["--cfg", "cfgs/digits.yaml", "--output", str(output), "--opts", *SETTINGS.split(), *opts]
    return [
        *words,
        "EMA.WARMUP",
        "off",
        "TRAIN.WARMUP_EPOCHS",
        "0",
        "TRAIN.LR_SCHEDULER.NAME",
        "step",
        "TRAIN.EPOCHS",
        str(epochs),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with AMP, EMA, MESA and layer decay, interrupted between them."""
    output = tmp_path_factory.mktemp("timm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("main.Classification.draw_predictions", lambda _, run, *__, **___: run.folder / "predictions.png")
        for epochs in (1, 2):
            assert exit_code(main.main, ["--amp", *command(output, "MODEL.LAYER_DECAY", "0.8", epochs=epochs)]) == 0
    return output / "resnet" / "default"


def test_a_run_resumes(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "loss" in line] == [0, 1]
    log = (trained / "log_rank0.txt").read_text()
    assert log.count("MESA 1.0 from epoch 1;") == 2
    assert "resumed from" in log
    saved = torch.load(trained / "ckpt_epoch_1.pth")
    assert saved["state_dict_ema"].keys() == saved["model"].keys()
    assert not saved["state_dict_ema"]["fc.weight"].equal(saved["model"]["fc.weight"])


def test_evaluation(trained: Path, run_main: RunMain, tmp_path: Path) -> None:
    code, out, _ = run_main("--eval", "--resume", trained / "max_acc.pth", *command(tmp_path))
    assert code == 0
    assert "EMA on 72 images" in out


def test_fine_tuning_on_other_classes(trained: Path) -> None:
    model = create_timm_classifier("test_resnet", num_classes=3, img_size=32)
    own = model.state_dict()["fc.weight"].clone()
    load_pretrained(model, trained / "max_acc.pth", ["a", "b", "c"])
    saved = torch.load(trained / "max_acc.pth")["model"]
    assert model.state_dict()["conv1.0.weight"].equal(saved["conv1.0.weight"])
    assert model.state_dict()["fc.weight"].equal(own)
    with pytest.raises(CheckpointError, match=r"Set MODEL\.NUM_CLASSES 2 to evaluate it"):
        load_weights(create_timm_classifier("test_resnet", num_classes=1, img_size=32), saved, "FILE")


def test_throughput_beside_itself(run_main: RunMain, tmp_path: Path) -> None:
    flags = ["--throughput", "--train", "--baseline", "timm:test_convnext"]
    assert run_main(*flags, *command(tmp_path, "MODEL.TIMM.ARGS", "layers=(1,1,1,2)"))[0] == 0
    rows = map(json.loads, (tmp_path / "resnet" / "default" / "throughput.jsonl").read_text().splitlines())
    assert {row["model"] for row in rows} == {"resnet", "timm:test_convnext"}
    code, out, _ = run_main("--profile", *command(tmp_path))
    assert code == 0
    assert "layer1" in out


def test_commands(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(20, 20).save(tmp_path / "a.png")
    assert exit_code(predict.main, [tmp_path / "a.png", "--weights", trained / "max_ema_acc.pth"]) == 0
    assert "1 " in capsys.readouterr().out
    target = tmp_path / "resnet.pt2"
    args = ["--cfg", trained / "config.yaml", "--resume", trained / "max_acc.pth", "--to", "exported_program"]
    assert exit_code(export.main, [target, *args]) == 0
    exported = torch.export.load(target).module()
    assert exported(torch.zeros(2, 3, 32, 32)).shape == (2, 2)
    capsys.readouterr()
    assert exit_code(visualize.main, ["--resume", trained / "max_acc.pth", "--output", tmp_path / "plots"]) == 2
    assert "only mlla and linear_vit can be plotted" in capsys.readouterr().err
    assert exit_code(compare.main, [trained, "--output", tmp_path / "compare.png"]) == 0
