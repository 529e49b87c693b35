"""Drawings of detections: masks, boxes, and labels that can be read."""

from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import mask as rle
from PIL import Image

from downstream.detection.pictures import (
    COLORS,
    LabeledObjects,
    covered,
    draw_objects,
    objects_of_results,
    place_labels,
    save_comparison,
)

FRAME = (200, 160)
LABEL = (60, 16)


def star(label: int = 2) -> LabeledObjects:
    """Return an object at rows 20 to 30 and columns 20 to 60 of 50 x 80 pixels."""
    mask = np.zeros((1, 50, 80), dtype=bool)
    mask[0, 20:30, 20:60] = True
    return LabeledObjects(np.array([[20, 20, 60, 30]], dtype=np.float32), mask, np.array([label]), ["star $0.9"])


def test_drawings_show_the_objects(tmp_path: Path) -> None:
    image = np.full((50, 80, 3), 100, dtype=np.uint8)
    drawing = draw_objects(image, star())
    assert drawing.shape == (400, 640, 3)  # eightfold
    changed = (drawing != 100).any(axis=2)
    assert changed[160:240, 160:480].all()
    assert not changed[250:].any()
    assert draw_objects(image, star(), (160, 100)).shape == (100, 160, 3)
    nothing = objects_of_results([], [{"id": 1, "name": "cat"}])
    assert (draw_objects(image, nothing) == 100).all()
    save_comparison([(image, star(), nothing)] * 4, tmp_path / "grid.jpg", title="a model")
    with Image.open(tmp_path / "grid.jpg") as sheet:
        assert sheet.width == 1200


@pytest.mark.parametrize("label", range(len(COLORS)))
def test_labels_and_boxes_stand_out_from_objects_of_their_own_color(label: int) -> None:
    image = np.full((50, 80, 3), COLORS[label], dtype=np.uint8)
    drawing = draw_objects(image, star(label), (320, 200))
    text = drawing[60:79, 78:160].astype(float) @ (0.299, 0.587, 0.114)  # the label stands on the box
    assert np.ptp(text) > 100
    assert (drawing[78:124, 82:238] == 0).all(axis=2).any(axis=0).all()  # the box has black lines


def test_labels_do_not_overlap_and_are_not_cut() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 100, (10, 2))
    boxes = np.concatenate((corners, corners + rng.uniform(10, 60, (10, 2))), axis=1)
    boxes[-1] = 190, 150, 200, 160  # in the corner
    lefts_and_tops = np.array(place_labels(boxes, [LABEL] * 10, FRAME))
    places = np.concatenate((lefts_and_tops, lefts_and_tops + np.array(LABEL)), axis=1)
    assert (places >= 0).all()
    assert (places[:, 2:] <= np.array(FRAME)).all()
    assert covered(places, places).tolist() == [LABEL[0] * LABEL[1]] * 10  # by itself alone


def test_a_label_stands_on_its_box() -> None:
    assert place_labels(np.array([[50.0, 60, 90, 90]]), [LABEL], FRAME) == [(50, 43)]
    assert place_labels(np.array([[50.0, 0, 90, 90]]), [LABEL], FRAME) == [(91, 0)]  # no room above: beside
    assert place_labels(np.array([[0.0, 0, 200, 160]]), [LABEL], FRAME) == [(0, 0)]  # room inside only


def test_more_labels_than_room_stay_inside() -> None:
    places = place_labels(np.array([[0.0, 0, 30, 20]] * 3), [(80, 16)] * 3, (30, 20))
    assert set(places) == {(0, 0)} or all(0 <= top <= 4 for _, top in places)


def test_results_below_the_threshold_are_not_drawn() -> None:
    mask = {"size": [50, 80], "counts": [500, 100, 3400]}
    code = rle.frPyObjects(mask, 50, 80)
    results = [
        {"category_id": 7, "score": score, "bbox": [10.0, 0.0, 2.0, 50.0], "segmentation": code} for score in (0.4, 0.6)
    ]
    objects = objects_of_results(results, [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}])
    assert objects.captions == ["dog 0.60"]
    assert objects.labels.tolist() == [1]
    assert objects.boxes.tolist() == [[10, 0, 12, 50]]
    assert objects.masks.sum() == 100
