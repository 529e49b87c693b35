import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import mask as rle

from data.errors import DataError
from downstream.detection.data.annotations import polygon_area, read_annotations
from downstream.detection.data.coco import decode_mask
from downstream.detection.metrics import CocoEvaluator
from utils.config.errors import UserError

HEIGHT, WIDTH = 128, 160
Content = dict[str, list[dict[str, Any]]]
Change = Callable[[Content], Any]


def rectangle(x: int, y: int, width: int, height: int) -> list[list[int]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def run_lengths(segmentation: Any, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    mask = decode_mask(segmentation, HEIGHT, WIDTH).reshape(height, width)
    code = rle.encode(np.asfortranarray(mask))
    return {"size": [height, width], "counts": code["counts"].decode()}


def make_content() -> Content:
    """Three images with two rectangles each: small, medium and large."""
    boxes = [(2, 3, 20, 25), (40, 50, 60, 50), (10, 10, 120, 100), (5, 6, 7, 8), (30, 20, 40, 40), (0, 0, 31, 31)]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "box"}, {"id": 2, "name": "bar"}],
        "annotations": [
            {
                "id": number + 1,
                "image_id": number // 2 + 1,
                "category_id": number % 2 + 1,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": rectangle(*box),
            }
            for number, box in enumerate(boxes)
        ],
    }


def write(folder: Path, change: Change = lambda _: None) -> Path:
    content = make_content()
    change(content)
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json"


def metrics_of_perfect_results(path: Path) -> dict[str, float]:
    results = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 0.9,
            "segmentation": run_lengths(a["segmentation"]),
        }
        for a in make_content()["annotations"]
    ]
    return CocoEvaluator(path).compute(results)


def all_of(name: str, key: str, value: Callable[[Any], Any]) -> Change:
    """Return a change of one key in all items of a list."""
    return lambda content: [item.update({key: value(item.get(key))}) for item in content[name]]


def first(key: str, value: Any) -> Change:
    return lambda content: content["annotations"][0].update({key: value})


def both(*changes: Change) -> Change:
    return lambda content: [change(content) for change in changes]


def without(name: str, key: str) -> Change:
    return lambda content: [item.pop(key) for item in content[name]]


