"""Render the demonstration's data set, in COCO's format: images, train.json and val.json.

python -m downstream.detection.make_shapes output/shapes
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from downstream.detection.data.shapes import CATEGORIES, annotation_of, draw_image
from downstream.detection.pictures import save_picture
from utils.config.command_line import Parser, at_least, report_user_errors

PARTS = {"train": (0.0, 0.65), "val": (0.65, 1.0)}  # of the photographs' width, so that backgrounds differ too


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where to write; must be empty, or hold the same data set already")
    parser.add_argument("--train", type=at_least(1), default=1200, metavar="NUMBER", help="training images")
    parser.add_argument("--val", type=at_least(1), default=150, metavar="NUMBER", help="validation images")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="NUMBER")
    words = parser.parse_args(argv)
    with report_user_errors():
        make_shapes(words.folder, {"train": words.train, "val": words.val}, words.seed)
    return 0


def make_shapes(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Write <folder>/{train,val}.json and images into <folder>/{train,val}.

    Raises:
        ValueError: the folder holds something else.
    """
    info = {"description": "colored shapes", "seed": seed, **counts}
    if is_there(folder, info):
        print(f"{folder} holds this data set already")
        return
    temporary = folder.with_name(folder.name + ".tmp")
    for number, (split, count) in enumerate(counts.items()):
        (temporary / split).mkdir(parents=True, exist_ok=True)
        content = render(temporary / split, count, PARTS[split], np.random.default_rng((seed, number)))
        (temporary / f"{split}.json").write_text(json.dumps({"info": info, **content}))
    if folder.exists():
        folder.rmdir()  # empty
    temporary.rename(folder)
    print(f"{folder}: {' and '.join(f'{count} images in {split}' for split, count in counts.items())}")


def is_there(folder: Path, info: dict[str, Any]) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if (folder / "val.json").is_file() and json.loads((folder / "val.json").read_text()).get("info") == info:
        return True
    raise ValueError(f"{folder}: holds other files already; name an empty folder, or one that is not there yet")


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
        picture, drawn = draw_image(photographs[rng.integers(len(photographs))], rng)
        name = f"{number:06}.jpg"
        save_picture(picture, folder / name)
        images.append({"id": number, "file_name": name, "height": picture.shape[0], "width": picture.shape[1]})
        for own in drawn:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **annotation_of(own)})
    categories = [{"id": category_id, "name": name} for name, category_id in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


if __name__ == "__main__":
    sys.exit(main())
