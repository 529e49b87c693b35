import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from faster_coco_eval import mask as rle
from PIL import Image

from data.errors import BrokenImageError, DataError
from downstream.detection.data.coco import CocoImages, clipped_box, decode_mask
from downstream.detection.data.shapes import run_lengths
from utils.config.errors import MissingFileError

SQUARE = [[2.0, 2.0, 12.0, 2.0, 12.0, 12.0, 2.0, 12.0]]


def write(folder: Path, items: list[dict[str, Any]], /, *, count: int = 2, **changes: Any) -> Path:
    """A file of 60x40 images 10, 20, ... with categories 90 "dog" and 3 "cat", and the images themselves."""
    (folder / "images").mkdir(exist_ok=True)
    listed = []
    for number in range(count):
        name = f"{number}.png"
        cv2.imwrite(str(folder / "images" / name), np.full((40, 60, 3), number, dtype=np.uint8))
        listed.append({"id": 10 * (number + 1), "file_name": name, "height": 40, "width": 60})
    content = {"images": listed, "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}]}
    content["annotations"] = [{"id": i, "iscrowd": 0, **item} for i, item in enumerate(items)]
    (folder / "a.json").write_text(json.dumps({**content, **changes}))
    return folder / "a.json"


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def item(image: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": bbox, "segmentation": SQUARE, **more}


def open_images(path: Path, *, for_training: bool = True) -> CocoImages:
    return CocoImages(path, path.parent / "images", for_training=for_training)


def test_categories_with_gaps_become_labels_by_id(tmp_path: Path) -> None:
    images = open_images(write(tmp_path, [item(10, 90, [2, 2, 10, 10]), item(10, 3, [5, 5, 20, 10])]))
    assert images.classes == ["cat", "dog"]
    assert images.category_ids == [3, 90]
    record = images[0]
    assert (record.image_id, record.file_name, record.height, record.width) == (10, "0.png", 40, 60)
    assert record.labels.tolist() == [1, 0]
    assert record.boxes.tolist() == [[2, 2, 12, 12], [5, 5, 25, 15]]


def test_crowds_and_boxes_without_area_are_skipped_and_others_clipped(tmp_path: Path) -> None:
    """Images without objects, crowds, boxes of no size or outside; boxes that stick out are cut."""
    annotations = [
        item(10, 3, [2, 2, 10, 10], iscrowd=1),
        item(10, 3, [70, 2, 10, 10]),  # outside
        item(10, 3, [2, 2, 0, 10]),
        item(10, 3, [2, 2, 10, 0.5]),
        item(20, 3, [-5, 30, 10, 30]),
    ]
    path = write(tmp_path, annotations, count=3)
    images = open_images(path)
    assert len(images) == 1
    assert images[0].boxes.tolist() == [[0, 30, 5, 40]]
    everything = open_images(path, for_training=False)
    assert [len(everything[i].boxes) for i in range(3)] == [0, 1, 0]


def test_images_under_32_pixels_are_skipped_in_training(tmp_path: Path) -> None:
    path = write(tmp_path, [item(10, 3, [2, 2, 10, 10]), item(20, 3, [2, 2, 10, 10])])
    edit(path, lambda content: content["images"][0].update(height=31))
    Image.new("RGB", (60, 31)).save(tmp_path / "images" / "0.png")
    assert [open_images(path)[i].image_id for i in range(len(open_images(path)))] == [20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "needs the lists images, annotations, categories"),
        ({"images": [{"id": 1}]}, "item 0 of images has no file_name"),
        ({"categories": [{"id": 3, "name": "cat"}]}, "annotation 0 of image 10, 0.png, has category_id 90, not listed"),
        ({"annotations": [item(99, 3, [2, 2, 9, 9])]}, "has image_id 99, not listed"),
        ({"annotations": [{**item(10, 3, [2, 2, 9, 9]), "segmentation": []}]}, "has no segmentation"),
        (
            {"annotations": [item(10, 3, [2, 2, 9])]},
            r"annotation without id \(item 0 of annotations\) of image 10, 0.png, has bbox \[2, 2, 9\]; must be four",
        ),
        ({"annotations": ["x"]}, "item 0 of annotations is not an object"),
        ({"annotations": []}, "no usable training images"),
    ],
)
def test_wrong_annotation_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, [item(10, 90, [2, 2, 10, 10])], **change)
    with pytest.raises(DataError, match=message) as caught:
        open_images(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, [item(10, 3, [2, 2, 10, 10]), item(20, 3, [2, 2, 10, 10])])
    with pytest.raises(MissingFileError, match=r"b\.json: no such annotation file"):
        open_images(tmp_path / "b.json")
    with pytest.raises(MissingFileError, match=r"none: no such folder"):
        CocoImages(path, tmp_path / "none", for_training=True)
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(MissingFileError, match=r"1 of the 2 images .* are not there, such as 1\.png"):
        open_images(path)
    os.mkfifo(tmp_path / "images" / "1.png")  # reading it would wait forever
    with pytest.raises(MissingFileError, match=r"1 of the 2 images .* are not there, such as 1\.png"):
        open_images(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is not a JSON file"):
        open_images(path)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_images_of_another_size_or_damaged_are_refused_at_opening(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, [item(10, 3, [2, 2, 10, 10])])
    images = tmp_path / "images"
    edit(path, lambda content: content["images"][0].update(file_name=f"0.{kind}"))
    Image.new("RGB", (50, 40)).save(images / f"0.{kind}")
    with pytest.raises(DataError, match=rf"0\.{kind}: is 50x40 pixels, but .* says 60x40; its boxes would not fit$"):
        open_images(path)
    (images / f"0.{kind}").write_bytes(b"no image")
    with pytest.raises(BrokenImageError, match="cannot be read as an image"):
        open_images(path)


@pytest.mark.parametrize(("orientation", "fits"), [(1, True), (3, True), (6, False), (8, False)])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_images_that_exif_data_turn(tmp_path: Path, orientation: int, fits: bool, kind: str) -> None:
    """They are read as they are seen, which must be the listed size."""
    path = write(tmp_path, [item(10, 3, [2, 2, 10, 10])])
    edit(path, lambda content: content["images"][0].update(file_name=f"0.{kind}"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 40)).save(tmp_path / "images" / f"0.{kind}", exif=exif)
    if not fits:
        with pytest.raises(
            DataError, match=rf"0\.{kind}: is 40x60 pixels, but .* says 60x40; .* if its EXIF data turn"
        ):
            open_images(path)
        edit(path, lambda content: content["images"][0].update(height=60, width=40))
    images = open_images(path)
    assert images.read_image(images[0]).shape[:2] == ((40, 60) if fits else (60, 40))


def test_every_image_is_checked_when_it_is_read(tmp_path: Path) -> None:
    images = open_images(write(tmp_path, [item(10, 3, [2, 2, 10, 10])]))
    Image.new("RGB", (50, 40)).save(tmp_path / "images" / "0.png")
    with pytest.raises(DataError, match="is 50x40 pixels"):
        images.read_image(images[0])


def test_classes_and_images_that_are_not_trained_on_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, [item(10, 3, [2, 2, 10, 10]), item(20, 90, [70, 2, 10, 10])], count=3)
    with caplog.at_level("INFO", logger="mlla"):
        open_images(path)
    assert f"{path}: 2 of 3 images are not trained on" in caplog.text
    assert f"{path}: 1 of 2 categories have no object to train on: dog" in caplog.text


