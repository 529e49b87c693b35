"""Classify images: python -m utils.predict IMAGES... --model mlla_tiny [--weights FILE] [--topk 5]

IMAGES are files or folders. Without --weights MLLA's released ones are taken; a checkpoint of a run needs no --model.
"""

import csv
import difflib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode
from tqdm import tqdm
from yacs.config import CfgNode

from config import load_config
from data.decoding import decode_pillow
from models import build_model
from utils.checkpoint.download import LONG_NAMES
from utils.checkpoint.weights import classes_in, load_weights, read_state_dict
from utils.checkpoint.weights_file import load_checkpoint
from utils.config.command_line import Parser, report_user_errors
from utils.logs.atomic_write import write_atomic
from utils.logs.plots import plot_grid

MAX_PICTURES = 64
MAX_NAME = 40  # characters of a file's or class's name in the table
ONLY_EVALUATION = {"EVAL_MODE": True, "THROUGHPUT_MODE": False, "PROFILE_MODE": False}


class PredictionError(ValueError):
    """Nothing can be predicted: one line with cause and remedy."""


class Prediction(NamedTuple):
    """What a model says of one image: the likeliest classes first."""

    file: str
    classes: list[str]
    probabilities: list[float]


class ImageFiles(Dataset):
    """(path, transformed image or None, why it cannot be read or "") by index."""

    def __init__(self, paths: Sequence[Path], transform: Any) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Path, Tensor | None, str]:
        path = self.paths[index]
        try:
            return path, self.transform(decode_pillow(path.read_bytes())), ""
        except OSError as error:
            return path, None, " ".join(str(error).split())


class Classifier(NamedTuple):
    """A model in evaluation mode, names of its classes by output, and how images are prepared for it."""

    model: nn.Module
    classes: list[str]
    transform: Any


