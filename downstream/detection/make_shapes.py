"""Render the demonstration's dataset, in COCO's format: images, train.json and val.json.

python -m downstream.detection.make_shapes output/shapes
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from downstream.detection.data.shapes import CATEGORIES, annotation_of, draw_image
from downstream.detection.pictures import save_image
from downstream.rendered_dataset import shapes_parser, write_dataset
from utils.config.command_line import report_user_errors

SPLITS = {"train": (0.0, 0.65), "val": (0.65, 1.0)}  # share of the photographs' width: backgrounds differ too


def main(argv: Sequence[str] | None = None) -> int:
    args = shapes_parser(__doc__, train=1200, val=150).parse_args(argv)
    with report_user_errors():
        make_shapes(args.folder, {"train": args.train, "val": args.val}, args.seed)
    return 0


def make_shapes(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Write <folder>/{train,val}.json, and images into <folder>/{train,val}.

    Raises:
        DataError: the folder holds something else, or cannot be written.
    """
    info = {"description": "colored shapes", "seed": seed, **counts}

    def write(target: Path) -> None:
        for number, (split, count) in enumerate(counts.items()):
            (target / split).mkdir()
            content = render(target / split, count, SPLITS[split], np.random.default_rng((seed, number)))
            (target / f"{split}.json").write_text(json.dumps({"info": info, **content}))

    write_dataset(folder, info, write, settings_file="val.json")


def render(folder: Path, count: int, part: tuple[float, float], rng: np.random.Generator) -> dict[str, Any]:
    """Write images and return the lists of an annotation file."""
    from sklearn.datasets import load_sample_images  # takes a second; two photographs come with it

    photographs = []
    for photograph in load_sample_images().images:
        left, right = (int(photograph.shape[1] * share) for share in part)
        photographs.append(photograph[:, left:right])
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        image, shapes = draw_image(photographs[rng.integers(len(photographs))], rng)
        name = f"{number:06}.jpg"
        save_image(image, folder / name)
        images.append({"id": number, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
        for shape in shapes:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **annotation_of(shape)})
    categories = [{"id": category_id, "name": name} for name, category_id in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


if __name__ == "__main__":
    sys.exit(main())
