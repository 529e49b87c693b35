"""Plot what a trained model computes: receptive fields, attention weights, and gates.

python -m utils.visualize --resume output/mlla_digits/default/max_ema_acc.pth
python -m utils.visualize --resume mlla_t.pth --cfg cfgs/mlla_t.yaml --images cat.jpg dog.jpg --size 384
python -m utils.visualize --resume runs/seed0/max_acc.pth --photographs --query 0.25 0.75 --output pictures

Writes receptive_field.png and attention.png, and for models with gates delta.png and forget_gate.png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from yacs.config import CfgNode

from config import load_config
from data.decoding import decode_pillow
from data.errors import BrokenImageError
from data.prefetch import Normalizer
from data.sources.digits import Digits
from data.transforms import EvalTransform, denormalize
from models.build import build_model
from models.inspection import LayerInput, attention_inputs, attention_map, gate_values, receptive_fields
from models.kernels.dispatch import KernelsUnavailableError
from utils.checkpoint.best_weights import add_ema_flag, print_choice
from utils.checkpoint.weights import load_weights, read_state_dict
from utils.checkpoint.weights_file import CheckpointError, load_checkpoint
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.config.errors import UserError
from utils.tools.paper_plots import plot_by_depth, plot_maps
from utils.tools.user_files import user_file


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with report_user_errors((UserError, KernelsUnavailableError)):
        config = find_config(args.cfg, args.resume)
        model = trained_model(config, args.resume, ema=args.ema)
        size = args.size or config.DATA.IMG_SIZE
        images = torch.stack([to_tensor(config, image, size) for image in open_images(args, size)])  # (B, 3, H, W)
        with user_file(args.output, "written"):
            args.output.mkdir(parents=True, exist_ok=True)
            written = [
                *draw_gates(config, model, images, args.output),
                draw_receptive_fields(config, model, images, args.output),
                *draw_attention(config, model, images, args.output, query=tuple(args.query)),
            ]
    print("\n".join(map(str, written)))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--resume", "--weights", required=True, help="checkpoint or weights")
    add_ema_flag(parser)
    parser.add_argument("--cfg", help="YAML file of the model; by default the configuration in the checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", type=Path, nargs="+", help="image files")
    source.add_argument("--photographs", action="store_true", help="the two photographs of scikit-learn")
    source.add_argument(
        "--digits", type=at_least(1), default=4, help="number of validation digits, if no images are named"
    )
    parser.add_argument("--size", type=at_least(8), help="image side in pixels; default DATA.IMG_SIZE")
    parser.add_argument(
        "--query",
        type=float,
        nargs=2,
        default=[0.5, 0.5],
        metavar=("DOWN", "RIGHT"),
        help="query, 0 to 1",
    )
    parser.add_argument("--output", type=Path, default=Path("output/pictures"), help="folder for the PNG files")
    args = parser.parse_args(argv)
    if not all(0 <= fraction <= 1 for fraction in args.query):
        parser.error(f"--query {args.query}: both must be from 0 (top, left) to 1 (bottom, right)")
    return args


def find_config(path: str | None, checkpoint: str) -> CfgNode:
    """Return the configuration in a file, or the one stored in a checkpoint.

    Raises:
        CheckpointError: the checkpoint holds none.
        ConfigError: it is wrong.
    """
    if path is not None:
        return load_config(path)
    content = load_checkpoint(checkpoint).get("config")
    if not isinstance(content, str):
        raise CheckpointError(f"{checkpoint}: holds no configuration; name the model's with --cfg FILE")
    return load_config(content)


def trained_model(config: CfgNode, checkpoint: str, *, ema: bool | None = None) -> nn.Module:
    """Build the model in evaluation mode with the number of classes in the weights; for `ema` see read_state_dict."""
    weights = read_state_dict(checkpoint, ema=ema, announce=print_choice)
    model = build_model(config, len(weights["head.bias"]) if "head.bias" in weights else None)
    load_weights(model, weights, checkpoint)
    return model.eval()


def open_images(args: argparse.Namespace, size: int) -> list[Image.Image]:
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


def to_tensor(config: CfgNode, image: Image.Image, size: int) -> Tensor:
    transform = EvalTransform(size, crop=config.TEST.CROP, interpolation=config.DATA.INTERPOLATION)
    pixels = transform(image).pixels  # (size, size, 3)
    return Normalizer()(pixels.permute(2, 0, 1)[None])[0]  # (3, size, size)


def colors(images: Tensor) -> np.ndarray:
    """Convert normalized images (B, 3, H, W) to (B, H, W, 3) from 0 to 1."""
    return denormalize(images).permute(0, 2, 3, 1).numpy()


def draw_gates(config: CfgNode, model: nn.Module, images: Tensor, folder: Path) -> list[Path]:
    """Write delta.png and forget_gate.png (figure 4 of the paper), as far as the model has these gates."""
    gates = gate_values(model, images)
    written = []
    if gates:
        written.append(folder / "delta.png")
        columns = [(gate.name, gate.delta.numpy()) for gate in gates]
        plot_maps(
            colors(images),
            columns,
            title=f"{config.MODEL.NAME}: Delta per token, mean over channels",
            picture=written[-1],
        )
    forget = [(gate.name, gate.forget.numpy()) for gate in gates if gate.forget is not None]
    if forget:
        written.append(folder / "forget_gate.png")
        plot_by_depth(
            colors(images),
            np.stack([values for _, values in forget], axis=1),
            layers=[name for name, _ in forget],
            title=f"{config.MODEL.NAME}: share of the state kept per token",
            label="forget gate exp(A Delta), mean",
            picture=written[-1],
        )
    return written


def draw_receptive_fields(config: CfgNode, model: nn.Module, images: Tensor, folder: Path) -> Path:
    """Write receptive_field.png: the effective receptive field of the middle token of each stage."""
    fields = receptive_fields(model, images)
    columns = [(f"stage {i + 1}", np.sqrt(field.numpy())) for i, field in enumerate(fields)]
    title = f"{config.MODEL.NAME}: effective receptive field of the middle token, square root"
    plot_maps(colors(images), columns, title=title, picture=folder / "receptive_field.png")
    return folder / "receptive_field.png"


def draw_attention(
    config: CfgNode, model: nn.Module, images: Tensor, folder: Path, *, query: tuple[float, float]
) -> list[Path]:
    """Write attention.png (last block of each stage, mean over heads) and, for models with RoPE, one without it."""
    last = {seen.name.split(",")[0]: seen for seen in attention_inputs(model, images)}
    written = []
    has_rope = any(seen.rotary is not None for seen in last.values())
    for rotate, name in ((True, "attention.png"), (False, "attention_without_rope.png")):
        if not rotate and not has_rope:
            continue
        columns = [(seen.name, query_map(seen, query, rotate=rotate)) for seen in last.values()]
        without = "" if rotate else ", without RoPE"
        written.append(folder / name)
        plot_maps(
            colors(images),
            columns,
            title=f"{config.MODEL.NAME}: attention weights of the marked token, x N{without}",
            picture=written[-1],
            mark=query,
        )
    return written


def query_map(seen: LayerInput, query: tuple[float, float], *, rotate: bool) -> np.ndarray:
    """Return weights (B, H, W), mean over heads, times the number of tokens: uniform attention is 1 everywhere."""
    height, width = seen.x.shape[1:3]
    position = min(int(query[0] * height), height - 1), min(int(query[1] * width), width - 1)
    return (attention_map(seen, position, rotate=rotate).mean(dim=1) * height * width).detach().numpy()


if __name__ == "__main__":
    sys.exit(main())
