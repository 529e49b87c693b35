"""Sheets of example images: rows that fill the width, captions that are not cut by neighbors, titles and legends."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.logs.contact_sheet import (
    GAP,
    MARGIN,
    WIDTH,
    Example,
    Size,
    Tile,
    fill_height,
    fit,
    font,
    save_captioned,
    save_sheet,
    split_rows,
    wrap,
    wrap_legend,
)


def black(size: Size) -> np.ndarray:
    return np.zeros((size[1], size[0], 3), dtype=np.uint8)


def example(width: int = 40, height: int = 30, tiles: int = 2) -> Example:
    return Example((width, height), [Tile("name $ caf\udce9", black)] * tiles)


def test_rows_fill_the_sheet(tmp_path: Path) -> None:
    examples = [example(40, 30), example(30, 40)] * 6
    rows = split_rows(examples, 200)
    assert [i for row in rows for i in row] == list(range(12))
    heights = [fill_height([examples[i] for i in row], WIDTH) for row in rows]
    assert all(100 < height < 400 for height in heights)
    save_sheet(examples, tmp_path / "sheet.png", row_height=200, title="a title")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == "RGB"
        dark = np.asarray(sheet.convert("L")) < 128
    assert dark.shape[1] == WIDTH
    columns = dark.mean(axis=0)  # the tiles' heights together
    assert columns[MARGIN : MARGIN + 20].min() > 0.7
    assert columns[-MARGIN - 20 : -MARGIN].min() > 0.7
    assert columns[-MARGIN:].max() == columns[:MARGIN].max() == 0


def test_few_examples_make_a_narrow_sheet(tmp_path: Path) -> None:
    save_sheet([example()], tmp_path / "sheet.jpg", row_height=60)
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.width == 2 * 160 + GAP + 2 * MARGIN


@pytest.mark.parametrize("shape", [(1, 300, 3), (300, 1, 3), (1, 1, 3)])
@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_images_of_any_shape_are_drawn(tmp_path: Path, shape: tuple[int, int, int], suffix: str) -> None:
    save_captioned(
        [np.zeros(shape, dtype=np.uint8)] * 2, ["a\nb", "$x^"], tmp_path / f"sheet.{suffix}", colors=["red"] * 2
    )
    assert (tmp_path / f"sheet.{suffix}").stat().st_size > 100


def test_long_texts_are_cut_and_wrapped() -> None:
    assert fit("short", 100) == "short"
    assert fit("a" * 100, 100).endswith("…")
    assert fit("pred. T-shirt/top (80%)", 130) == "pred. T-sh… (80%)"
    assert font().getlength(fit("a" * 100, 100)) <= 100
    assert fit("caf\udce9\nau lait", 1000) == "caf? au lait"
    assert wrap(["one", "two"], 1000) == ["one two"]
    assert wrap(["one", "two", "b" * 100], 60) == ["one two", fit("b" * 100, 60)]
    assert [len(row) for row in wrap_legend([("class", "red")] * 20, 400)] == [5] * 4
