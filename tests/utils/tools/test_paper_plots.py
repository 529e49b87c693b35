"""Maps in colors: each uses the range of its values, and its color bar shows that range."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from utils.tools.paper_plots import draw_map, plot_maps


@pytest.fixture
def figure() -> Iterator[Any]:
    figure = plt.figure()
    yield figure
    plt.close(figure)


@pytest.mark.parametrize(
    ("values", "color_map", "scale", "bar"),
    [
        ([0.5, 1, 2], "viridis", (0.5, 2), (0.5, 2)),
        ([1.0240, 1.0241, 1.0244], "viridis", (1.0240, 1.0244), (1.0240, 1.0244)),
        ([-1, 0, 3], "RdBu_r", (-3, 3), (-1, 3)),
        ([-2, -1, -1], "RdBu_r", (-2, 2), (-2, -1)),
        ([0, 0, 0], "viridis", (-0.5, 0.5), (-0.5, 0.5)),
        ([-1, -1, -1], "RdBu_r", (-1.5, 1.5), (-1.5, -0.5)),
    ],
)
def test_colors_span_the_values(
    figure: Any, values: list[float], color_map: str, scale: tuple[float, float], bar: tuple[float, float]
) -> None:
    axis = figure.add_subplot()
    draw_map(figure, axis, np.array([values]))
    (shown,) = axis.images
    assert shown.get_cmap().name == color_map
    assert shown.get_clim() == pytest.approx(scale)
    assert figure.axes[1].get_ylim() == pytest.approx(bar)


def test_pictures_keep_their_colors(tmp_path: Path) -> None:
    maps = np.arange(256.0).reshape(1, 16, 16)
    plot_maps(np.zeros((1, 8, 8, 3)), [("map", maps)], title="a map", picture=tmp_path / "map.png", mark=(0.5, 0.5))
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.mode in ("RGB", "RGBA")  # no palette
        colors = {color for _, color in picture.convert("RGB").getcolors(10**6)}  # type: ignore[union-attr]
    used = (np.array(plt.get_cmap("viridis").colors) * 255).astype(int)  # type: ignore[attr-defined]
    assert {tuple(color) for color in used.tolist()} <= colors
