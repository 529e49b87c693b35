"""Convert weights: python -m utils.convert IN OUT --to {official,ours,safetensors,timm} [options]

IN is a path, a URL, or mlla-t, mlla-s, mlla-b. OUT holds the same weights, bit for bit, and the class names and the
configuration if IN has them. Optimizer and other training state are left out, but with --to official --training-state.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from config import load_config
from models.rope import rotary_tables
from utils.checkpoint.files import is_official
from utils.checkpoint.run_content import check_run_content
from utils.checkpoint.weight_sets import Weights, find_weight_sets
from utils.checkpoint.weights import DERIVED_KEY_SUFFIX, metadata_in, no_weights_error
from utils.checkpoint.weights_file import load_checkpoint, write_safetensors
from utils.config.command_line import Parser, report_user_errors
from utils.config.errors import UserError
from utils.tools.official_state import official_state
from utils.tools.user_files import UserFileError, check_output, user_file, write_result
from utils.training.build import build_classification_schedule
from utils.training.lr_schedule import CLASSIFICATION_BATCH_SIZE

TOTAL_STRIDE = 32  # of the official classifier, which needs image sides that are multiples of it
OFFICIAL_STATE = ("optimizer", "lr_scheduler", "max_accuracy", "max_accuracy_e", "epoch")
DEFAULT_SIZE = (224, 224)
ATTENTION = re.compile(r"layers\.(\d+)\.blocks\.\d+\.attn\.qk\.weight")


class ConversionError(UserError):
    """A conversion that is not possible."""


def convert(
    source: str,
    target: Path,
    *,
    file_format: str,
    ema: bool = False,
    size: tuple[int, int] | None = None,
    training_state: bool = False,
) -> str:
    """Read weights in any known format and write them in another one, atomically.

    Args:
        source: a path, a URL, or the name of released weights.
        target: file to write; an existing one is replaced.
        file_format: a key of `FORMATS`.
        ema: write only the EMA weights, as the model's weights.
        size: height and width in pixels for the rotary tables of the official format. Default: the size of the tables
            in the file, else DATA.IMG_SIZE of its configuration, else 224x224.
        training_state: write the official format with all that the official main.py needs to continue the run.

    Returns:
        One line that describes the file.

    Raises:
        ConversionError: the file has no EMA weights, or the official format does not support the size.
        UserError: the training state is missing, or the official code cannot continue from it.
        CheckpointError, DownloadError: the source cannot be read.
        UserFileError: the target cannot be written.
    """
    content = load_checkpoint(source)
    model, ema_weights = find_weight_sets(content)
    if model is None and ema_weights is None:
        raise no_weights_error(source, content)
    if ema and ema_weights is None:
        raise ConversionError(f"{source}: has no EMA weights (state_dict_ema); leave out --ema")
    source_weights = {"model": ema_weights} if ema else {"model": model, "state_dict_ema": ema_weights}
    kinds = {key: without_rotary_tables(weights) for key, weights in source_weights.items() if weights is not None}
    suffix = ""
    if file_format == "official":
        size = size or size_in(content, [weights for weights in (model, ema_weights) if weights is not None])
        kinds = {key: {**weights, **official_tables(weights, size, source)} for key, weights in kinds.items()}
        suffix = f", for images of {size[0]}x{size[1]}"
    metadata = metadata_in(content)
    if training_state:
        metadata |= state_for_official(content, source)
        kinds.setdefault("state_dict_ema", kinds["model"])  # the official code always has an EMA
        suffix += f", after {metadata['epoch']} epochs"
    with user_file(target, "written"):
        written = FORMATS[file_format](target, kinds, metadata)
    num_tensors = len(next(iter(kinds.values())))
    return f"{target}: {' and '.join(written)}, {num_tensors} tensors each, format {file_format!r}{suffix}"


def state_for_official(content: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the training state and the configuration of a run's checkpoint, as the official code stores them.

    Raises:
        UserError: there is none, or the official code cannot continue from it.
    """
    check_run_content(content, source)
    config = yaml.safe_load(metadata_in(content).get("config", "{}"))
    if is_official(content):
        return {**{key: content[key] for key in OFFICIAL_STATE if key in content}, "config": config}
    images, images_per_step = (content.get(key) for key in ("num_train_images", "images_per_step"))
    if not (config and images and images_per_step):
        raise ConversionError(
            f"{source}: does not say how many training images there are, as checkpoints of version 1.0.0; "
            "resume it here for an epoch first, or leave out --training-state"
        )
    settings = load_config(content["config"])
    if settings.TRAIN.FREEZE:
        raise ConversionError(f"{source}: TRAIN.FREEZE True: the official code trains all parameters")
    steps_per_epoch = images // images_per_step
    lr_scale = images_per_step / CLASSIFICATION_BATCH_SIZE
    schedule = build_classification_schedule(settings, steps_per_epoch=steps_per_epoch, lr_scale=lr_scale)
    return {**official_state(content, source, schedule, steps_per_epoch), "config": config}


