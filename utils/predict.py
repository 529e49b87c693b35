"""Classify images: python -m utils.predict IMAGES... --weights FILE [--topk 5] [--output FOLDER]

IMAGES are files or folders. A run's checkpoint and mlla-t, mlla-s, mlla-b (released weights) need no other flag. With
bare weights, name their model: --cfg mlla_t, or --model and a timm name.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
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

from data.decoding import decode_pillow
from data.prefetch import Normalizer
from data.transforms import EvalTransform, Transform
from downstream.trained_model import add_device_flag, add_weights_flags, open_device, read_trained_model
from models import build_model
from models.kernels.dispatch import KernelsUnavailableError
from utils.checkpoint.best_weights import print_choice
from utils.checkpoint.download import is_timm_model, nearest_timm_model, released_name
from utils.checkpoint.weights import load_weights, num_outputs, read_state_dict, read_weights
from utils.config.command_line import MAX_SIDE, MAX_WORKERS, Parser, at_least, report_user_errors
from utils.config.errors import UserError
from utils.logs.contact_sheet import save_captioned
from utils.tools.prediction_tables import TABLES, Prediction, format_table, write_predictions
from utils.tools.user_files import check_output, check_results, user_file, write_result
from utils.training.amp import Precision, make_precision

MAX_DRAWN_IMAGES = 64


class PredictionError(UserError):
    """The command line names no model, or no image that can be classified."""


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
            if not (source.is_file() or source.is_dir()):
                raise PredictionError(f"{source}: must be a file or a folder, not a device or a pipe")
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
    args.weights = args.weights or released_weights(args.model)
    if not args.weights:
        raise PredictionError("no model is named; name a run's checkpoint with --weights FILE, or add --weights mlla-t")
    if args.model:
        return open_timm_classifier(args)
    trained = read_trained_model(args, task="classification")
    num_classes = num_outputs(trained.weights, trained.classes)
    model = build_model(trained.config, num_classes)
    load_weights(model, trained.weights, args.weights)
    size, test = args.size or trained.config.DATA.IMG_SIZE, trained.config.TEST
    transform = EvalTransform(size, crop=test.CROP, interpolation=trained.config.DATA.INTERPOLATION)
    return Classifier(model.eval(), class_names(trained.classes, num_classes or 1000), transform)


def open_timm_classifier(args: Any) -> Classifier:
    """Build the classifier that timm knows by --model, with images as MLLA's recipe prepares them."""
    weights = read_state_dict(args.weights, ema=args.ema, announce=print_choice)
    classes = read_weights(args.weights, tolerant=True).classes
    num_classes = num_outputs(weights, classes) or 1000
    model = timm.create_model(args.model, num_classes=num_classes)
    load_weights(model, weights, args.weights)
    names = class_names(classes, num_classes)
    return Classifier(model.eval(), names, EvalTransform(args.size or 224, crop=True, interpolation="bicubic"))


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
        near = nearest_timm_model(args.model)
        hint = f"did you mean {near}?" if near else "for example mlla_tiny, mlla_small and mlla_base"
        raise PredictionError(f"--model {args.model}: timm has no such model; {hint}")
    if args.model and args.cfg:
        raise PredictionError(f"--cfg {args.cfg} and --model {args.model} both name the model; leave one of them out")


def class_names(stored: list[str] | None, count: int) -> list[str]:
    """Return the names stored in the file, ImageNet's for 1,000 classes, or else numbers."""
    if stored and len(stored) == count:
        return stored
    if count == 1000:
        return list(ImageNetInfo().label_descriptions())
    return [f"class {i}" for i in range(count)]


@torch.inference_mode()
def predict(
    classifier: Classifier,
    paths: Sequence[Path],
    *,
    topk: int,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    precision: Precision,
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
            with precision.autocast():
                logits = model(normalizer(images.to(device)))
            scores = logits.float().softmax(dim=1).cpu()  # (B, classes)
        rows = iter(scores)
        for path, pixels, reason in samples:
            if pixels is None:
                yield path, reason
                continue
            probabilities, labels = next(rows).topk(min(topk, len(classifier.classes)))
            yield Prediction(str(path), [classifier.classes[i] for i in labels.tolist()], probabilities.tolist())


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


def plan_outputs(args: Any) -> tuple[list[Path], list[Path]]:
    """Return the tables and plots to write, by --output and --picture, after checking that they may be written.

    Raises:
        UserFileError: a file exists or cannot be written, or has another ending.
    """
    plots: list[Path] = [args.picture] if args.picture else []
    for path in plots:
        check_output(path, suffixes=(".png", ".pdf", ".jpg"), force=args.force)
    if args.output is None:
        return [], plots
    with user_file(args.output, "written"):
        is_folder = args.output.is_dir() or not args.output.suffix
    if not is_folder:
        check_output(args.output, suffixes=TABLES, force=args.force)
        return [args.output], plots
    tables = [args.output / f"predictions{suffix}" for suffix in TABLES]
    plots.append(args.output / "predictions.png")
    check_results([*tables, plots[-1]], force=args.force)
    return tables, plots


def run(args: Any) -> None:
    """Run the command.

    Raises:
        PredictionError: no images, or none that can be read.
        UserFileError: an output file exists or cannot be written.
    """
    tables, plots = plan_outputs(args)
    check_model(args)
    paths = find_images(args.images)
    device = open_device(args.device)
    results = predict(
        open_classifier(args),
        paths,
        topk=args.topk,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=device,
        precision=make_precision(device, amp=args.amp, dtype="auto"),
    )
    predictions = []
    for result in results:
        if isinstance(result, Prediction):
            predictions.append(result)
        else:
            print(f"skipped {result[0]}: {result[1]}", file=sys.stderr)
    if not predictions:
        raise PredictionError("none of the files can be read as an image")
    print(format_table(predictions))
    for table in tables:
        with user_file(table, "written"):
            table.parent.mkdir(parents=True, exist_ok=True)
        write_result(table, partial(write_predictions, predictions=predictions, suffix=table.suffix))
    for plot in plots:
        with user_file(plot, "written"):
            draw_predictions(plot, predictions)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="files, or folders with images")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write predictions.json, .csv and .png; or only a FILE.json or .csv",
    )
    add_weights_flags(parser, required=False)
    add_device_flag(parser)
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--model", default="", help="timm name of the model, where the weights hold no configuration")
    parser.add_argument("--topk", type=at_least(1), default=5, help="classes per image")
    parser.add_argument("--size", type=at_least(1, MAX_SIDE), help="image side in pixels, if not as in training")
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument(
        "--num-workers", type=at_least(0, MAX_WORKERS), default=0, help="processes that load images; 0: none"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help=f"plot up to {MAX_DRAWN_IMAGES} images (.png, .pdf)"
    )
    args = parser.parse_args(argv)
    with report_user_errors((UserError, KernelsUnavailableError)):
        run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
