"""Predictions for files and folders: printed, written and plotted; broken files are skipped."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from config import load_config
from data import build_data
from data.transforms import Sample
from models import build_model
from tests.helpers import ROOT, deep_gray, exit_code, fill_weights, run_python
from utils import predict

OPTS = ["MODEL.MLLA.EMBED_DIM", "8", "MODEL.MLLA.DEPTHS", "[1,1,1,1]", "MODEL.MLLA.NUM_HEADS", "[1,1,1,1]"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as a run writes it: weights, EMA, two class names and the configuration."""
    config = load_config(ROOT / "cfgs" / "digits.yaml", [*OPTS, "DATA.IMG_SIZE", "64", "TEST.CROP", "True"])
    model = build_model(config, 2)
    ema = build_model(config, 2)
    fill_weights(ema)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    metadata = {"classes": ["cat", "dog, hound"], "config": config.dump()}
    torch.save({"model": model.state_dict(), "state_dict_ema": ema.state_dict(), **metadata}, path)
    return path


def expected_scores(checkpoint: Path, folder: Path) -> torch.Tensor:
    """Return probabilities (N, 2) of the validation images from the data and model that training uses."""
    opts = [*OPTS, "DATA.IMG_SIZE", "64", "TEST.CROP", "True", "DATA.DATASET", "folder"]
    config = load_config(ROOT / "cfgs" / "digits.yaml", [*opts, "DATA.DATA_PATH", str(folder)], {"EVAL_MODE": True})
    model = build_model(config, 2).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict_ema"])
    images, _ = build_data(config, rank=0, num_processes=1).preview(100)
    with torch.no_grad():
        return model(images).softmax(dim=1)