def find_images(sources: Sequence[Path]) -> list[Path]:
    """Files as they are named, and the images in folders, at any depth, in order.

    Raises:
        PredictionError: nothing there.
    """
    paths: list[Path] = []
    for source in sources:
        if not source.exists():
            raise PredictionError(f"{source}: no such file or folder")
        found = [source]
        if source.is_dir():
            found = sorted(p for p in source.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        if not found:
            raise PredictionError(f"{source}: no images in it ({', '.join(IMG_EXTENSIONS)})")
        paths += found
    return paths


def open_classifier(words: Any) -> Classifier:
    """The classifier of the command line: by --cfg, by the configuration in the weights file, or by timm's name.

    Raises:
        PredictionError: none of them, or a model without released weights.
        CheckpointError, DownloadError: the weights cannot be read, or do not fit.
    """
    source = words.weights or released_weights(words.model)
    if not source:
        raise PredictionError("which model? name one with --model mlla_tiny, or a run's checkpoint with --weights FILE")
    content = load_checkpoint(source)
    weights = read_state_dict(source, average=words.ema)
    num_classes = len(weights["head.weight"]) if "head.weight" in weights else None
    size, crop, interpolation = 224, True, "bicubic"
    model: nn.Module
    if words.model:
        model = timm.create_model(words.model, num_classes=num_classes or 1000)
    else:
        config = load_config(words.cfg, flags=ONLY_EVALUATION) if words.cfg else config_in(content, source)
        model = build_model(config, num_classes)
        size, crop, interpolation = config.DATA.IMG_SIZE, config.TEST.CROP, config.DATA.INTERPOLATION
    load_weights(model, weights, source)
    transform = preparation(words.size or size, crop=crop, interpolation=interpolation)
    return Classifier(model.eval(), class_names(classes_in(content), num_classes or 1000), transform)


def released_weights(model: str) -> str:
    """The released weights of one of timm's names for this project's models; none for no name.

    Raises:
        PredictionError: another model, which needs --weights.
    """
    name = model.split(".")[0].replace("mila_", "mlla_")
    if model and name.replace("_", "-") not in LONG_NAMES:
        raise PredictionError(f"--model {model}: no weights of it come with this project; name a file with --weights")
    return name


def check_model(words: Any) -> None:
    """Raise PredictionError where the model's name is none, or something else names the model too."""
    if words.model and not timm.is_model(words.model):
        near = difflib.get_close_matches(words.model, timm.list_models(), n=1)
        hint = f"did you mean {near[0]}?" if near else "there are mlla_tiny, mlla_small and mlla_base"
        raise PredictionError(f"--model {words.model}: timm has no such model; {hint}")
    if words.model and words.cfg:
        raise PredictionError(f"--cfg {words.cfg} and --model {words.model} both name the model; leave one of them out")


def config_in(content: dict[str, Any], source: str) -> CfgNode:
    """The configuration that a run keeps in its checkpoints.

    Raises:
        PredictionError: there is none.
    """
    if not isinstance(content.get("config"), str):
        raise PredictionError(f"{source}: does not say which model it is for; add --model or --cfg")
    return load_config(content["config"], flags=ONLY_EVALUATION)


def preparation(size: int, *, crop: bool, interpolation: str) -> Callable[[Image.Image], Tensor]:
    """How evaluation prepares images: short side to 256/224 of the size and its center, or both sides to the size."""
    mode = InterpolationMode("bicubic" if interpolation == "random" else interpolation)
    resize = [transforms.Resize((size, size), interpolation=mode)]
    if crop:
        resize = [transforms.Resize(round(size * 256 / 224), interpolation=mode), transforms.CenterCrop(size)]
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return transforms.Compose([*resize, transforms.ToTensor(), normalize])


def class_names(stored: list[str] | None, count: int) -> list[str]:
    """The file's own names, ImageNet's for 1,000 classes, or numbers."""
    if stored and len(stored) == count:
        return stored
    if count == 1000:
        return list(ImageNetInfo().label_descriptions())
    return [f"class {i}" for i in range(count)]


@torch.inference_mode()
def predict(
    classifier: Classifier, paths: Sequence[Path], *, topk: int, batch_size: int, num_workers: int, device: torch.device
) -> Iterator[Prediction | tuple[Path, str]]:
    """For each file in order: a prediction, or (file, why it cannot be read)."""
    model = classifier.model.to(device)
    files = ImageFiles(paths, classifier.transform)
    loader = DataLoader(files, batch_size, num_workers=num_workers, collate_fn=list)
    for samples in tqdm(loader, desc="images", unit="batch", disable=not sys.stderr.isatty()):
        images = [image for _, image, _ in samples if image is not None]
        scores = model(torch.stack(images).to(device)).float().softmax(dim=1).cpu() if images else torch.empty(0)
        rows = iter(scores)  # (classes,) each
        for path, image, reason in samples:
            if image is None:
                yield path, reason
                continue
            probabilities, labels = next(rows).topk(min(topk, len(classifier.classes)))
            yield Prediction(str(path), [classifier.classes[i] for i in labels.tolist()], probabilities.tolist())


def table(predictions: Sequence[Prediction]) -> str:
    """A line an image: its file and the likeliest classes."""
    width = min(MAX_NAME, max(len(prediction.file) for prediction in predictions))
    return "\n".join(
        f"{prediction.file[-width:]:{width}}  "
        + "  ".join(
            f"{name.split(',')[0][:MAX_NAME]} {100 * probability:.1f}%"
            for name, probability in zip(prediction.classes, prediction.probabilities, strict=True)
        )
        for prediction in predictions
    )


def write_predictions(path: Path, predictions: Sequence[Prediction], form: str) -> None:
    """As .json (a list of objects) or .csv (a line an image and class)."""
    with path.open("w", newline="") as file:
        if form == ".json":
            json.dump([prediction._asdict() for prediction in predictions], file, indent=1, ensure_ascii=False)
            return
        writer = csv.writer(file)
        writer.writerow(["file", "rank", "class", "probability"])
        for prediction in predictions:
            for rank, (name, probability) in enumerate(
                zip(prediction.classes, prediction.probabilities, strict=True), start=1
            ):
                writer.writerow([prediction.file, rank, name, f"{probability:.6f}"])


def draw(path: Path, predictions: Sequence[Prediction]) -> None:
    """The first images, as they are in their files, with their likeliest classes."""
    images, captions = [], []
    for prediction in predictions[:MAX_PICTURES]:
        image = decode_pillow(Path(prediction.file).read_bytes())
        image.thumbnail((256, 256))
        images.append(np.asarray(image))
        name = prediction.classes[0].split(",")[0]
        captions.append(f"{name[:20]}\n{100 * prediction.probabilities[0]:.1f}%")
    plot_grid(images, captions, picture=path)


def check_targets(words: Any) -> None:
    """Raise PredictionError before anything is read, if what is to be written would be refused."""
    endings = {words.output: (".json", ".csv"), words.picture: (".png", ".pdf", ".jpg")}
    for path, allowed in endings.items():
        if path is None:
            continue
        if path.suffix not in allowed:
            raise PredictionError(f"{path}: its name must end in {' or '.join(allowed)}")
        if path.exists() and not words.force:
            raise PredictionError(f"{path}: is there already; name another file, or replace it with --force")
        if not path.parent.is_dir():
            raise PredictionError(f"{path}: there is no folder {path.parent}")


def run(words: Any) -> None:
    """Do what the command line says.

    Raises:
        PredictionError: no images, or none that can be read.
    """
    check_targets(words)
    check_model(words)
    paths = find_images(words.images)
    results = predict(
        open_classifier(words),
        paths,
        topk=words.topk,
        batch_size=words.batch_size,
        num_workers=words.num_workers,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    predictions = []
    for result in results:
        if isinstance(result, Prediction):
            predictions.append(result)
        else:
            print(f"skipped {result[0]}: {result[1]}", file=sys.stderr)
    if not predictions:
        raise PredictionError(f"none of {len(paths)} files could be read as an image")
    print(table(predictions))
    if words.output:
        write_atomic(words.output, lambda path: write_predictions(path, predictions, words.output.suffix))
    if words.picture:
        draw(words.picture, predictions)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, prog="python -m utils.predict")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="files, or folders with images")
    parser.add_argument("--model", default="", help="timm's name of the model, such as mlla_tiny")
    parser.add_argument("--weights", "--resume", default="", help="a path, a URL, or mlla-t, mlla-s, mlla-b")
    parser.add_argument("--cfg", default="", help="in place of --model: the YAML file that the weights were made with")
    parser.add_argument("--topk", type=positive, default=5, help="classes an image")
    parser.add_argument("--size", type=positive, help="side of the images in pixels, if not as in training")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read images; 0: this one")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table as .json or .csv")
    parser.add_argument("--picture", type=Path, metavar="FILE", help=f"draw up to {MAX_PICTURES} images as .png")
    parser.add_argument("--no-ema", dest="ema", action="store_false", help="the model's weights, not the average's")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    words = parser.parse_args(argv)
    with report_user_errors():
        run(words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
