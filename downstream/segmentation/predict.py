"""Segment images of any size: for each a palette PNG of classes and an overlay.

python -m downstream.segmentation.predict photo.jpg pictures/ --weights max_miou.pth --output found
python -m downstream.segmentation.predict aerial.tif --weights max_miou.pth --output found --tile 1024
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from yacs.config import CfgNode

from downstream.segmentation.build import build_inference, build_model, reduces_zero_label
from downstream.segmentation.config import load_config
from downstream.segmentation.data.dataset import (
    ADE20K_CLASSES,
    IMAGE_SUFFIXES,
    files_by_name,
    read_classes,
    read_image,
)
from downstream.segmentation.data.transforms import EvalTransform
from downstream.segmentation.model.inference import predict_tiles
from downstream.segmentation.pictures import overlay, save_mask
from utils.checkpoint.weights import classes_in, load_weights, no_weights_error, weights_in
from utils.checkpoint.weights_file import load_checkpoint
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.training.amp import make_precision

SMALLEST_TILE = 64
CLASSES_SHOWN = 5


class Segmentor(NamedTuple):
    """A model in evaluation mode on its device, and what its file says of it."""

    model: nn.Module
    config: CfgNode
    classes: list[str]
    device: torch.device


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    with report_user_errors(), torch.no_grad():
        check(arguments)
        jobs = plan_jobs(arguments.images, arguments.output)
        segmentor = open_segmentor(arguments)
        arguments.output.mkdir(parents=True, exist_ok=True)
        for path, name in jobs.items():
            image = read_image(path)
            classes = predict(segmentor, image, arguments)
            write(segmentor, image, classes, arguments.output / name)
            print(f"{path}: {described(classes, segmentor.classes)}")
    print(f"{len(jobs)} image(s): {arguments.output}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, or folders of them")
    parser.add_argument(
        "--weights", "--resume", required=True, metavar="FILE", help="checkpoint of a run, or published weights"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="<name>.png and <name>_overlay.jpg"
    )
    parser.add_argument("--cfg", metavar="FILE", help="YAML file; a run's checkpoint holds its own")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names, one a line, where the weights have none")
    parser.add_argument(
        "--tile", type=at_least(0), default=0, metavar="PIXELS", help="look at the image's own pixels, in tiles"
    )
    parser.add_argument(
        "--margin", type=at_least(0), default=0, metavar="PIXELS", help="of tiles, unused; an eighth of --tile"
    )
    parser.add_argument("--multi-scale", action="store_true", help="average over six scales and mirror images")
    parser.add_argument("--slide", action="store_true", help="in overlapping windows, at the scale of testing")
    parser.add_argument("--amp", action="store_true", help="16-bit autocast")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """Fill in the margin.

    Raises:
        ValueError: options that make no sense, or not together.
    """
    if not arguments.tile:
        if arguments.margin:
            raise ValueError(f"--margin {arguments.margin}: is about tiles; name their side with --tile")
        return
    if arguments.multi_scale or arguments.slide:
        raise ValueError(f"--tile {arguments.tile}: tiles are seen at one scale; leave out --multi-scale and --slide")
    if arguments.tile < SMALLEST_TILE:
        raise ValueError(f"--tile {arguments.tile}: must be at least {SMALLEST_TILE}")
    arguments.margin = arguments.margin or arguments.tile // 8
    if not 0 < 2 * arguments.margin < arguments.tile:
        raise ValueError(f"--margin {arguments.margin}: must be above 0 and below half of --tile {arguments.tile}")


def plan_jobs(sources: Sequence[Path], output: Path) -> dict[Path, str]:
    """Images by path, with the names of their results.

    Raises:
        ValueError, DataError: nothing to read, or results that would overwrite each other or files that are there.
    """
    jobs: dict[Path, str] = {}
    for source in sources:
        found = files_by_name(source, IMAGE_SUFFIXES) if source.is_dir() else {source.stem: source}
        jobs |= {path: name for name, path in found.items()}
    taken: dict[str, Path] = {}
    for path, name in jobs.items():
        if not path.is_file():
            raise ValueError(f"{path}: no such image")
        if name in taken:
            raise ValueError(f"{path}: {taken[name]} has the same name, and so would their results; do one at a time")
        taken[name] = path
        for result in results(output / name):
            if result.exists():
                raise ValueError(f"{result}: exists already; name another --output")
    return jobs


def results(path: Path) -> tuple[Path, Path]:
    """Mask and overlay of an image by its name without suffix."""
    return path.with_name(path.name + ".png"), path.with_name(path.name + "_overlay.jpg")


def open_segmentor(arguments: argparse.Namespace) -> Segmentor:
    """The model of --weights, its average's weights if the file has them, with its configuration and classes.

    Raises:
        ValueError: weights, configuration or classes are missing or do not fit.
    """
    content = load_checkpoint(arguments.weights, tolerant=True)
    flags = {"TEST.MULTI_SCALE": arguments.multi_scale, "TEST.SLIDE": arguments.slide, "EVAL_MODE": True}
    config = config_of(content, arguments, flags)
    classes = classes_in(content)
    if arguments.classes is not None:
        classes = read_classes(arguments.classes)
    elif classes is None and config.DATA.DATASET == "ade20k":
        classes = read_classes(ADE20K_CLASSES)
    if classes is None:
        raise ValueError(f"{arguments.weights}: holds no names of classes; name a file of them with --classes")
    weights = weights_in(content, "state_dict_ema") or weights_in(content, "model")
    if weights is None:
        raise no_weights_error(arguments.weights, content)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config, len(classes))
    load_weights(model, weights, arguments.weights)
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return Segmentor(model, config, classes, device)


def config_of(content: dict[str, Any], arguments: argparse.Namespace, flags: dict[str, Any]) -> CfgNode:
    """The configuration of --cfg, or the one that a run's checkpoint holds."""
    if arguments.cfg:
        return load_config(arguments.cfg, flags=flags)
    if not isinstance(content.get("config"), str):
        raise ValueError(f"{arguments.weights}: holds no configuration; name its YAML file with --cfg")
    return load_config(content["config"], flags=flags)


