"""Classify images: python -m utils.predict IMAGES... --model mlla_tiny [--weights FILE] [--topk 5]

IMAGES are files or folders. Without --weights, MLLA's released weights are used. A run's checkpoint needs no --model.
"""

import csv
import difflib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm
from yacs.config import CfgNode

from config import load_config
from data.decoding import decode_pillow
from data.prefetch import Normalizer
from data.transforms import EvalTransform, Transform
from models import build_model
from models.kernels.dispatch import KernelsUnavailableError
from utils.checkpoint.best_weights import add_ema_flag, print_choice
from utils.checkpoint.download import is_timm_model, released_name
from utils.checkpoint.weights import classes_in, load_weights, read_state_dict
from utils.checkpoint.weights_file import load_checkpoint
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.config.errors import UserError
from utils.logs.atomic_write import write_atomic
from utils.logs.contact_sheet import save_captioned
from utils.tools.user_files import check_output, user_file

MAX_DRAWN_IMAGES = 64
MAX_NAME_LENGTH = 40  # characters of a file or class name in the table
EVAL_FLAGS = {"EVAL_MODE": True, "THROUGHPUT_MODE": False, "PROFILE_MODE": False}


class PredictionError(UserError):
    """The command line names no model, or no image that can be classified."""


class Prediction(NamedTuple):
    """The most likely classes of one image, best first, with their probabilities."""

    file: str
    classes: list[str]
    probabilities: list[float]


class ImageFiles(Dataset):
    """Dataset of (path, pixels (size, size, 3) in uint8, or None if the file is broken, and the reason)."""

    def __init__(self, paths: Sequence[Path], transform: Transform) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Path, Tensor | None, str]:
        path = self.paths[index]
        try:
            return path, self.transform(decode_pillow(path.read_bytes())).pixels, ""
        except OSError as error:
            return path, None, " ".join(str(error).split())


class Classifier(NamedTuple):
    """A model in evaluation mode, its class names in the order of its outputs, and its image transform."""

    model: nn.Module
    classes: list[str]
    transform: Transform


