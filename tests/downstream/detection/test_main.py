import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from downstream.detection import main as detection
from downstream.detection import predict
from downstream.detection.make_shapes import make_shapes
from downstream.detection.task import Detection
from tests.helpers import exit_code, note_compiled_modules, run_python

pytestmark = pytest.mark.slow

CFG = "downstream/detection/cfgs/shapes.yaml"
SMALL = {
    "MODEL.MLLA.EMBED_DIM": "8",
    "MODEL.MLLA.DEPTHS": "[1,1,1,1]",
    "MODEL.MLLA.NUM_HEADS": "[1,1,1,1]",
    "MODEL.DROP_PATH_RATE": "0.1",
    "MODEL.DETECTOR.WIDTH": "8",
    "MODEL.DETECTOR.HIDDEN": "16",
    "MODEL.DETECTOR.ROI_SAMPLES": "16",
    "MODEL.DETECTOR.MAX_PROPOSALS": "50",
    "AUG.SHORT_SIDES": "[32,64]",
    "AUG.LONG_SIDE": "80",
    "TEST.SHORT_SIDE": "64",
    "TEST.LONG_SIDE": "80",
    "TRAIN.EPOCHS": "2",
    "TRAIN.DECAY_EPOCHS": "[1]",
    "TRAIN.WARMUP_STEPS": "2",
    "DATA.BATCH_SIZE": "2",
    "EMA.ENABLED": "True",
    "PRINT_FREQ": "1",
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(folder, {"train": 9, "val": 5}, seed=1)
    return folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], shapes: Path, tmp_path: Path) -> Run:
    """Call the command in this process: (exit code, standard output, standard error)."""

    def call(*words: Any, data: Path = shapes, output: Path = tmp_path / "out", **opts: str) -> tuple[int, str, str]:
        pairs = [
            word for pair in {**SMALL, **{k.replace("__", "."): v for k, v in opts.items()}}.items() for word in pair
        ]
        flags = ["--cfg", CFG, "--data-path", data, "--output", output, "--opts", *pairs, *words]
        code = exit_code(detection.main, flags)
        out, err = capfd.readouterr()
        return code, out, err

    return call


def folder_of(output: Path) -> Path:
    return output / "mask_rcnn_shapes" / "default"


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder_of(output) / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder_of(output) / name)["model"]


def test_files_of_a_run_and_its_evaluation(run: Run, tmp_path: Path) -> None:
    code, out, err = run()
    assert code == 0, err
    folder = folder_of(tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "curves.png", "predictions.jpg", "log_rank0.txt"} <= names
    assert {"results_model.json", "results_ema.json", "ckpt_epoch_1.pth", "max_box_ap.pth"} <= names
    last = records(tmp_path / "out")[-1]
    assert last["step"] == 8
    assert {f"{who}{kind}_{name}" for who in ("", "ema_") for kind in ("box", "mask") for name in ("AP", "ARl")} <= set(
        last
    )
    terms = sum(last[f"train_loss_{name}"] for name in ("rpn_cls", "rpn_bbox", "cls", "bbox", "mask"))
    assert last["train_loss"] == pytest.approx(terms)
    assert "9 training and 5 validation images" in out or "8 training" in out

    results = (folder / "results_model.json").read_bytes()
    code, out, err = run("--eval", "--resume", folder / "ckpt_epoch_1.pth", "--opts", "TEST.PER_CLASS", "True")
    assert code == 0, err
    assert (folder / "results_model.json").read_bytes() == results
    assert f"box   {last['box_AP']:7.2f}{last['box_AP50']:7.2f}" in out
    assert "mask_AP/star" in out

    code, out, _ = run()
    assert code == 0
    assert "this run is complete" in out

    # As official files hold them: under state_dict, with rotary tables, and objects of unknown kinds beside them.
    state = {
        **weights(tmp_path / "out", "ckpt_epoch_1.pth"),
        "backbone.layers.0.blocks.0.attn.rope.rotations": torch.ones(2),
    }
    torch.save(
        {"meta": {"CLASSES": ("a", "b"), "config": Path("x.py")}, "state_dict": state}, tmp_path / "official.pth"
    )
    code, out, err = run("--eval", "--resume", tmp_path / "official.pth", output=tmp_path / "official")
    assert code == 0, err
    assert (folder_of(tmp_path / "official") / "results_model.json").read_bytes() == results