def test_colors_are_red_green_blue(tmp_path: Path) -> None:
    path = write(tmp_path, [item(10, 3, [2, 2, 10, 10])])
    cv2.imwrite(str(tmp_path / "images" / "0.png"), np.full((40, 60, 3), (10, 20, 30), dtype=np.uint8))  # BGR
    images = open_images(path)
    assert images.read_image(images[0])[0, 0].tolist() == [30, 20, 10]


def test_polygons_and_run_lengths_decode_to_the_same_mask() -> None:
    square = np.zeros((20, 30), dtype=np.uint8)
    square[2:12, 2:12] = 1
    compressed = rle.encode(np.asfortranarray(square))
    text = {"size": [20, 30], "counts": compressed["counts"].decode()}
    flat = square.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = {"size": [20, 30], "counts": np.diff([0, *ends, len(flat)]).tolist()}
    for segmentation in (SQUARE, text, lengths, [*SQUARE, [3.0, 3.0, 5.0, 3.0, 5.0, 5.0]]):
        assert (decode_mask(segmentation, 20, 30) == square).all(), segmentation


def random_masks(rng: np.random.Generator, count: int) -> np.ndarray:
    """Masks (H, W, count) uint8 of one size: ellipses and noise, none of them empty."""
    height, width = rng.integers(1, 90, 2)
    ys, xs = np.mgrid[:height, :width]
    masks = [rng.random((height, width)) < rng.random() ** 2 for _ in range(count)]
    for mask in masks[::2]:
        mask |= ((ys - height / 2) / rng.uniform(1, 40)) ** 2 + ((xs - width / 2) / rng.uniform(1, 40)) ** 2 < 1
    for mask in masks:
        mask[rng.integers(height), rng.integers(width)] = True
    return np.asfortranarray(np.stack(masks, axis=-1), dtype=np.uint8)