def find_images(sources: Sequence[Path]) -> list[Path]:
    """Return the files, and the images of the folders, at any depth and sorted.

    Raises:
        PredictionError: no such file or folder, or a folder without images.
    """
    paths: list[Path] = []
    for source in sources:
        with user_file(source, "read"):
            if not source.exists():
                raise PredictionError(f"{source}: no such file or folder")
            files = [source]
            if source.is_dir():
                files = sorted(p for p in source.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        if not files:
            raise PredictionError(f"{source}: no images in it ({', '.join(IMG_EXTENSIONS)})")
        paths += files
    return paths


def open_classifier(args: Any) -> Classifier:
    """Build the classifier by --model, by --cfg, or by the configuration in the weights file.

    Raises:
        PredictionError: none of them is given, or the model has no released weights.
        CheckpointError, DownloadError: the weights cannot be read, or do not fit the model.
    """
    source = args.weights or released_weights(args.model)
    if not source:
        raise PredictionError("no model is named; add --model mlla_tiny, or a run's checkpoint with --weights FILE")
    content = load_checkpoint(source)
    weights = read_state_dict(source, ema=args.ema, announce=print_choice)
    num_classes = len(weights["head.weight"]) if "head.weight" in weights else None
    size, crop, interpolation = 224, True, "bicubic"
    model: nn.Module
    if args.model:
        model = timm.create_model(args.model, num_classes=num_classes or 1000)
    else:
        config = load_config(args.cfg, flags=EVAL_FLAGS) if args.cfg else config_in(content, source)
        model = build_model(config, num_classes)
        size, crop, interpolation = config.DATA.IMG_SIZE, config.TEST.CROP, config.DATA.INTERPOLATION
    load_weights(model, weights, source)
    transform = EvalTransform(args.size or size, crop=crop, interpolation=interpolation)
    return Classifier(model.eval(), class_names(classes_in(content), num_classes or 1000), transform)


def released_weights(model: str) -> str:
    """Return the name of the released weights for a timm model name, or "" for "".

    Raises:
        PredictionError: a model without released weights.
    """
    name = model.split(".")[0].replace("mila_", "mlla_")
    if model and not released_name(name):
        raise PredictionError(f"--model {model}: this project has no weights of it; name a file with --weights")
    return name


def check_model(args: Any) -> None:
    """Raise PredictionError if timm does not know --model, or --cfg names a model too."""
    if args.model and not is_timm_model(args.model):
        near = difflib.get_close_matches(args.model, timm.list_models(), n=1)
        hint = f"did you mean {near[0]}?" if near else "for example mlla_tiny, mlla_small and mlla_base"
        raise PredictionError(f"--model {args.model}: timm has no such model; {hint}")
    if args.model and args.cfg:
        raise PredictionError(f"--cfg {args.cfg} and --model {args.model} both name the model; leave one of them out")


def config_in(content: dict[str, Any], source: str) -> CfgNode:
    """Return the configuration that a run stores in its checkpoints.

    Raises:
        PredictionError: the file has none.
    """
    if not isinstance(content.get("config"), str):
        raise PredictionError(f"{source}: holds no configuration of a model; add --model or --cfg")
    return load_config(content["config"], flags=EVAL_FLAGS)


def class_names(stored: list[str] | None, count: int) -> list[str]:
    """Return the names stored in the file, ImageNet's for 1,000 classes, or else numbers."""
    if stored and len(stored) == count:
        return stored
    if count == 1000:
        return list(ImageNetInfo().label_descriptions())
    return [f"class {i}" for i in range(count)]


@torch.inference_mode()
def predict(
    classifier: Classifier, paths: Sequence[Path], *, topk: int, batch_size: int, num_workers: int, device: torch.device
) -> Iterator[Prediction | tuple[Path, str]]:
    """Yield for each file, in order, a prediction or (file, reason why it cannot be read)."""
    model = classifier.model.to(device)
    normalizer = Normalizer(device)
    files = ImageFiles(paths, classifier.transform)
    loader = DataLoader(files, batch_size, num_workers=num_workers, collate_fn=list)
    for samples in tqdm(loader, desc="images", unit="batch", disable=not sys.stderr.isatty()):
        readable = [pixels for _, pixels, _ in samples if pixels is not None]
        scores = torch.empty(0)
        if readable:
            images = torch.stack(readable).permute(0, 3, 1, 2).contiguous()  # (B, 3, size, size)
            scores = model(normalizer(images.to(device))).float().softmax(dim=1).cpu()  # (B, classes)
        rows = iter(scores)
        for path, pixels, reason in samples:
            if pixels is None:
                yield path, reason
                continue
            probabilities, labels = next(rows).topk(min(topk, len(classifier.classes)))
            yield Prediction(str(path), [classifier.classes[i] for i in labels.tolist()], probabilities.tolist())


def format_table(predictions: Sequence[Prediction]) -> str:
    """Format one line per image: its file and most likely classes."""
    width = min(MAX_NAME_LENGTH, max(len(prediction.file) for prediction in predictions))
    return "\n".join(
        f"{prediction.file[-width:]:{width}}  "
        + "  ".join(
            f"{name.split(',')[0][:MAX_NAME_LENGTH]} {100 * probability:.1f}%"
            for name, probability in zip(prediction.classes, prediction.probabilities, strict=True)
        )
        for prediction in predictions
    )


def write_predictions(path: Path, predictions: Sequence[Prediction], suffix: str) -> None:
    """Write a .json file (a list of objects) or a .csv file (one line per image and class).

    Bytes of names that are not UTF-8 are escapes in JSON, as in Python; a CSV file holds them as they are.
    """
    errors = "backslashreplace" if suffix == ".json" else "surrogateescape"
    with path.open("w", newline="", encoding="utf-8", errors=errors) as file:
        if suffix == ".json":
            json.dump([prediction._asdict() for prediction in predictions], file, indent=1, ensure_ascii=False)
            return
        writer = csv.writer(file)
        writer.writerow(["file", "rank", "class", "probability"])
        for prediction in predictions:
            for rank, (name, probability) in enumerate(
                zip(prediction.classes, prediction.probabilities, strict=True), start=1
            ):
                writer.writerow([prediction.file, rank, name, f"{probability:.6f}"])


def draw_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Plot the first images, as stored, with their most likely class."""
    images, captions = [], []
    for prediction in predictions[:MAX_DRAWN_IMAGES]:
        image = decode_pillow(Path(prediction.file).read_bytes())
        image.thumbnail((256, 256))
        images.append(np.asarray(image))
        name = prediction.classes[0].split(",")[0]
        captions.append(f"{name[:20]}\n{100 * prediction.probabilities[0]:.1f}%")
    save_captioned(images, captions, path)


def run(args: Any) -> None:
    """Run the command.

    Raises:
        PredictionError: no images, or none that can be read.
        UserFileError: an output file exists or cannot be written.
    """
    for path, suffixes in ((args.output, (".json", ".csv")), (args.picture, (".png", ".pdf", ".jpg"))):
        if path is not None:
            check_output(path, suffixes=suffixes, force=args.force)
    check_model(args)
    paths = find_images(args.images)
    results = predict(
        open_classifier(args),
        paths,
        topk=args.topk,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    predictions = []
    for result in results:
        if isinstance(result, Prediction):
            predictions.append(result)
        else:
            print(f"skipped {result[0]}: {result[1]}", file=sys.stderr)
    if not predictions:
        raise PredictionError(f"none of {len(paths)} files can be read as an image")
    print(format_table(predictions))
    if args.output:
        with user_file(args.output, "written"):
            write_atomic(args.output, lambda path: write_predictions(path, predictions, args.output.suffix))
    if args.picture:
        with user_file(args.picture, "written"):
            draw_predictions(args.picture, predictions)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, prog="python -m utils.predict")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="files, or folders with images")
    parser.add_argument("--model", default="", help="timm model name, such as mlla_tiny")
    parser.add_argument("--weights", "--resume", default="", help="a path, a URL, or mlla-t, mlla-s, mlla-b")
    parser.add_argument("--cfg", default="", help="instead of --model: YAML file that the weights were trained with")
    parser.add_argument("--topk", type=at_least(1), default=5, help="classes per image")
    parser.add_argument("--size", type=at_least(1), help="image side in pixels, if not as in training")
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--num-workers", type=at_least(0), default=0, help="processes that load images; 0: none")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all predictions as .json or .csv")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help=f"plot up to {MAX_DRAWN_IMAGES} images (.png, .pdf)"
    )
    add_ema_flag(parser)
    parser.add_argument("--force", action="store_true", help="replace existing files")
    args = parser.parse_args(argv)
    with report_user_errors((UserError, KernelsUnavailableError)):
        run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
