"""Sheets of example images with captions, for the predictions of every task; rows fill the sheet's width."""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH = 1200  # of a sheet, in pixels
GAP = 6  # pixels between the tiles of an example
MARGIN = 18  # pixels between examples, and around the sheet
FONT_SIZE = 14
LINE_HEIGHT = 18
CAPTIONED_HEIGHT = 130  # of images with a caption each

Size = tuple[int, int]  # width and height in pixels
Color = str | tuple[int, int, int]


class Tile(NamedTuple):
    """A picture with a caption of one or more lines; `draw` returns it, (H, W, 3) uint8, at a width and height."""

    caption: str
    draw: Callable[[Size], np.ndarray]
    color: Color = "black"


class Example(NamedTuple):
    """Tiles that belong together, side by side, each of the image's size."""

    image_size: Size
    tiles: Sequence[Tile]

    @property
    def aspect(self) -> float:
        """Width by height of all tiles together, without gaps."""
        return len(self.tiles) * self.image_size[0] / self.image_size[1]

    @property
    def gaps(self) -> int:
        return GAP * (len(self.tiles) - 1)


def save_sheet(
    examples: Sequence[Example],
    path: Path,
    *,
    row_height: int,
    title: str = "",
    legend: Sequence[tuple[str, Color]] = (),
) -> None:
    """Draw examples on a sheet, with a title above and a legend of colors below, and write it.

    Args:
        examples: from left to right and from the top down; one or more.
        path: file; its suffix says the format.
        row_height: of the tiles in pixels, about: a row is scaled to fill the sheet's width.
        title: one line.
        legend: names and colors.
    """
    rows = [[examples[i] for i in row] for row in split_rows(examples, row_height)]
    if len(rows) == 1:  # few examples: at most twice as high, and the sheet is narrow instead
        width = min(WIDTH, math.ceil(2 * row_height * sum(e.aspect for e in rows[0]) + fixed_width(rows[0])))
    else:
        width = WIDTH
    title_lines = wrap(title.split(), width - 2 * MARGIN) if title else []
    legend_rows = wrap_legend(legend, width - 2 * MARGIN)
    strips = [draw_row(row, width) for row in rows]
    top = MARGIN + LINE_HEIGHT * len(title_lines) + (MARGIN // 2 if title else 0)
    height = top + sum(strip.height + MARGIN for strip in strips) + (LINE_HEIGHT + GAP) * len(legend_rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(title_lines):
        draw.text((MARGIN, MARGIN + LINE_HEIGHT * i), line, fill="black", font=font())
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + MARGIN
    for entries in legend_rows:
        left = float(MARGIN)
        for name, color in entries:
            draw.rectangle((left, top + 2, left + LINE_HEIGHT, top + LINE_HEIGHT - 2), fill=color, outline="black")
            draw.text((left + LINE_HEIGHT + GAP, top), name, fill="black", font=font())
            left += legend_width(name)
        top += LINE_HEIGHT + GAP
    sheet.save(path, quality=90, optimize=True)


def save_captioned(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    path: Path,
    *,
    colors: Sequence[Color] | None = None,
    title: str = "",
) -> None:
    """Write a sheet of images (H, W, 3) uint8 of any sizes, each below its caption, about eight square ones per row."""
    examples = [
        Example((image.shape[1], image.shape[0]), [Tile(caption, partial(resized, image), color)])
        for image, caption, color in zip(images, captions, colors or ["black"] * len(images), strict=True)
    ]
    save_sheet(examples, path, row_height=CAPTIONED_HEIGHT, title=title)


def split_rows(examples: Sequence[Example], row_height: int) -> list[range]:
    """Return the examples' numbers by row, so that heights of rows that fill the sheet are near `row_height`."""
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first n examples: cost, and where the last row begins
    for end in range(1, len(examples) + 1):
        options = []
        for start in range(end - 1, -1, -1):
            height = fill_height(examples[start:end], WIDTH)
            options.append((best[start][0] + math.log(max(height, 1) / row_height) ** 2, start))
            if height < row_height / 4:
                break
        best.append(min(options))
    rows, end = [], len(examples)
    while end:
        rows.append(range(best[end][1], end))
        end = best[end][1]
    return rows[::-1]


def fixed_width(row: Sequence[Example]) -> int:
    """Return the pixels of a row that are not tiles."""
    return sum(example.gaps for example in row) + MARGIN * (len(row) + 1)


def fill_height(row: Sequence[Example], width: int) -> float:
    """Return the height of a row's tiles that fill a width."""
    return (width - fixed_width(row)) / sum(example.aspect for example in row)


def draw_row(row: Sequence[Example], width: int) -> Image.Image:
    """Return a row of the sheet: captions, and the tiles below them, all of one height."""
    height = fill_height(row, width)
    lines = max(tile.caption.count("\n") + 1 for example in row for tile in example.tiles)
    below = LINE_HEIGHT * lines + 2
    strip = Image.new("RGB", (width, below + max(1, round(height))), "white")
    draw = ImageDraw.Draw(strip)
    left = float(MARGIN)
    for example in row:
        tile_width = height * example.image_size[0] / example.image_size[1]
        for tile in example.tiles:
            size = max(1, round(left + tile_width) - round(left)), max(1, round(height))
            for i, line in enumerate(tile.caption.split("\n")):
                text = fit(line, size[0])
                draw.text((round(left), LINE_HEIGHT * i), text, fill=tile.color, font=font())
            strip.paste(Image.fromarray(tile.draw(size)), (round(left), below))
            left += tile_width + GAP
        left += MARGIN - GAP
    return strip


def resized(image: np.ndarray, size: Size) -> np.ndarray:
    """Return an image (H, W, 3) uint8 at a size, smoothed where it shrinks, with its pixels visible where it grows."""
    resampling = Image.Resampling.LANCZOS if size[0] < image.shape[1] else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(image).resize(size, resampling))


@cache
def font(size: int = FONT_SIZE) -> ImageFont.FreeTypeFont:
    """Return matplotlib's own font."""
    from matplotlib import font_manager  # which a run's start need not import

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def drawable(text: str) -> str:
    """Return a text in one line that fonts can draw: bytes of names that are not UTF-8 become question marks."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def fit(text: str, width: float, size: int = FONT_SIZE) -> str:
    """Return a text as it can be drawn, cut with an ellipsis where it is wider than `width` pixels.

    A value in parentheses at its end stays: "pred. T-sh… (80%)".
    """
    text = drawable(text)
    if font(size).getlength(text) <= width:
        return text
    name, value = re.fullmatch(r"(.*?)( \([^()]*\))?", text).group(1, 2)  # type: ignore[union-attr]
    fitting = (f"{name[:end].rstrip()}…{value or ''}" for end in range(len(name) - 1, 0, -1))
    return next((short for short in fitting if font(size).getlength(short) <= width), "…")


def wrap(words: Sequence[str], width: float) -> list[str]:
    """Return words in lines at most `width` pixels wide."""
    lines: list[str] = []
    for word in words:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font().getlength(drawable(longer)) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [fit(line, width) for line in lines]


def legend_width(name: str) -> float:
    return LINE_HEIGHT + GAP + font().getlength(name) + MARGIN


def wrap_legend(legend: Sequence[tuple[str, Color]], width: float) -> list[list[tuple[str, Color]]]:
    """Return the entries of a legend in rows at most `width` pixels wide."""
    rows: list[list[tuple[str, Color]]] = []
    for name, color in legend:
        entry = fit(name, width - LINE_HEIGHT - GAP), color
        used = sum(legend_width(other) for other, _ in rows[-1]) if rows else math.inf
        if used + legend_width(entry[0]) - MARGIN <= width:
            rows[-1].append(entry)
        else:
            rows.append([entry])
    return rows
