"""scikit-learn's 1,797 handwritten digits (UCI, 8x8 gray) as an embedded dataset of RGB images, no download."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from data.errors import DataError

VAL_PER_CLASS = 36  # of about 180; 360 in all, which leaves 1,437 for training


class Digits:
    """One split of the digits, as RGB images of size x size.

    The validation split holds 36 evenly spaced images of each class, in the dataset's order; the rest is for training.

    Args:
        split: "train" or "val".
        size: side of the images in pixels; the 8x8 originals are resized bicubically.
        only: names of the digits to keep, whose labels are then numbered from 0; None keeps all ten.

    Raises:
        DataError: `only` has a name that is not a digit.
    """

    def __init__(self, split: str, size: int = 32, only: Sequence[str] | None = None) -> None:
        from sklearn.datasets import load_digits  # takes a second, which other datasets should not cost

        digits = load_digits()
        is_val = np.zeros(len(digits.target), dtype=bool)
        for label in range(10):
            positions = np.flatnonzero(digits.target == label)
            is_val[positions[np.linspace(0, len(positions) - 1, VAL_PER_CLASS).round().astype(int)]] = True
        self.split = split
        names = [str(name) for name in digits.target_names]
        if unknown := set(only or []) - set(names):
            raise DataError(f"DATA.CLASSES: no digit is called {', '.join(sorted(unknown))}; there are {names}")
        self.classes = [name for name in names if only is None or name in only]
        is_kept = np.isin(digits.target, [names.index(name) for name in self.classes])
        chosen = is_kept & (is_val if split == "val" else ~is_val)
        self.labels = [self.classes.index(names[label]) for label in digits.target[chosen]]
        gray = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)  # (N, 8, 8)
        self.images = [
            Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC).convert("RGB") for image in gray
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"digit {index} of the {self.split} split"

    def read(self, index: int) -> Image.Image:
        return self.images[index]
