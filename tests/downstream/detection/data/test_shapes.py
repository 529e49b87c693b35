import json
from pathlib import Path

import numpy as np
import pytest

from downstream.detection.data.coco import CocoImages, decode_mask
from downstream.detection.data.shapes import CATEGORIES, coverage, draw_image, outline_of, run_lengths
from downstream.detection.make_shapes import main


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    assert main([str(folder), "--train", "60", "--val", "8"]) == 0
    return folder


def test_written_dataset_is_consistent(shapes: Path) -> None:
    content = json.loads((shapes / "train.json").read_text())
    annotations = content["annotations"]
    assert {a["category_id"] for a in annotations} == set(CATEGORIES.values()) == {1, 3, 4, 7}
    assert {type(a["segmentation"]) for a in annotations} == {list, dict}
    assert 0 < sum(a["iscrowd"] for a in annotations) < 10
    assert {image["id"] for image in content["images"]} - {a["image_id"] for a in annotations}  # empty images
    images = CocoImages(shapes / "train.json", shapes / "train", for_training=False)
    assert {images[i].height for i in range(60)} == {128, 160}
    for record in (images[i] for i in range(60)):
        assert images.read_image(record).shape == (record.height, record.width, 3)
        for box, item in zip(record.boxes, record.segmentations, strict=True):
            rows, columns = decode_mask(item, record.height, record.width).nonzero()
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(box - tight).max() <= 1


def test_objects_hide_each_other_but_not_too_much() -> None:
    rng = np.random.default_rng(0)
    photograph = np.zeros((300, 300, 3), dtype=np.uint8)
    is_hidden = []
    for _ in range(40):
        _, drawn = draw_image(photograph, rng)
        stack = np.stack([own.visible for own in drawn]) if drawn else np.zeros((0, 1, 1))
        assert (stack.sum(axis=0) <= 1).all()
        is_hidden += [own.visible.sum() < own.area for own in drawn]
        assert all(own.visible.sum() >= 0.4 * own.area for own in drawn)
    assert 0.1 < np.mean(is_hidden) < 0.9


def test_coverage_is_the_area() -> None:
    square = outline_of("square", center=(30.0, 25.0), radius=14.0, angle=0.3)
    assert coverage(square, 50, 60).sum() == pytest.approx(2 * 14**2, rel=0.03)
    circle = outline_of("circle", center=(30.0, 25.0), radius=14.0, angle=0.3)
    assert coverage(circle, 50, 60).sum() == pytest.approx(np.pi * 14**2, rel=0.03)


def test_run_lengths_start_with_what_is_outside() -> None:
    pixels = np.array([[1, 0], [1, 1]], dtype=bool)
    assert run_lengths(pixels) == [0, 2, 1, 1]
    assert run_lengths(~pixels) == [2, 1, 1]
    assert (decode_mask({"size": [2, 2], "counts": run_lengths(pixels)}, 2, 2) == pixels).all()


def test_rendering_is_deterministic_and_overwrites_nothing(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (shapes / "train.json").read_bytes(), (shapes / "train" / "000007.jpg").read_bytes()
    assert main([str(shapes), "--train", "60", "--val", "8"]) == 0
    assert "holds this dataset already" in capsys.readouterr().out
    other = shapes.with_name("other")
    assert main([str(other), "--train", "60", "--val", "8"]) == 0
    assert before == ((other / "train.json").read_bytes(), (other / "train" / "000007.jpg").read_bytes())
    with pytest.raises(SystemExit) as stop:
        main([str(shapes), "--train", "61"])
    assert stop.value.code == 2
    assert "holds other files already" in capsys.readouterr().err
    assert (shapes / "train.json").read_bytes() == before[0]
