"""Segment images of any size: for each a palette PNG of classes, <name>.png, and <name>_overlay.jpg.

python -m downstream.segmentation.predict photo.jpg pictures/ --weights max_miou.pth --output segmented
python -m downstream.segmentation.predict aerial.tif --weights max_miou.pth --output segmented --tile 1024
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from yacs.config import CfgNode

from data.errors import as_data_error
from downstream.image_files import plan_results, read_images
from downstream.segmentation.build import build_inference, build_model, reduces_zero_label
from downstream.segmentation.data.masked_images import ADE20K_CLASSES, read_classes, read_image
from downstream.segmentation.data.transforms import EvalTransform
from downstream.segmentation.model.inference import predict_tiles
from downstream.segmentation.pictures import PREDICTION_ENDINGS, save_prediction
from downstream.task import DenseTask
from downstream.trained_model import load_trained, open_device, predict_parser, read_trained_model
from utils.checkpoint.weights_file import CheckpointError
from utils.config.command_line import at_least, report_user_errors
from utils.config.errors import UserError
from utils.training.amp import Precision, make_precision

SMALLEST_TILE = 64
CLASSES_SHOWN = 5


class Segmentor(NamedTuple):
    """A model in evaluation mode on its device, with its configuration and the names of its classes."""

    model: nn.Module
    config: CfgNode
    classes: list[str]
    device: torch.device
    precision: Precision


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with report_user_errors(DenseTask.user_errors), torch.no_grad():
        check(args)
        results = plan_results(args.images, args.output, PREDICTION_ENDINGS, force=args.force)
        segmentor = open_segmentor(args)
        first_label = int(reduces_zero_label(segmentor.config))
        for path, image, result in read_images(results, read_image):
            classes = predict(segmentor, image, args)
            with as_data_error(result, "written"):
                save_prediction(result, image, classes, num_classes=len(segmentor.classes), first_label=first_label)
            print(f"{path}: {class_shares(classes, segmentor.classes)}")
    print(f"masks and overlays: {args.output}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = predict_parser(__doc__, images="files, or folders of them")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names, one a line, where the weights have none")
    parser.add_argument(
        "--tile", type=at_least(0), default=0, metavar="PIXELS", help="segment the image at its own size, in tiles"
    )
    parser.add_argument(
        "--margin", type=at_least(0), default=0, metavar="PIXELS", help="of tiles, unused; an eighth of --tile"
    )
    parser.add_argument("--multi-scale", action="store_true", help="average over six scales and mirror images")
    parser.add_argument("--slide", action="store_true", help="in overlapping windows, at the scale of testing")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Check the arguments about tiles, and fill in the default margin.

    Raises:
        UserError: arguments that contradict each other.
    """
    if not args.tile:
        if args.margin:
            raise UserError(f"--margin {args.margin}: is about tiles; name their side with --tile")
        return
    if args.multi_scale or args.slide:
        raise UserError(f"--tile {args.tile}: tiles are seen at one scale; leave out --multi-scale and --slide")
    if args.tile < SMALLEST_TILE:
        raise UserError(f"--tile {args.tile}: must be at least {SMALLEST_TILE}")
    args.margin = args.margin or args.tile // 8
    if not 0 < 2 * args.margin < args.tile:
        raise UserError(f"--margin {args.margin}: must be above 0 and below half of --tile {args.tile}")


def open_segmentor(args: argparse.Namespace) -> Segmentor:
    """Build the model of --weights, with its configuration and classes.

    Raises:
        UserError: weights, configuration or classes are missing or do not fit.
    """
    device = open_device(args.device)
    flags = {"TEST.MULTI_SCALE": args.multi_scale, "TEST.SLIDE": args.slide}
    trained = read_trained_model(args, task="segmentation", flags=flags)
    classes = trained.classes
    if args.classes is not None:
        classes = read_classes(args.classes)
    elif classes is None and trained.config.DATA.DATASET == "ade20k":
        classes = read_classes(ADE20K_CLASSES)
    if classes is None:
        raise CheckpointError(f"{args.weights}: holds no names of classes; name a file of them with --classes")
    model = load_trained(build_model(trained.config, len(classes)), trained.weights, args.weights, device)
    precision = make_precision(device, amp=args.amp, dtype=trained.config.AMP_DTYPE)
    return Segmentor(model, trained.config, classes, device, precision)


def predict(segmentor: Segmentor, image: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Return the classes (H, W), uint8, of an image (H, W, 3)."""
    model, config, _, device, precision = segmentor
    if args.tile:
        tiles = predict_tiles(model, image, side=args.tile, margin=args.margin, device=device, precision=precision)
        return tiles.numpy()
    factors = tuple(config.TEST.FACTORS) if args.multi_scale else (1.0,)
    inputs = [x.to(device) for x in EvalTransform(tuple(config.DATA.SCALE), factors)(image)]
    return build_inference(config).predict(model, inputs, image.shape[:2], precision).cpu().numpy()


def class_shares(classes: np.ndarray, names: Sequence[str]) -> str:
    """Return the largest classes with their shares of the pixels, as text."""
    shares = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    largest = [int(i) for i in np.argsort(-shares)[:CLASSES_SHOWN] if shares[i] > 0]
    return ", ".join(f"{names[i]} {shares[i]:.1%}" for i in largest)


if __name__ == "__main__":
    sys.exit(main())
