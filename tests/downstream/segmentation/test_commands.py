"""The commands beside main: predict, benchmark, make_shapes; and pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from downstream.segmentation import benchmark, make_shapes, predict
from downstream.segmentation.build import build_model
from downstream.segmentation.data.masked_images import MaskedImages, read_mask
from downstream.segmentation.pictures import class_colors, overlay, save_comparison, save_mask
from tests.downstream.segmentation.segmentation_worker import CONFIG, small_config
from tests.helpers import exit_code

CLASSES = ["background", "circle", "square", "triangle", "star", "cross"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small segmentor as a run's checkpoint holds it, newly initialized."""
    folder = tmp_path_factory.mktemp("weights")
    config = small_config(folder, folder)
    torch.manual_seed(0)
    model = build_model(config, 6)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)  # so that several classes are found
    content = {"model": model.state_dict(), "config": config.dump(), "classes": CLASSES}
    torch.save(content, folder / "w.pth")
    return folder / "w.pth"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("wide.png", (40, 130)), ("deep/tall.jpg", (101, 33))):
        coarse = rng.integers(0, 256, (size[0] // 10 + 1, size[1] // 10 + 1, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size[::-1]).save(folder / name)
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = exit_code(predict.main, words)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("options", [[], ["--multi-scale"], ["--slide"], ["--tile", "64"], ["--amp"]])
def test_predict(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    code, out, err = call(capsys, images, "--weights", weights, "--output", tmp_path / "out", *options)
    assert (code, err) == (0, "")
    assert "wide.png: " in out
    assert call(capsys, images, "--weights", weights, "--output", tmp_path / "out", *options)[0] == 2
    assert call(capsys, images, "--weights", weights, "--output", tmp_path / "out", *options, "--force")[0] == 0
    for name, size in (("wide", (40, 130)), ("deep/tall", (101, 33))):
        found = read_mask(tmp_path / f"out/{name}.png", num_classes=6, reduce_zero_label=False)
        assert found.shape == size
        with Image.open(tmp_path / f"out/{name}_overlay.jpg") as picture:
            assert picture.size == size[::-1]


def test_mistakes_in_predict_are_one_line(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, out = images / "wide.png", tmp_path / "out"
    (out / "there").mkdir(parents=True)
    (out / "there/wide.png").touch()
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(weights)["model"], bare)
    cases = [
        (["nothing.png", "--weights", weights, "--output", out], "nothing.png: no such image"),
        ([wide, "--weights", "no.pth", "--output", out], "no.pth: no such checkpoint"),
        ([wide, "--weights", bare, "--output", out], "holds no configuration; name its YAML file with --cfg"),
        ([wide, "--weights", bare, "--output", out, "--cfg", CONFIG], "holds no names of classes; name a file"),
        ([wide, "--weights", weights, "--output", out / "there"], "wide.png: already exists; name another --output"),
        ([wide, images / "x/wide.png", "--weights", weights, "--output", out], "no such image"),
        ([wide, "--weights", weights, "--output", out, "--margin", "9"], "--margin 9: is about tiles"),
        ([wide, "--weights", weights, "--output", out, "--tile", "32"], "--tile 32: must be at least 64"),
        ([wide, "--weights", weights, "--output", out, "--tile", "64", "--margin", "32"], "below half of --tile 64"),
        ([wide, "--weights", weights, "--output", out, "--tile", "64", "--slide"], "--tile 64: tiles are seen at one"),
        ([wide, "--output", out], "the following arguments are required: --weights"),
        ([wide, "--weights", weights, "--output", images, "--force"], "wide.png: is one of the images that are read"),
    ]
    for words, message in cases:
        code, _, err = call(capsys, *words)
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1


def test_predict_reads_bare_weights_with_cfg(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Published files hold neither configuration nor class names, but rotary tables."""
    state = torch.load(weights)["model"]
    state["backbone.layers.0.blocks.0.attn.rope.rotations"] = torch.zeros(16, 16, 4, 2)
    torch.save(state, tmp_path / "bare.pth")
    (tmp_path / "config.yaml").write_text(torch.load(weights)["config"])
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    words = ["--weights", tmp_path / "bare.pth", "--cfg", tmp_path / "config.yaml"]
    wide = images / "wide.png"
    assert call(capsys, wide, *words, "--output", tmp_path / "a", "--classes", tmp_path / "classes.txt")[0] == 0
    assert call(capsys, wide, "--weights", weights, "--output", tmp_path / "b")[0] == 0
    assert (tmp_path / "a/wide.png").read_bytes() == (tmp_path / "b/wide.png").read_bytes()


@pytest.mark.slow
def test_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(small_config(tmp_path, tmp_path).dump())
    words = ["--cfg", config, "--backbones", "mlla", "timm:test_convnext", "--rounds", "2", "--round-seconds", "0.01"]
    words += ["--train-batches", "2", "--train-size", "64", "64", "--test-size", "64", "96", "--amp"]
    assert benchmark.main([str(word) for word in [*words, "--output", tmp_path / "rows.jsonl"]]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["task"], row["batch"], row["width"], row["backbone"]) for row in rows] == [
        *(("train", 2, 64, "mlla"), ("train", 2, 64, "timm:test_convnext")),
        *(("inference", 1, 96, "mlla"), ("inference", 1, 96, "timm:test_convnext")),
    ]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["milliseconds"])
    assert rows[0]["ratio"] == rows[2]["ratio"] == 1
    assert rows[1]["ratio"] == pytest.approx(rows[1]["images_per_second"] / rows[0]["images_per_second"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [len(line) for line in lines] == [8] * 5
    assert [line[:4] for line in lines[1:4:2]] == [
        ["| mlla", "train", "64x64", "2"],
        ["| mlla", "inference", "64x96", "1"],
    ]
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_make_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path / "shapes"), "--train", "3", "--val", "2", "--size", "40"]
    assert make_shapes.main(words) == 0
    train, val = (
        MaskedImages(str(tmp_path / "shapes"), split, layout="folder", reduce_zero_label=False)
        for split in ("train", "val")
    )
    assert (len(train), len(val), train.classes) == (3, 2, CLASSES)
    assert not np.array_equal(train.read(0)[0], val.read(0)[0])
    assert make_shapes.main(words) == 0
    assert "holds this dataset already" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        make_shapes.main([*words, "--seed", "1"])
    assert "holds other files already" in capsys.readouterr().err


def test_colors_differ() -> None:
    colors = class_colors(150)
    assert len({tuple(color) for color in colors[:150].tolist()}) == 150
    assert not colors[150:].any()


@pytest.mark.parametrize("first_label", [0, 1])
def test_masks_are_written_as_they_are_read(tmp_path: Path, first_label: int) -> None:
    classes = np.array([[0, 3, 5], [255, 2, 1]], dtype=np.uint8)
    save_mask(tmp_path / "m.png", classes, 6, first_label=first_label)
    found = read_mask(tmp_path / "m.png", num_classes=6, reduce_zero_label=bool(first_label))
    assert np.array_equal(found, classes)
    with Image.open(tmp_path / "m.png") as picture:
        shown = np.asarray(picture.convert("RGB"))
    labeled = classes != 255
    assert np.array_equal(shown[labeled], class_colors(6)[classes][labeled])


def test_overlay_by_hand() -> None:
    image = np.full((4, 6, 3), 100, dtype=np.uint8)
    classes = np.zeros((4, 6), dtype=np.uint8)
    classes[:, 3:] = 255
    shown = overlay(image, classes, 2, opacity=0.5)
    assert np.array_equal(shown[1, 1], (50 + class_colors(2)[0] / 2).round())
    assert np.array_equal(shown[1, 5], image[1, 5])
    assert (shown[1, 3] == 255).all()


def test_sheet_of_predictions(tmp_path: Path) -> None:
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    masks = [np.full((20, 30), value, dtype=np.uint8) for value in (0, 1, 255)]
    rows = [(image, masks[0], masks[0]), (image, masks[1], masks[1]), (image, masks[2], masks[0])]
    save_comparison(rows, tmp_path / "p.png", classes=["$a", "caf\udce9"], title="a model")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width == 1200
        colors = {color for _, color in picture.getcolors(10**6)}  # type: ignore[union-attr]
    assert {tuple(color) for color in class_colors(2)[:2].tolist()} <= colors  # in the legend