def stopping_after(calls: int) -> Iterator[None]:
    yield from [None] * calls
    raise RuntimeError("killed")


@pytest.mark.usefixtures("on_the_cpu")  # a GPU adds gradients in any order
def test_resuming_within_an_epoch_gives_the_same_weights(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where worker processes loaded the images of one part and not of the other."""
    assert run(output=tmp_path / "whole", TRAIN__SAVE_STEPS="1")[0] == 0
    losses, ticks = Detection.batch_losses, stopping_after(6)

    def failing(self: Detection, *inputs: Any) -> Any:
        next(ticks)
        return losses(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Detection, "batch_losses", failing)
        code, out, _ = run(output=tmp_path / "killed", TRAIN__SAVE_STEPS="1", DATA__NUM_WORKERS="2")
    assert code == 1
    assert "killed" in out
    assert (folder_of(tmp_path / "killed") / "ckpt_epoch_1_step_2.pth").exists()
    assert run(output=tmp_path / "killed", TRAIN__SAVE_STEPS="1")[0] == 0
    whole, resumed = (weights(tmp_path / name, "ckpt_epoch_1.pth") for name in ("whole", "killed"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert records(tmp_path / "whole") == records(tmp_path / "killed")


def test_a_loss_that_is_not_finite_stops_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Detection.batch_losses
    monkeypatch.setattr(
        Detection,
        "batch_losses",
        lambda *a: {**losses(*a), "loss_mask": torch.tensor(float("nan"), requires_grad=True)},
    )
    code, out, _ = run()
    assert code == 1
    assert "the loss or gradient is not finite in epoch 1, step 1" in out


@pytest.mark.usefixtures("on_the_cpu")
def test_two_processes_evaluate_every_image_once(run: Run, shapes: Path, tmp_path: Path) -> None:
    """Nine training and five validation images: every validation image is judged once, as by one process."""
    pairs = [word for pair in {**SMALL, "TRAIN.EPOCHS": "1"}.items() for word in pair]
    flags = ["--cfg", CFG, "--data-path", shapes, "--output", tmp_path, "--opts", *pairs]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "downstream.detection.main"]
    done = run_python(*start, *flags, forked=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder_of(tmp_path) / "results_model.json").read_text())
    ids = [result["image_id"] for result in found]
    assert set(ids) <= {1, 2, 3, 4, 5}
    assert ids == sorted(ids)
    alone = tmp_path / "alone"
    code, _, err = run("--eval", "--resume", folder_of(tmp_path) / "ckpt_epoch_0.pth", output=alone)
    assert code == 0, err
    again = json.loads((folder_of(alone) / "results_model.json").read_text())
    assert len(again) == len(found)
    assert [r["score"] for r in again] == pytest.approx([r["score"] for r in found], abs=1e-5)


def test_mistakes_are_one_line(run: Run, shapes: Path, tmp_path: Path) -> None:
    def refused(message: str, *words: Any, **opts: str) -> None:
        code, _, err = run(*words, **opts)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1

    refused("DATA.DATA_PATH is empty", data="")
    refused("no such annotation file", data=tmp_path)
    refused(
        "DATA.BATCH_SIZE 20 is more than the 8 training images",
        DATA__BATCH_SIZE="20",
    )
    refused("MODEL.RESUME is empty", "--eval")
    refused("timm has no such model; did you mean", MODEL__TYPE="timm:convnext_tny")
    refused("AUG.CROP_SIZE [64, 32]: must have the smaller value first", AUG__CROP_SIZE="[64, 32]")
    refused("AUG.LONG_SIDE 33: must not be below the short sides", AUG__LONG_SIDE="33")
    refused("TEST.LONG_SIDE 40: must not be below TEST.SHORT_SIDE", TEST__LONG_SIDE="40")
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    refused("does not fit the model. 209 missing", "--eval", "--resume", tmp_path / "other.pth")
    content = json.loads((shapes / "train.json").read_text())
    content["categories"].append({"id": 9, "name": "cross"})
    (shapes / "other.json").write_text(json.dumps(content))
    refused("have different categories, or in another order: cross", DATA__TRAIN_ANNOTATIONS="other.json")


def test_too_little_memory_on_a_gpu_is_explained(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. GPU 0 has a total capacity of 79.10 GiB of which")

    monkeypatch.setattr(Detection, "batch_losses", losses)
    code, out, _ = run()
    assert code == 1
    assert "out of GPU memory (79.10 GiB) with DATA.BATCH_SIZE 2: add --amp, or add --use-" in out


def test_the_backbone_is_compiled_by_blocks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = note_compiled_modules(monkeypatch)
    assert run(TRAIN__COMPILE="default", TRAIN__EPOCHS="1", TRAIN__DECAY_EPOCHS="[1]")[0] == 0
    assert {type(module).__name__.removeprefix("Fused") for module in compiled} == {"Stem", "MLLABlock", "Downsample"}
    compiled.clear()
    assert run("--tag", "plain", TRAIN__EPOCHS="1", TRAIN__DECAY_EPOCHS="[1]")[0] == 0
    assert not compiled


def test_profile(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """Parameters and MACs of MLLA-T's, 44.03 M and 254.3 G."""
    assert detection.main(["--cfg", "downstream/detection/cfgs/mlla_t_mrcnn_1x.yaml", "--profile"]) == 0
    out, _ = capfd.readouterr()
    assert re.search(r"^total +44,031,120 +254\.284\n.* 44 M +255\.0$", out, flags=re.MULTILINE)
    code, out, err = run("--profile")
    assert code == 0, err
    assert "bbox_head" in out
    assert "paper" not in out


def test_predict(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(TRAIN__EPOCHS="1")[0] == 0
    sizes = [(33, 200), (150, 61)]
    paths = []
    for i, size in enumerate(sizes):
        paths.append(tmp_path / f"{i}.jpg")
        cv2.imwrite(str(paths[-1]), np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    checkpoint = folder_of(tmp_path / "out") / "ckpt_epoch_0.pth"
    pairs = [word for pair in SMALL.items() for word in pair]
    words = [
        *paths,
        "--cfg",
        CFG,
        "--resume",
        checkpoint,
        "--output",
        tmp_path / "p",
        "--threshold",
        "0",
        "--opts",
        *pairs,
    ]
    assert predict.main([str(word) for word in words]) == 0
    capfd.readouterr()
    assert exit_code(predict.main, words) == 2
    assert capfd.readouterr().err == (
        f"error: {tmp_path}/p/0.png: already exists; name another --output, or replace it with --force\n"
    )
    assert predict.main([str(word) for word in [*paths, "--force", *words[2:]]]) == 0
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"0.png", "1.png", "predictions.json"}
    written = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert [(image["height"], image["width"]) for image in written["images"]] == sizes
    assert [category["name"] for category in written["categories"]] == ["circle", "square", "triangle", "star"]
    for annotation in written["annotations"]:
        assert annotation["segmentation"]["size"] == list(sizes[annotation["image_id"] - 1])
    # The checkpoint's own configuration is the same.
    assert predict.main([str(word) for word in [*paths, "--weights", checkpoint, "--output", tmp_path / "own"]]) == 0
    own = json.loads((tmp_path / "own" / "predictions.json").read_text())
    assert own["annotations"] == written["annotations"]
    with pytest.raises(SystemExit) as stop:
        predict.main([str(tmp_path / "none.jpg"), *map(str, words[2:])])
    assert stop.value.code == 2
    assert "none.jpg: no such image file" in capfd.readouterr().err


def test_category_names() -> None:
    coco = predict.categories_of(None, 80)
    assert (coco[0], coco[-1]) == ({"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"})
    assert predict.categories_of(["cat"], 1) == [{"id": 1, "name": "cat"}]
    assert predict.categories_of(None, 2) == [{"id": 1, "name": "class 1"}, {"id": 2, "name": "class 2"}]
