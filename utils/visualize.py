"""Pictures of what a trained model does inside: its gates, what it sees of the image, what a token reads from others.

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

from config import ConfigError, load_config
from data.decoding import decode_pillow
from data.errors import BrokenImageError
from data.prefetch import Normalizer
from data.sources.digits import Digits
from data.transforms import EvalTransform, denormalize
from models.build import build_model
from models.inspection import Seen, attention_inputs, attention_map, gate_values, receptive_fields
from utils.checkpoint.weights import load_weights, read_state_dict
from utils.checkpoint.weights_file import load_checkpoint
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.tools.paper_plots import plot_by_depth, plot_maps


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    with report_user_errors():
        config = find_config(options.cfg, options.resume)
        model = trained_model(config, options.resume)
        size = options.size or config.DATA.IMG_SIZE
        images = torch.stack([to_tensor(config, image, size) for image in open_images(options, size)])  # (B, 3, H, W)
        options.output.mkdir(parents=True, exist_ok=True)
    written = [
        *draw_gates(config, model, images, options.output),
        draw_receptive_fields(config, model, images, options.output),
        *draw_attention(config, model, images, options.output, query=tuple(options.query)),
    ]
    print("\n".join(map(str, written)))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--resume", "--weights", required=True, help="checkpoint or weights; the EMA's are taken where it has some"
    )
    parser.add_argument("--cfg", help="the model's configuration; without it the one that the checkpoint holds")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", type=Path, nargs="+", help="image files")
    source.add_argument("--photographs", action="store_true", help="the two photographs that scikit-learn brings")
    source.add_argument(
        "--digits", type=at_least(1), default=4, help="that many validation digits, where no images are named"
    )
    parser.add_argument("--size", type=at_least(8), help="side of the images in pixels, any; without it DATA.IMG_SIZE")
    parser.add_argument("--query", type=float, nargs=2, default=[0.5, 0.5], metavar=("DOWN", "RIGHT"), help="0 to 1")
    parser.add_argument("--output", type=Path, default=Path("output/pictures"), help="folder for the PNG files")
    options = parser.parse_args(argv)
    if not all(0 <= share <= 1 for share in options.query):
        parser.error(f"--query {options.query}: both must be from 0 (top, left) to 1 (bottom, right)")
    return options


def find_config(path: str | None, checkpoint: str) -> CfgNode:
    """The configuration of a file, or the one that a checkpoint of this project holds.

    Raises:
        ConfigError: there is neither, or it is wrong.
    """
    if path is not None:
        return load_config(path)
    content = load_checkpoint(checkpoint).get("config")
    if not isinstance(content, str):
        raise ConfigError(f"{checkpoint}: holds no configuration; name the model's with --cfg FILE")
    return load_config(content)


def trained_model(config: CfgNode, checkpoint: str) -> nn.Module:
    """In evaluation mode, with as many classes as the weights have, the EMA's weights where there are some."""
    weights = read_state_dict(checkpoint)
    model = build_model(config, len(weights["head.bias"]) if "head.bias" in weights else None)
    load_weights(model, weights, checkpoint)
    return model.eval()


def open_images(options: argparse.Namespace, size: int) -> list[Image.Image]:
    if options.images:
        return [read_image(path) for path in options.images]
    if options.photographs:
        from sklearn.datasets import load_sample_images  # takes a second, which other images need not wait for

        return [Image.fromarray(image) for image in load_sample_images().images]
    digits = Digits("val", size)
    indices = np.linspace(0, len(digits) - 1, min(options.digits, len(digits))).astype(int)
    return [digits.read(int(index)) for index in indices]


def read_image(path: Path) -> Image.Image:
    """RGB pixels, as the training code reads them.

    Raises:
        OSError: no such file, or no image.
    """
    try:
        return decode_pillow(path.read_bytes())
    except BrokenImageError as error:
        raise BrokenImageError(f"{path}: {error}") from None


def to_tensor(config: CfgNode, image: Image.Image, size: int) -> Tensor:
    transform = EvalTransform(size, crop=config.TEST.CROP, interpolation=config.DATA.INTERPOLATION)
    pixels, _ = transform(image)  # (size, size, 3)
    return Normalizer()(pixels.permute(2, 0, 1)[None])[0]  # (3, size, size)


def colors(images: Tensor) -> np.ndarray:
    """Normalized (B, 3, H, W) to (B, H, W, 3) from 0 to 1."""
    return denormalize(images).permute(0, 2, 3, 1).numpy()


def draw_gates(config: CfgNode, model: nn.Module, images: Tensor, folder: Path) -> list[Path]:
    """delta.png and forget_gate.png, the paper's figure 4, of what gates there are."""
    gates = gate_values(model, images)
    written = []
    if gates:
        written.append(folder / "delta.png")
        columns = [(gate.name, gate.delta.numpy()) for gate in gates]
        plot_maps(
            colors(images),
            columns,
            title=f"{config.MODEL.NAME}: Delta by token, mean over channels",
            picture=written[-1],
        )
    forget = [(gate.name, gate.forget.numpy()) for gate in gates if gate.forget is not None]
    if forget:
        written.append(folder / "forget_gate.png")
        plot_by_depth(
            colors(images),
            np.stack([values for _, values in forget], axis=1),
            layers=[name for name, _ in forget],
            title=f"{config.MODEL.NAME}: what a token's state keeps",
            label="forget gate exp(A Delta), mean",
            picture=written[-1],
        )
    return written


def draw_receptive_fields(config: CfgNode, model: nn.Module, images: Tensor, folder: Path) -> Path:
    """receptive_field.png: of the middle token of each stage."""
    fields = receptive_fields(model, images)
    columns = [(f"stage {i + 1}", np.sqrt(field.numpy())) for i, field in enumerate(fields)]
    title = f"{config.MODEL.NAME}: effective receptive field of the middle token, square root"
    plot_maps(colors(images), columns, title=title, picture=folder / "receptive_field.png")
    return folder / "receptive_field.png"


def draw_attention(
    config: CfgNode, model: nn.Module, images: Tensor, folder: Path, *, query: tuple[float, float]
) -> list[Path]:
    """attention.png: the last block of each stage, mean over heads; attention_without_rope.png where it rotates."""
    last = {seen.name.split(",")[0]: seen for seen in attention_inputs(model, images)}
    written = []
    rotates = any(seen.rotary is not None for seen in last.values())
    for rotate, name in ((True, "attention.png"), (False, "attention_without_rope.png")):
        if not rotate and not rotates:
            continue
        columns = [(seen.name, query_map(seen, query, rotate=rotate)) for seen in last.values()]
        without = "" if rotate else ", rotary embedding left out"
        written.append(folder / name)
        plot_maps(
            colors(images),
            columns,
            title=f"{config.MODEL.NAME}: weights with which the marked token reads the others, x N{without}",
            picture=written[-1],
            mark=query,
            is_signed=True,
        )
    return written


def query_map(seen: Seen, query: tuple[float, float], *, rotate: bool) -> np.ndarray:
    """(B, H, W), mean over heads, times the number of tokens: an even reading of all tokens is 1 everywhere."""
    height, width = seen.x.shape[1:3]
    place = min(int(query[0] * height), height - 1), min(int(query[1] * width), width - 1)
    return (attention_map(seen, place, rotate=rotate).mean(dim=1) * height * width).detach().numpy()


if __name__ == "__main__":
    sys.exit(main())