def test_folder_with_a_broken_file(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for path in sorted((image_folder / "val").rglob("*.jpg")):
        (tmp_path / "images" / f"{path.parent.name}{path.name}").symlink_to(path)
    (tmp_path / "images" / "cat2.5.jpg").write_bytes(next(image_folder.rglob("*.jpg")).read_bytes()[:300])
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    output, plot = tmp_path / "p.json", tmp_path / "p.png"
    args = [str(tmp_path / "images"), "--weights", str(checkpoint), "--batch-size", "4"]
    assert predict.main([*args, "--output", str(output), "--picture", str(plot)]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == f"{checkpoint}: EMA weights"
    assert err.count("\n") == 2
    assert err.splitlines()[1].startswith(f"skipped {tmp_path}/images/cat2.5.jpg: ")
    assert len(out.splitlines()) == 10
    items = json.loads(output.read_text())
    scores = expected_scores(checkpoint, image_folder)
    for item, row in zip(items, scores, strict=True):
        assert sorted(item["classes"]) == ["cat", "dog, hound"]
        assert item["probabilities"] == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-5)
        assert item["classes"][0] == ["cat", "dog, hound"][row.argmax()]
    assert "dog 1" in out or "dog " in out  # the first of a class's names
    with Image.open(plot) as image:
        assert min(image.size) > 100


def test_csv_other_sizes_and_no_ema(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(path) for path in sorted((image_folder / "val" / "dog").iterdir())[:2]]
    args = [*files, "--weights", str(checkpoint), "--topk", "1", "--size", "97", "--output"]
    assert predict.main([*args, str(tmp_path / "a.csv")]) == 0
    assert predict.main([*args, str(tmp_path / "b.csv"), "--no-ema"]) == 0
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["file"] for row in rows] == files
    assert {row["rank"] for row in rows} == {"1"}
    assert (tmp_path / "b.csv").read_text() != (tmp_path / "a.csv").read_text()
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_folder_gets_tables_and_plot(
    checkpoint: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = next(image_folder.rglob("*.jpg")), tmp_path / "found" / "today"
    args = [image, "--weights", checkpoint, "--device", "cpu", "--amp", "--output", out]
    assert exit_code(predict.main, args) == 0
    assert {path.name for path in out.iterdir()} == {"predictions.json", "predictions.csv", "predictions.png"}
    (out / "predictions.json").unlink()
    assert exit_code(predict.main, args) == 2
    assert "predictions.csv: already exists; name another --output, or" in capsys.readouterr().err
    assert exit_code(predict.main, [*args, "--force"]) == 0


def test_names_that_are_not_utf8(checkpoint: Path, image_folder: Path, tmp_path: Path) -> None:
    """As archives in Latin-1 unpack: printed with escapes, and written so that Python reads them back."""
    image = tmp_path / "caf\udce9.jpg"
    shutil.copy(next(image_folder.rglob("*.jpg")), image)
    for suffix in ("json", "csv"):
        args = [image, "--weights", checkpoint, "--output", tmp_path / f"p.{suffix}", "--picture", tmp_path / "p.png"]
        done = run_python("-m", "utils.predict", *args, "--force", forked=True, PYTHONIOENCODING="utf-8:strict")
        assert done.returncode == 0, done.stderr
        assert "caf\\udce9.jpg" in done.stdout
    assert json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))[0]["file"] == str(image)
    with (tmp_path / "p.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert next(csv.DictReader(file))["file"] == str(image)


def test_timm_models_use_imagenet_class_names(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(ROOT / "cfgs" / "mlla_t.yaml", OPTS)
    model = build_model(config)
    nn.init.zeros_(model.head.weight)
    nn.init.constant_(model.head.bias[1:2], 50.0)
    torch.save(model.state_dict(), path := tmp_path / "w.pth")
    monkeypatch.setattr("timm.create_model", lambda _name, num_classes: build_model(config, num_classes))
    image = str(image_folder / "val" / "dog" / "0.jpg")
    assert predict.main([image, "--model", "mlla_tiny", "--weights", str(path), "--topk", "2"]) == 0
    assert "goldfish 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bit_images_keep_their_upper_eight_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path, name: str
) -> None:
    deep_gray().save(tmp_path / name)
    _, image, _ = predict.ImageFiles([tmp_path / name], lambda image: Sample(torch.tensor(np.asarray(image))))[0]
    assert image is not None
    assert image.float().mean().item() == pytest.approx(127.5, abs=1)
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(predict, "save_captioned", lambda images, *_, **__: drawn.extend(images))
    args = [str(tmp_path / name), "--weights", str(checkpoint), "--picture", str(tmp_path / "p.png")]
    assert predict.main(args) == 0
    assert drawn[0].mean() == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize("name", ["mlla_small", "mila_small", "mlla_small.in1k"])
def test_released_weights_by_timm_name(name: str) -> None:
    assert predict.released_weights(name) == "mlla_small"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no.jpg", "--weights", "W"], "no.jpg: no such file or folder"),
        (["/dev/zero", "--weights", "W"], "/dev/zero: must be a file or a folder, not a device or a pipe"),
        (["empty", "--weights", "W"], "empty: no images in it"),
        (["empty/x.jpg", "--weights", "W"], "none of the files can be read"),
        (["empty/x.jpg"], "no model is named"),
        (
            ["empty/x.jpg", "--weights", "bare.pth"],
            "bare.pth: holds no configuration; name its YAML file with --cfg",
        ),
        (
            ["empty/x.jpg", "--model", "mlla_tinny"],
            "mlla_tinny: timm has no such model; did you mean mlla_tiny?",
        ),
        (["empty/x.jpg", "--model", "42", "--weights", "W"], "timm has no such model; for example mlla_tiny"),
        (["empty/x.jpg", "--model", "resnet18"], "--model resnet18: this project has no weights of it; name a"),
        (
            ["empty/x.jpg", "--model", "mlla_tiny", "--cfg", "a.yaml"],
            "--cfg a.yaml and --model mlla_tiny both name",
        ),
        (["empty/x.jpg", "--weights", "W", "--output", "x.txt"], "must end in .json or .csv"),
        (["empty/x.jpg", "--weights", "W", "--picture", "there.png"], "already exists"),
    ],
)
def test_mistakes(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if args[0] != "empty":
        (tmp_path / "empty" / "x.jpg").write_text("not an image")
    (tmp_path / "there.png").touch()
    torch.save({"head.weight": torch.zeros(2, 4)}, tmp_path / "bare.pth")
    assert exit_code(predict.main, [str(checkpoint) if word == "W" else word for word in args]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
