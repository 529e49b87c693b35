"""Predictions of a classifier as text, JSON and CSV."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TABLES = (".json", ".csv")
MAX_NAME_LENGTH = 40  # characters of a class name in the text, and of the column of files


class Prediction(NamedTuple):
    """The most likely classes of one image, best first, with their probabilities."""

    file: str
    classes: list[str]
    probabilities: list[float]


def format_table(predictions: Sequence[Prediction]) -> str:
    """Format one line per image: its file, in full, and its most likely classes; longer names are not aligned."""
    width = min(MAX_NAME_LENGTH, max(len(prediction.file) for prediction in predictions))
    return "\n".join(
        f"{prediction.file:{width}}  "
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
