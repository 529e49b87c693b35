"""Plot what a trained model computes: receptive fields, attention weights, and gates.

python -m utils.visualize --weights output/mlla_digits/default/max_ema_acc.pth
python -m utils.visualize --weights mlla-t --images cat.jpg dog.jpg --size 384
python -m utils.visualize --weights runs/seed0/max_acc.pth --photographs --query 0.25 0.75 --output pictures

Without --images, the images are from the dataset of a classifier's training. Of a detector or segmentor the backbone
is plotted. Writes receptive_field.png and attention.png, and for models with gates delta.png and forget_gate.png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data import build_data
from data.decoding import decode_pillow
from data.errors import BrokenImageError
from data.prefetch import Normalizer
from data.sources.digits import Digits
from data.transforms import EvalTransform, denormalize
from downstream.trained_model import (
    TrainedModel,
    add_data_flag,
    add_device_flag,
    add_weights_flags,
    build_trained_backbone,
    data_flags,
    open_device,
    read_trained_model,
)
from models.build import build_model
from models.inspection import LayerInput, attention_inputs, attention_map, gate_values, receptive_fields
from models.kernels.dispatch import KernelsUnavailableError
from utils.checkpoint.weights import load_weights, num_outputs
from utils.config.command_line import MAX_SIDE, Parser, at_least, report_user_errors
from utils.config.errors import UserError
from utils.config.schema import with_setting
from utils.tools.paper_plots import plot_by_depth, plot_maps
from utils.tools.user_files import check_results, user_file

FILES = ("delta.png", "forget_gate.png", "receptive_field.png", "attention.png", "attention_without_rope.png")
NUM_IMAGES = 4
DENSE_SIZE = 512  # pixels; detectors and segmentors take images of any size


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with report_user_errors((UserError, KernelsUnavailableError)):
        check_results([args.output / name for name in FILES], force=args.force)
        device = open_device(args.device)
        trained = read_trained_model(args, flags={"MODEL.KERNELS": "torch", **data_flags(args)})  # inputs are recorded
        model = build_trained(trained, args.weights).to(device).eval()
        images = read_images(args, trained).to(device)  # (B, 3, H, W)
        name = trained.config.MODEL.NAME
        with user_file(args.output, "written"):
            args.output.mkdir(parents=True, exist_ok=True)
            written = [
                *draw_gates(name, model, images, args.output),
                draw_receptive_fields(name, model, images, args.output),
                *draw_attention(name, model, images, args.output, query=tuple(args.query)),
            ]
    print("\n".join(map(str, written)))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_weights_flags(parser)
    add_device_flag(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", type=Path, nargs="+", help="image files")
    source.add_argument("--photographs", action="store_true", help="the two photographs of scikit-learn")
    source.add_argument("--digits", type=at_least(1), help="number of validation digits of scikit-learn")
    add_data_flag(parser)
    parser.add_argument("--size", type=at_least(8, MAX_SIDE), help="image side in pixels; by default as in training")
    parser.add_argument(
        "--query",
        type=float,
        nargs=2,
        default=[0.5, 0.5],
        metavar=("DOWN", "RIGHT"),
        help="query, 0 to 1",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/pictures"), metavar="FOLDER", help="for the PNG files"
    )
    args = parser.parse_args(argv)
    if not all(0 <= fraction <= 1 for fraction in args.query):
        parser.error(f"--query {args.query}: both must be from 0 (top, left) to 1 (bottom, right)")
    return args


def build_trained(trained: TrainedModel, source: str) -> nn.Module:
    """Build a classifier, or the backbone of a detector or segmentor, with its weights.

    Raises:
        UserError: the model has no attention of this project, or the weights do not fit.
    """
    if trained.config.MODEL.TYPE not in ("mlla", "linear_vit"):
        raise UserError(f"{source}: MODEL.TYPE {trained.config.MODEL.TYPE}: only mlla and linear_vit can be plotted")
    if trained.task != "classification":
        return build_trained_backbone(trained, source)
    model = build_model(trained.config, num_outputs(trained.weights))
    load_weights(model, trained.weights, source)
    return model


def read_images(args: argparse.Namespace, trained: TrainedModel) -> Tensor:
    """Return the images that are named, or else some of the dataset that a classifier was trained on, (B, 3, H, W).

    Raises:
        UserError: they cannot be read, or the dataset is not there.
    """
    config = trained.config
    is_classifier = trained.task == "classification"
    size = args.size or (config.DATA.IMG_SIZE if is_classifier else DENSE_SIZE)
    if args.images or args.photographs or args.digits:
        crop, interpolation = (config.TEST.CROP, config.DATA.INTERPOLATION) if is_classifier else (True, "bicubic")
        transform = EvalTransform(size, crop=crop, interpolation=interpolation)
        pixels = torch.stack([transform(image).pixels for image in open_images(args, size)])  # (B, size, size, 3)
        return Normalizer()(pixels.permute(0, 3, 1, 2))
    if not is_classifier:
        raise UserError(f"{args.weights}: is for {trained.task}; name images with --images FILE ... or --photographs")
    try:
        images, _ = build_data(with_setting(config, "DATA.IMG_SIZE", size)).preview(NUM_IMAGES)
    except UserError as error:
        raise UserError(f"{error}; or name images with --images FILE ... or --photographs") from error
    return images


def open_images(args: argparse.Namespace, size: int) -> list[Image.Image]:
    """Return the images of --images, --photographs or --digits; these are as large as `size`."""
    if args.images:
        return [read_image(path) for path in args.images]
    if args.photographs:
        from sklearn.datasets import load_sample_images  # the import takes a second

        return [Image.fromarray(image) for image in load_sample_images().images]
    digits = Digits("val", size)
    indices = np.linspace(0, len(digits) - 1, min(args.digits, len(digits))).astype(int)
    return [digits.read(int(index)) for index in indices]


def read_image(path: Path) -> Image.Image:
    """Return RGB pixels, as the training code reads them.

    Raises:
        BrokenImageError: not an image.
        UserFileError: the file cannot be read.
    """
    try:
        with user_file(path, "read"):
            return decode_pillow(path.read_bytes())
    except BrokenImageError as error:
        raise BrokenImageError(f"{path}: {error}") from None


def colors(images: Tensor) -> np.ndarray:
    """Convert normalized images (B, 3, H, W) to (B, H, W, 3) from 0 to 1."""
    return denormalize(images.cpu()).permute(0, 2, 3, 1).numpy()


def draw_gates(name: str, model: nn.Module, images: Tensor, folder: Path) -> list[Path]:
    """Write delta.png and forget_gate.png (figure 4 of the paper), as far as the model has these gates."""
    gates = gate_values(model, images)
    written = []
    if gates:
        written.append(folder / "delta.png")
        columns = [(gate.name, gate.delta.cpu().numpy()) for gate in gates]
        plot_maps(
            colors(images),
            columns,
            title=f"{name}: Delta per token, mean over channels",
            picture=written[-1],
        )
    forget = [(gate.name, gate.forget.cpu().numpy()) for gate in gates if gate.forget is not None]
    if forget:
        written.append(folder / "forget_gate.png")
        plot_by_depth(
            colors(images),
            np.stack([values for _, values in forget], axis=1),
            layers=[name for name, _ in forget],
            title=f"{name}: share of the state kept per token",
            label="forget gate exp(A Delta), mean",
            picture=written[-1],
        )
    return written


def draw_receptive_fields(name: str, model: nn.Module, images: Tensor, folder: Path) -> Path:
    """Write receptive_field.png: the effective receptive field of the middle token of each stage."""
    fields = receptive_fields(model, images)
    columns = [(f"stage {i + 1}", np.sqrt(field.cpu().numpy())) for i, field in enumerate(fields)]
    title = f"{name}: effective receptive field of the middle token, square root"
    plot_maps(colors(images), columns, title=title, picture=folder / "receptive_field.png")
    return folder / "receptive_field.png"


def draw_attention(
    name: str, model: nn.Module, images: Tensor, folder: Path, *, query: tuple[float, float]
) -> list[Path]:
    """Write attention.png (last block of each stage, mean over heads) and, for models with RoPE, one without it."""
    last = {seen.name.split(",")[0]: seen for seen in attention_inputs(model, images)}
    written = []
    has_rope = any(seen.rotary is not None for seen in last.values())
    for rotate, file in ((True, "attention.png"), (False, "attention_without_rope.png")):
        if not rotate and not has_rope:
            continue
        columns = [(seen.name, query_map(seen, query, rotate=rotate)) for seen in last.values()]
        without = "" if rotate else ", without RoPE"
        written.append(folder / file)
        plot_maps(
            colors(images),
            columns,
            title=f"{name}: attention weights of the marked token, x N{without}",
            picture=written[-1],
            mark=query,
        )
    return written


def query_map(seen: LayerInput, query: tuple[float, float], *, rotate: bool) -> np.ndarray:
    """Return weights (B, H, W), mean over heads, times the number of tokens: uniform attention is 1 everywhere."""
    height, width = seen.x.shape[1:3]
    position = min(int(query[0] * height), height - 1), min(int(query[1] * width), width - 1)
    return (attention_map(seen, position, rotate=rotate).mean(dim=1) * height * width).detach().cpu().numpy()


if __name__ == "__main__":
    sys.exit(main())