def text_ids(content: Content) -> None:
    for annotation in content["annotations"]:
        annotation.update(image_id=str(annotation["image_id"]), category_id=float(annotation["category_id"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (all_of("annotations", "id", lambda i: i - 1), "6 annotations numbered anew"),
        (all_of("annotations", "id", lambda _: 7), "6 annotations numbered anew"),
        (all_of("annotations", "id", str), "6 annotations numbered anew"),
        (without("annotations", "id"), "6 annotations numbered anew"),
        (without("annotations", "area"), "6 areas"),
        (all_of("annotations", "area", lambda _: float("nan")), "6 areas"),
        (all_of("annotations", "area", lambda _: "big"), "6 areas"),
        (
            both(without("annotations", "area"), all_of("annotations", "segmentation", run_lengths)),
            "6 areas",
        ),
        (all_of("annotations", "segmentation", lambda s: s[0]), "6 flat lists of numbers, read as one polygon each"),
        (all_of("annotations", "segmentation", lambda s: [*s, [1, 1, 9, 9], []]), "12 polygons of less than three"),
        (without("annotations", "iscrowd"), "6 annotations without iscrowd"),
        (all_of("annotations", "iscrowd", bool), "6 annotations without iscrowd"),
        (text_ids, "12 ids or sizes that were text or fractions"),
        (both(all_of("images", "id", str), all_of("images", "height", float)), "6 ids or sizes"),
    ],
)
def test_harmless_faults_are_repaired_and_counted_and_change_no_metric(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Change, said: str
) -> None:
    expected = metrics_of_perfect_results(write(tmp_path))
    assert expected["box_AP"] == expected["mask_AP"] == pytest.approx(100)
    assert min(expected.values()) > 0  # there are small, medium and large objects
    assert not caplog.records
    path = write(tmp_path, change)
    assert metrics_of_perfect_results(path) == expected
    assert not caplog.records  # the evaluator repairs silently what opening the file has reported
    read_annotations(path)
    (record,) = caplog.records
    assert f"{path}: repaired as it was read" in record.getMessage()
    assert said in record.getMessage()
    assert "\n" not in record.getMessage()


def test_files_without_faults_stay_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Run lengths of both kinds, crowds, and an object that sticks out of the image."""

    def change(content: Content) -> None:
        for index, annotation in enumerate(content["annotations"][:2]):
            mask = decode_mask(annotation["segmentation"], HEIGHT, WIDTH).flatten(order="F")
            ends = np.flatnonzero(np.diff(mask)) + 1
            counts = np.diff([0, *ends, len(mask)]).tolist()
            annotation["segmentation"] = (
                {"size": [HEIGHT, WIDTH], "counts": counts} if index else run_lengths(annotation["segmentation"])
            )
        content["annotations"][2].update(iscrowd=1)
        content["annotations"][3].update(bbox=[-3, 100, 30, 60], segmentation=rectangle(-3, 100, 30, 60))

    path = write(tmp_path, change)
    assert read_annotations(path) == json.loads(path.read_text())
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (all_of("images", "id", lambda i: f"frame_{i}"), "item 0 of images has id 'frame_1'; must be a whole number"),
        (all_of("images", "id", lambda i: [i]), r"item 0 of images has id \[1\]; must be a whole"),
        (all_of("images", "id", lambda _: 1), "item 1 of images: id 1 occurs twice"),
        (all_of("images", "file_name", lambda _: None), "item 0 of images: file_name is None"),
        (all_of("images", "height", lambda _: "high"), "item 0 of images has height 'high'; must be a whole number"),
        (all_of("images", "height", lambda _: None), "item 0 of images has height None"),
        (all_of("images", "width", lambda _: 0), "item 0 of images: 1.png has a size of 0x128 pixels"),
        (all_of("images", "width", lambda _: 10**8), "item 0 of images: 1.png has a size of 100000000x128 pixels"),
        (lambda c: c["categories"].append(c["categories"][0]), "item 2 of categories: id 1 occurs twice"),
        (all_of("categories", "name", lambda _: " "), "category 1 has no name"),
        (lambda c: c.update(categories=[], annotations=[]), "the list categories is empty"),
        (lambda c: c["annotations"].append(None), "item 6 of annotations is not an object"),
        (first("image_id", {}), "annotation 1 has image_id {}; must be a whole number"),
        (first("category_id", None), "annotation 1 of image 1, 1.png, has category_id None; must be a whole number"),
        (first("category_id", 9), "annotation 1 of image 1, 1.png, has category_id 9, not listed"),
        (first("bbox", None), "annotation 1 of image 1, 1.png, has bbox None; must be four numbers"),
        (first("bbox", []), r"annotation 1 of image 1, 1.png, has bbox \[\]; must"),
        (first("bbox", [1, 2, 3, "4"]), "annotation 1 of image 1, 1.png, has bbox"),
        (first("bbox", ["1", "2", "3", "4"]), "annotation 1 of image 1, 1.png, has bbox"),
        (first("bbox", [1, 2, float("nan"), 4]), r"has bbox \[1, 2, nan, 4\]"),
        (first("bbox", [1, 2, 10**400, 4]), "has bbox"),
        (first("bbox", [1, 2, -3, 4]), r"has bbox \[1, 2, -3, 4\]"),
        (first("iscrowd", "0"), "annotation 1 of image 1, 1.png, has iscrowd '0'; must be 0 or 1"),
        (first("iscrowd", 2), "has iscrowd 2; must be 0 or 1"),
        (first("segmentation", None), "annotation 1 of image 1, 1.png, has no segmentation"),
        (first("segmentation", "x"), "neither polygons nor run lengths"),
        (first("segmentation", [[1, 1, 9, 9]]), "has no polygon of at least three points"),
        (first("segmentation", [[[1, 1], [5, 1], [5, 5]]]), "has a polygon that is not a list of numbers"),
        (first("segmentation", [[[1, 1], [5, 1], [5, 5], [1, 5]]]), "has a polygon with something else than numbers"),
        (first("segmentation", [[1, 1, 5, 1, 5, 5, 1]]), "has a polygon that is not a list of numbers x y"),
        (first("segmentation", [[1, 1, 5, 1, 5, None]]), "has a polygon with something else than numbers"),
        (first("segmentation", ["abcdef"]), "has a polygon that is not a list of numbers"),
        (first("segmentation", [[1, 1, 5, 1, 5, float("nan")]]), "has a polygon with a value that is not between"),
        (
            first("segmentation", [[0, 0, 1e9, 0, 1e9, 1e9]]),
            "has a polygon with a value that is not between -160 and 320",
        ),
        (first("segmentation", {"counts": "04"}), "has run lengths of size None; must be the image's"),
        (
            first("segmentation", run_lengths(rectangle(2, 3, 20, 25), WIDTH, HEIGHT)),
            r"annotation 1 of image 1, 1.png, has run lengths of size \[160, 128\]; must be the image's \[128, 160\]",
        ),
        (first("segmentation", {"size": [10**6, 10**6], "counts": "PPYo1"}), "has run lengths of size"),
        (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": "PPYo1"}), "runs that add up to"),
        (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": "04"}), "has runs that add up to 4 pixels"),
        (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": "~~~"}), "has counts that are no run lengths"),
        (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": "0P"}), "has counts that are no run lengths"),
        (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": "é"}), "has counts that are no run lengths"),
        (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": ""}), "has counts that are no run lengths"),
        (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": []}), "has counts that are no run lengths"),
        (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": [1.5, 2]}), "has counts that are no run lengths"),
        (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": [20, 5]}), "has runs that add up to 25 pixels"),
        (first("segmentation", {"size": [HEIGHT, WIDTH], "counts": [20500, -20]}), "has run lengths below 0"),
        (
            first("segmentation", {"size": [HEIGHT, WIDTH], "counts": [3743, 6, 3769, 10, 3795, 17, 9821, 21]}),
            "of image 1, 1.png, has runs that add up to 21182 pixels; .* not positions, .* 128 x 160 = 20480",
        ),
    ],
)
def test_what_cannot_be_repaired_is_refused_in_one_line(tmp_path: Path, change: Change, message: str) -> None:
    path = write(tmp_path, change)
    with pytest.raises(DataError, match=message) as caught:
        read_annotations(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_json(tmp_path: Path) -> None:
    for number, content in enumerate((b"{", b"\xff\xfe\xff", b"[" * 100_000, b'{"images": ' + b"9" * 5000 + b"}")):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{number}\.json: is not a (JSON|COCO annotation) file") as caught:
            read_annotations(path)
        assert "\n" not in str(caught.value)


def test_area_of_polygons() -> None:
    assert polygon_area([0, 0, 4, 0, 4, 3]) == 6
    assert polygon_area([4, 3, 4, 0, 0, 0]) == 6
    assert polygon_area(rectangle(2, 3, 20, 25)[0]) == 500


VALUES: list[Any] = [None, True, -1, 0, 2, 1.5, 1e300, math.nan, math.inf, 2**40, 2**63, 10**400, "", "1", "x" * 9999]
VALUES += [
    [],
    [None],
    {},
    [1, 2, 3],
    [math.nan] * 4,
    [[0, 0, 1e9, 0, 1e9, 1e9]],
    [[0, 0, 1, 1]],
    [["a"] * 6],
    [[0] * 7],
]
VALUES += [{"size": [10**6, 10**6], "counts": "PPYo1"}, {"size": [6, 4], "counts": [24]}, {"counts": [24]}]
VALUES += [{"size": [4, 6], "counts": counts} for counts in ("PPYo1", "~", [-5, 29], [2**62, 2**62], [24.0], [24])]


def places(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value within a JSON document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


def test_any_value_at_any_place_is_accepted_or_refused_in_one_line(tmp_path: Path) -> None:
    """What is accepted can be decoded: native code sees no size and no coordinate that was not checked."""
    runs = {"size": [4, 6], "counts": [10, 2, 12]}
    shared = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "iscrowd": 0, "area": 4}
    masks: list[Any] = [[[1, 1, 3, 1, 3, 3]], runs]
    objects = [{"id": i, **shared, "segmentation": mask} for i, mask in enumerate(masks, 1)]
    image = {"id": 1, "file_name": "a.png", "height": 4, "width": 6}
    content = {"images": [image], "categories": [{"id": 1, "name": "cat"}], "annotations": objects}
    draw, path = random.Random(0), tmp_path / "a.json"
    for *above, last in places(content):
        for value in draw.sample(VALUES, 4):
            changed = copy.deepcopy(content)
            holder: Any = changed
            for key in above:
                holder = holder[key]
            holder[last] = value
            path.write_text(json.dumps(changed))
            try:
                read = read_annotations(path, log_repairs=False)
            except UserError as caught:
                line = str(caught)
            else:
                line = str(path)
                sizes = {image["id"]: (image["height"], image["width"]) for image in read["images"]}
                for item in read["annotations"]:
                    assert decode_mask(item["segmentation"], *sizes[item["image_id"]]).shape == sizes[item["image_id"]]
            assert line.startswith(str(path))
            assert "\n" not in line
            assert len(line) < 600
