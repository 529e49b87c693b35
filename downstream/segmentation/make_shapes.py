"""Render the demonstration's dataset: textured shapes on textured backgrounds, six classes.

python -m downstream.segmentation.make_shapes shapes
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from downstream.rendered_dataset import shapes_parser, write_dataset
from downstream.segmentation.data.shapes import SHAPES, render_scene
from downstream.segmentation.pictures import save_mask
from utils.config.command_line import at_least, report_user_errors

CLASSES = ("background", *SHAPES)
SETTINGS_FILE = "shapes.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = shapes_parser(__doc__, train=2000, val=100)
    parser.add_argument("--size", type=at_least(1), default=96, metavar="PIXELS", help="side of the images")
    args = parser.parse_args(argv)
    settings = {name: getattr(args, name) for name in ("train", "val", "size", "seed")}
    with report_user_errors():
        write_dataset(args.folder, settings, lambda folder: render(folder, settings), settings_file=SETTINGS_FILE)
    return 0


def render(folder: Path, settings: dict[str, int]) -> None:
    """Write images/<split>, masks/<split>, classes.txt and the settings."""
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(settings[split]):
            rng = np.random.default_rng((settings["seed"], split == "val", i))
            scene = render_scene(rng, settings["size"], settings["size"])
            classes = np.zeros(scene.image.shape[:2], dtype=np.uint8)
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                classes[mask] = label + 1
            Image.fromarray(scene.image).save(folder / "images" / split / f"{i:05}.jpg", quality=92)
            save_mask(folder / "masks" / split / f"{i:05}.png", classes, len(CLASSES))
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / SETTINGS_FILE).write_text(json.dumps(settings) + "\n")


if __name__ == "__main__":
    sys.exit(main())
