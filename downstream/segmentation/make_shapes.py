"""Render a small segmentation data set: textured shapes on textured backgrounds, six classes.

python -m downstream.segmentation.make_shapes shapes
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from downstream.segmentation.data.shapes import SHAPES, render_scene
from downstream.segmentation.pictures import save_mask
from utils.config.command_line import Parser, at_least, report_user_errors

CLASSES = ("background", *SHAPES)
FACTS = "shapes.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="new folder for images/, masks/ and classes.txt")
    parser.add_argument("--train", type=at_least(1), default=2000, metavar="NUMBER", help="images to train on")
    parser.add_argument("--val", type=at_least(1), default=100, metavar="NUMBER", help="images to evaluate on")
    parser.add_argument("--size", type=at_least(1), default=96, metavar="PIXELS", help="side of the images")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="NUMBER", help="other images for another seed")
    arguments = parser.parse_args(argv)
    with report_user_errors():
        facts = {name: value for name, value in vars(arguments).items() if name != "folder"}
        if is_there(arguments.folder, facts):
            print(f"{arguments.folder} is there already")
            return 0
        render(arguments.folder, facts)
    print(f"{arguments.folder}: {arguments.train} training and {arguments.val} validation images")
    return 0


def is_there(folder: Path, facts: dict[str, int]) -> bool:
    """Whether the folder holds just this data set.

    Raises:
        ValueError: it holds something else.
    """
    if not folder.exists():
        return False
    path = folder / FACTS
    if path.is_file() and json.loads(path.read_text()) == facts:
        return True
    raise ValueError(f"{folder}: holds something else; name a folder that is not there yet, or remove it")


def render(folder: Path, facts: dict[str, int]) -> None:
    """Write the data set under another name and rename it when it is whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split, count in (("train", facts["train"]), ("val", facts["val"])):
        for kind in ("images", "masks"):
            (partial / kind / split).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng((facts["seed"], split == "val", i))
            scene = render_scene(rng, facts["size"], facts["size"])
            classes = np.zeros(scene.image.shape[:2], dtype=np.uint8)
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                classes[mask] = label + 1
            Image.fromarray(scene.image).save(partial / "images" / split / f"{i:05}.jpg", quality=92)
            save_mask(partial / "masks" / split / f"{i:05}.png", classes, len(CLASSES))
    (partial / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (partial / FACTS).write_text(json.dumps(facts) + "\n")
    partial.rename(folder)


if __name__ == "__main__":
    sys.exit(main())
