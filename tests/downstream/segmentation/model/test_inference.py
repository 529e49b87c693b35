import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.segmentation.data.transforms import normalize
from downstream.segmentation.model import inference
from downstream.segmentation.model.inference import Inference, classes_at, predict_tiles, resized_rows, windows
from downstream.segmentation.model.upernet import resize
from utils.training.amp import make_precision

CPU = torch.device("cpu")
PRECISION = make_precision(CPU, amp=False, dtype="auto")


@pytest.mark.parametrize(
    ("height", "width", "side", "stride"), [(512, 683, 512, 341), (50, 33, 16, 11), (9, 70, 16, 16)]
)
def test_windows_cover_all_and_stay_inside(height: int, width: int, side: int, stride: int) -> None:
    seen = np.zeros((height, width), dtype=int)
    for rows, columns in windows(height, width, side=side, stride=stride):
        assert seen[rows, columns].shape == (min(side, height), min(side, width))
        seen[rows, columns] += 1
    assert seen.min() >= 1


def test_windows_by_hand() -> None:
    found = [
        (rows.start, rows.stop, columns.start, columns.stop) for rows, columns in windows(20, 45, side=20, stride=15)
    ]
    assert found == [(0, 20, 0, 20), (0, 20, 15, 35), (0, 20, 25, 45)]


class Colors(nn.Module):
    """The logits of three classes are the image's three values, with what surrounds them mixed in."""

    def __init__(self, radius: int) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, x: Tensor) -> Tensor:
        side = 2 * self.radius + 1
        x = F.pad(x, [self.radius] * 4)
        return 2 * F.avg_pool2d(x, side, stride=1)


def random_image(height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


def test_multi_scale_and_flip_against_plain_code() -> None:
    model, inputs = Colors(2), [torch.randn(3, 20, 30), torch.randn(3, 31, 45)]
    total = torch.zeros(1, 3, 26, 40)
    for image in inputs:
        for flipped in (False, True):
            x = image[None].flip(3) if flipped else image[None]
            logits = model(x)
            logits = F.interpolate(logits, (26, 40), mode="bilinear", align_corners=False)
            total += (logits.flip(3) if flipped else logits).softmax(dim=1) / 4
    found = Inference(flip=True).predict(model, inputs, (26, 40), PRECISION)
    assert found.dtype == torch.uint8
    assert torch.equal(found, total.argmax(dim=1)[0].to(torch.uint8))
    assert not torch.equal(found, Inference().predict(model, inputs[:1], (26, 40), PRECISION))


def test_overlapping_windows_are_averaged() -> None:
    model, image = Colors(1), torch.randn(3, 10, 25)
    parts = torch.full((3, 3, 10, 25), float("nan"))
    for i, start in enumerate((0, 8, 15)):
        parts[i, ..., start : start + 10] = model(image[None, ..., start : start + 10])
    expected = parts.nanmean(dim=0)
    found = Inference(window=10, stride=8).logits(model, image, PRECISION)[0]
    torch.testing.assert_close(found, expected)


def test_one_window_is_the_whole_image() -> None:
    model, image = Colors(2), torch.randn(3, 20, 30)
    assert torch.equal(Inference(window=32, stride=16).logits(model, image, PRECISION), model(image[None]))


@pytest.mark.parametrize("size", [(40, 33), (13, 50), (21, 17)])
def test_rows_of_a_resized_map(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 21, 17)
    whole = resize(x, size)
    for top, bottom in ((0, 5), (5, 12), (12, size[0])):
        torch.testing.assert_close(resized_rows(x, size, top, bottom), whole[:, :, top:bottom], atol=1e-5, rtol=0)


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = [torch.randn(1, 5, 20, 30), torch.randn(1, 5, 41, 60)]
    whole = classes_at(logits, (90, 120))
    monkeypatch.setattr(inference, "STRIP_ELEMENTS", 5 * 120 * 7)
    strips = classes_at(logits, (90, 120))
    assert whole.shape == strips.shape == (90, 120)
    assert (whole != strips).float().mean() < 1e-3  # rounding of equal probabilities


@pytest.mark.parametrize("size", [(100, 140), (30, 200), (40, 25)])
def test_tiles_equal_the_whole_where_the_margin_holds_all_surroundings(size: tuple[int, int]) -> None:
    model, image = Colors(3), random_image(*size)
    whole = Inference().predict(model, [normalize(image)], size, PRECISION)
    tiled = predict_tiles(model, image, side=32, margin=4, device=CPU, precision=PRECISION)
    assert torch.equal(whole, tiled)
    assert not torch.equal(whole, predict_tiles(model, image, side=32, margin=0, device=CPU, precision=PRECISION))