def size_in(content: dict[str, Any], kinds: list[Weights]) -> tuple[int, int]:
    """Return height and width in pixels from a file's rotary tables or configuration, else the default."""
    table = kinds[0].get(f"layers.0.blocks.0.{DERIVED_KEY_SUFFIX}")
    if table is not None:
        return 4 * table.shape[0], 4 * table.shape[1]
    match = re.search(r"^ +IMG_SIZE: (\d+)$", metadata_in(content).get("config", ""), flags=re.MULTILINE)
    return (int(match[1]), int(match[1])) if match else DEFAULT_SIZE


def official_tables(weights: Weights, size: tuple[int, int], source: str) -> Weights:
    """Return each block's cosines and sines as the official classifier stores them: (H, W, C / 2, 2), float32.

    Args:
        weights: of a classifier.
        size: height and width of the images in pixels.
        source: file name for error messages.

    Raises:
        ConversionError: the size is no multiple of the stride, or the weights are not of an MLLA classifier.
    """
    if any(side < TOTAL_STRIDE or side % TOTAL_STRIDE for side in size):
        raise ConversionError(
            f"{size[0]}x{size[1]} pixels: the official classifier needs multiples of {TOTAL_STRIDE}; set --size H W"
        )
    blocks = {name: match for name in weights if (match := ATTENTION.fullmatch(name))}
    if not blocks:
        raise ConversionError(f"{source}: not an MLLA classifier, which has layers.0.blocks.0.attn.qk.weight")
    tables: Weights = {}
    for name, match in blocks.items():
        height, width = (side // 4 // 2 ** int(match[1]) for side in size)
        cos_and_sin = rotary_tables(height, width, weights[name].shape[1], torch.device("cpu"))  # (H, W, C / 2) each
        tables[name.replace("attn.qk.weight", DERIVED_KEY_SUFFIX)] = torch.stack(cos_and_sin, dim=-1)
    return tables


def without_rotary_tables(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if not name.endswith(DERIVED_KEY_SUFFIX)}


def write_ours(target: Path, kinds: dict[str, Weights], metadata: dict[str, Any]) -> list[str]:
    """Write this project's or the official format: `model`, `state_dict_ema` and the metadata."""
    write_result(target, lambda path: torch.save({**kinds, **metadata}, path))
    return list(kinds)


def write_timm(target: Path, kinds: dict[str, Weights], metadata: dict[str, Any]) -> list[str]:
    """Write timm's training format, which timm.create_model(checkpoint_path=...) reads."""
    renamed = {"state_dict" if key == "model" else key: weights for key, weights in kinds.items()}
    return write_ours(target, renamed, metadata)


def write_one_set(target: Path, kinds: dict[str, Weights], metadata: dict[str, Any]) -> list[str]:
    """Write one set of weights, the model's if there is one, as a safetensors file with the metadata."""
    key, weights = next(iter(kinds.items()))
    write_result(target, lambda path: write_safetensors(path, weights, metadata))
    return [key]


FORMATS = {"official": write_ours, "ours": write_ours, "safetensors": write_one_set, "timm": write_timm}


def check_target(target: Path, file_format: str, *, force: bool) -> None:
    """Raise UserFileError if OUT cannot be written or its name does not fit the format."""
    check_output(target, force=force)
    if (target.suffix == ".safetensors") != (file_format == "safetensors"):
        raise UserFileError(f"{target}: names of safetensors files, and no others, must end in .safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__.split("\n\n")[1])
    parser.add_argument("source", metavar="IN", help="a path, a URL, or mlla-t, mlla-s, mlla-b")
    parser.add_argument("target", metavar="OUT", type=Path)
    parser.add_argument("--to", required=True, choices=sorted(FORMATS), dest="file_format")
    parser.add_argument("--ema", action="store_true", help="write only the EMA weights")
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="image size, for --to official")
    parser.add_argument(
        "--training-state",
        action="store_true",
        help="with --to official: also optimizer, schedule, epoch and best accuracies, to continue a run there",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    with report_user_errors():
        check_target(args.target, args.file_format, force=args.force)
        if args.size and args.file_format != "official":
            raise ConversionError("--size works with --to official, which stores tables for one image size")
        if args.training_state and (args.ema or args.file_format != "official"):
            raise ConversionError("--training-state works with --to official and without --ema: it needs both weights")
        size = (args.size[0], args.size[1]) if args.size else None
        options = {"file_format": args.file_format, "ema": args.ema, "size": size}
        print(convert(args.source, args.target, **options, training_state=args.training_state))
    return 0


if __name__ == "__main__":
    sys.exit(main())
