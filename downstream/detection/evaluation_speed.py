"""Speed of a whole evaluation: images from files, detections with masks, COCO's metrics."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from downstream.detection.synthetic import NUM_CLASSES, NUM_OBJECTS
from downstream.detection.task import Detection
from utils.training.inference import InferenceModel
from utils.training.task import Run

SIZES = ((480, 640), (427, 640), (640, 480), (640, 427), (375, 500), (612, 612))  # height and width, as in COCO
NUM_FILES = 24  # that are read again and again
WARMUP_IMAGES = 96  # in which each size comes often enough to be recorded
SETTINGS = {"DATA.NUM_WORKERS": "auto", "EVAL_MODE": True}
HEAD = (
    "| detector | images | until found, s | images/s | metrics, s | images/s in all | |",
    "|---|---|---|---|---|---|---|",
)


class Lap(NamedTuple):
    """Seconds until all images were evaluated, and then until there were COCO's metrics of `num_results` results."""

    num_images: int
    find_seconds: float
    score_seconds: float
    num_results: int


def measure_lap(task: Detection, run: Run, as_compiled: InferenceModel) -> Lap:
    """Evaluate a run's model as after an epoch; each lap records its CUDA graphs, the first one compiles kernels."""
    with as_compiled:
        start = time.perf_counter()
        found = task.find(run, as_compiled.together({"model": run.model}))["model"]
        middle = time.perf_counter()
        task.score(run, "model", found)
        return Lap(run.data.num_val_images, middle - start, time.perf_counter() - middle, len(found))


def line_of_lap(model: str, lap: Lap) -> str:
    count, whole = lap.num_images, lap.find_seconds + lap.score_seconds
    return (
        f"| {model} | {count} | {lap.find_seconds:.1f} | {count / lap.find_seconds:.1f} "
        f"| {lap.score_seconds:.1f} | {count / whole:.1f} | {lap.num_results // count} detections per image |"
    )


def write_images(folder: Path, count: int) -> None:
    """Write images of COCO's usual sizes and an annotation file where the defaults of DATA.* expect them."""
    rng = np.random.default_rng(0)
    (folder / "val2017").mkdir()
    (folder / "annotations").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        name = f"{number % NUM_FILES:06}.jpg"
        if number < NUM_FILES:
            noise = rng.integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / "val2017" / name), cv2.resize(noise, (width, height)))
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        for _ in range(NUM_OBJECTS):
            side = int(rng.integers(16, 200))
            x, y = (int(value) for value in rng.integers(0, (width - side, height - side)))
            box = {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0}
            polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
            own = {
                "id": len(annotations) + 1,
                "image_id": number + 1,
                "category_id": len(annotations) % NUM_CLASSES + 1,
            }
            annotations.append({**own, **box, "segmentation": [polygon]})
    categories = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(NUM_CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
