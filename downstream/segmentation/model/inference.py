"""Predict class indices of an image's pixels: whole, in windows, at several scales, or in tiles of a large image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from downstream.segmentation.data.transforms import normalize
from downstream.segmentation.model.upernet import resize
from utils.training.amp import Precision

STRIP_ELEMENTS = 2**28  # resized logits in memory at once: 1 GiB


@dataclass(frozen=True)
class Inference:
    """Settings of inference.

    Attributes:
        flip: average with the prediction for the mirror image.
        window: side of square windows, pixels; 0: the whole image at once.
        stride: distance between windows, pixels; logits are averaged where windows overlap.
    """

    flip: bool = False
    window: int = 0
    stride: int = 0

    @torch.no_grad()
    def predict(
        self, model: nn.Module, inputs: Sequence[Tensor], size: tuple[int, int], precision: Precision
    ) -> Tensor:
        """Return classes (H, W), uint8, of an image of `size` = (H, W).

        The probabilities of all inputs and, with `flip`, of their mirror images are averaged.

        Args:
            model: segmentor in evaluation mode; images (1, 3, h, w) to logits (1, classes, h, w).
            inputs: the normalized image (3, h, w) at one or several scales, on the model's device.
        """
        logits = []
        for image in inputs:
            logits.append(self.logits(model, image, precision))
            if self.flip:
                logits.append(self.logits(model, image.flip(-1), precision).flip(-1))
        return classes_at(logits, size)

    def logits(self, model: nn.Module, image: Tensor, precision: Precision) -> Tensor:
        """Return logits (1, classes, h, w), float32, of an image (3, h, w)."""
        images = image[None].contiguous(memory_format=torch.channels_last)  # (1, 3, h, w)
        with precision.autocast():
            if not self.window:
                return model(images).float()
            height, width = image.shape[1:]
            total: Tensor | None = None
            count = images.new_zeros(1, 1, height, width)
            for rows, columns in windows(height, width, side=self.window, stride=self.stride):
                part = model(images[:, :, rows, columns]).float()
                if total is None:
                    total = part.new_zeros(1, part.shape[1], height, width)
                total[:, :, rows, columns] += part
                count[:, :, rows, columns] += 1
        assert total is not None
        return total / count


def windows(height: int, width: int, *, side: int, stride: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of windows that cover an image: one every `stride` pixels, the last ones at its border."""

    def starts(length: int) -> list[int]:
        last = max(length - side, 0)
        return [min(i * stride, last) for i in range(-(-last // stride) + 1)]

    for top in starts(height):
        for left in starts(width):
            yield slice(top, min(top + side, height)), slice(left, min(left + side, width))


def classes_at(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return the most probable classes (H, W), uint8, of logits (1, classes, h_i, w_i), resized to `size` = (H, W).

    Probabilities of several logits are averaged. The image is processed in strips of rows, so that a large one needs
    only a few times STRIP_ELEMENTS float32 numbers of memory.
    """
    height, width = size
    num_rows = max(1, STRIP_ELEMENTS // (logits[0].shape[1] * width))
    strips = []
    for top in range(0, height, num_rows):
        bottom = min(top + num_rows, height)
        parts = [resized_rows(x, size, top, bottom) for x in logits]
        if len(parts) > 1:
            parts = [part.softmax(dim=1) for part in parts]
            for part in parts[1:]:
                parts[0] += part
        strips.append(parts[0].argmax(dim=1)[0].to(torch.uint8))  # (bottom - top, W)
    return torch.cat(strips)  # (H, W)


def resized_rows(x: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Return rows top to bottom of `resize(x, size)`, (B, C, bottom - top, W)."""
    height, width = size
    if (top, bottom) == (0, height):
        return resize(x, size)
    rows = torch.arange(top, bottom, device=x.device, dtype=x.dtype)
    y = ((rows + 0.5) * (x.shape[2] / height) - 0.5).clamp(0, x.shape[2] - 1)
    above = y.floor().long()
    share = (y - above)[:, None]  # (rows, 1)
    below = (above + 1).clamp(max=x.shape[2] - 1)
    x = x[:, :, above] * (1 - share) + x[:, :, below] * share  # (B, C, bottom - top, w)
    return resize(x, (bottom - top, width))


@torch.no_grad()
def predict_tiles(
    model: nn.Module, image: np.ndarray, *, side: int, margin: int, device: torch.device, precision: Precision
) -> Tensor:
    """Return classes (H, W), uint8, of an image (H, W, 3) of any size, with memory for one tile.

    Tiles overlap. The outer `margin` pixels of a tile, which lack context, are used only at the image's border.

    Args:
        side: side of a tile, pixels; more than twice the margin.
    """
    height, width = image.shape[:2]
    result = torch.zeros(height, width, dtype=torch.uint8)
    inference = Inference()
    for rows, columns in windows(height, width, side=side, stride=side - 2 * margin):
        tile = normalize(image[rows, columns]).to(device)
        classes = classes_at([inference.logits(model, tile, precision)], (tile.shape[1], tile.shape[2])).cpu()
        top = 0 if rows.start == 0 else margin
        left = 0 if columns.start == 0 else margin
        result[rows.start + top : rows.stop, columns.start + left : columns.stop] = classes[top:, left:]
    return result