def test_run_length_functions_match_numpy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        masks = random_masks(rng, 3)
        height, width, _ = masks.shape
        encoded = rle.encode(masks)
        assert [tuple(code["size"]) for code in encoded] == [(height, width)] * 3
        decoded = rle.decode(encoded)
        assert decoded.dtype == np.uint8
        assert np.array_equal(decoded, masks)
        assert np.array_equal(rle.decode(rle.merge(encoded)), masks.max(axis=-1))
        assert rle.area(encoded).tolist() == masks.sum(axis=(0, 1)).tolist()
        for i, code in enumerate(encoded):
            assert rle.encode(np.asfortranarray(masks[..., i])) == code
            text = {"size": code["size"], "counts": code["counts"].decode()}
            assert np.array_equal(rle.decode(text), masks[..., i])
            ys, xs = masks[..., i].nonzero()
            box = [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
            assert rle.toBbox(code).tolist() == box
            uncompressed = {"size": [height, width], "counts": run_lengths(masks[..., i])}
            assert rle.frPyObjects(uncompressed, height, width) == code


@pytest.mark.parametrize(
    ("polygon", "counts"),
    [
        (SQUARE[0], b"Z1::00000000000000000V;"),
        ([3.3, 1.2, 17.9, 4.4, 9.5, 18.7], b"a23b02M3M3M3N1NO1N2O1N3M2O1N2N^7"),
        ([-4.0, 5.5, 20.2, -3.1, 35.0, 10.0, 12.5, 26.3, 6.1, 13.9], b"45?1N2O1O0O2O1O2M3NU8NlG2O1N1O2N2O1NL"),
    ],
)
def test_polygons_cover_the_same_pixels_as_in_pycocotools(polygon: list[float], counts: bytes) -> None:
    """Recorded with pycocotools 2.0.11; the last polygon sticks out of the image of 20 rows and 30 columns."""
    assert rle.frPyObjects([polygon], 20, 30) == [{"size": [20, 30], "counts": counts}]


def test_boxes_are_clipped_to_the_image() -> None:
    image = {"width": 60, "height": 40}
    assert clipped_box([10, 10, 5, 5], image) == [10, 10, 15, 15]
    assert clipped_box([-5, -5, 100, 100], image) == [0, 0, 60, 40]
    assert clipped_box([60, 10, 5, 5], image) is None
    assert clipped_box([10, 10, 0.9, 5], image) is None