def predict(segmentor: Segmentor, image: np.ndarray, arguments: argparse.Namespace) -> np.ndarray:
    """Classes (H, W), uint8, of an image (H, W, 3)."""
    model, config, device = segmentor.model, segmentor.config, segmentor.device
    precision = make_precision(device, amp=arguments.amp, dtype=config.AMP_DTYPE)
    if arguments.tile:
        found = predict_tiles(
            model, image, side=arguments.tile, margin=arguments.margin, device=device, precision=precision
        )
        return found.numpy()
    factors = tuple(config.TEST.FACTORS) if arguments.multi_scale else (1.0,)
    inputs = [x.to(device) for x in EvalTransform(tuple(config.DATA.SCALE), factors)(image)]
    return build_inference(config).predict(model, inputs, image.shape[:2], precision).cpu().numpy()


def write(segmentor: Segmentor, image: np.ndarray, classes: np.ndarray, path: Path) -> None:
    """Write mask, in the numbers of the data set that the model was trained on, and overlay."""
    mask_path, overlay_path = results(path)
    mask_path.parent.mkdir(parents=True, exist_ok=True)
    num_classes = len(segmentor.classes)
    save_mask(mask_path, classes, num_classes, first_label=int(reduces_zero_label(segmentor.config)))
    Image.fromarray(overlay(image, classes, num_classes)).save(overlay_path)


def described(classes: np.ndarray, names: Sequence[str]) -> str:
    """The largest classes with their shares of the pixels."""
    shares = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    largest = [int(i) for i in np.argsort(-shares)[:CLASSES_SHOWN] if shares[i] > 0]
    return ", ".join(f"{names[i]} {shares[i]:.1%}" for i in largest)


if __name__ == "__main__":
    sys.exit(main())
