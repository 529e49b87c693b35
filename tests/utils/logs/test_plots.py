"""Curves of a run: the best epoch is marked, and scores near 100% can be told apart."""

from collections.abc import Iterator
from typing import Any

import pytest
from matplotlib import pyplot as plt

from utils.logs.plots import Panel, draw_alone, panel_svg

ACCURACY = Panel("accuracy, %", {"acc1": "model", "ema_acc1": "EMA"}, is_score=True)


@pytest.fixture
def axis() -> Iterator[Any]:
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def records(model: list[float], ema: list[float | None]) -> list[dict[str, Any]]:
    return [
        {"epoch": epoch, "acc1": a, "ema_acc1": b, "loss": 100 - a}
        for epoch, (a, b) in enumerate(zip(model, ema, strict=True))
    ]


def test_the_last_of_equally_good_epochs_is_marked(axis: Any) -> None:
    draw_alone(axis, records([10, 30, 20, 30, 25], [None, 5, 6, 7, 8]), ACCURACY)
    stars = [tuple(line.get_xydata()[0]) for line in axis.lines if line.get_marker() == "*"]
    assert stars == [(4, 30), (5, 8)]
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["model: best 30.00, epoch 4", "EMA: best 8.00, epoch 5"]


def test_losses_have_no_best_epoch(axis: Any) -> None:
    draw_alone(axis, records([10, 95, 96, 97], [10, 95, 96, 97]), Panel("loss", {"loss": "validation"}))
    assert len(axis.lines) == 1
    assert axis.get_legend() is None
    assert axis.get_ylim()[1] > 90


@pytest.mark.parametrize(
    ("scores", "lowest"),
    [
        ([10, 50, *[97.0] * 4, 98, 98.5, 99, 99.5], 90),  # the first two are left out
        ([10, 20, 30, 40, 45, 50, 55, 60, 65, 70], 0),  # not near 100
        ([90, 91, 92, 93, 94, 95, 96, 97, 98, 99], 85),  # all can be told apart
        ([99.0] * 10, 90),  # all equal
        ([95.0], 89),
    ],
)
def test_scores_near_100_have_an_axis_of_their_range(axis: Any, scores: list[float], lowest: float) -> None:
    draw_alone(axis, records(scores, [None] * len(scores)), ACCURACY)
    bottom, top = axis.get_ylim()
    assert lowest < bottom < lowest + 10
    assert top > max(scores)
    assert bool(axis.get_ylabel()) == (scores[0] < bottom)


def test_the_same_metrics_give_the_same_bytes() -> None:
    run = records([10, 95, 96, 97], [None, 95, 96, 97])
    assert panel_svg(run, ACCURACY, dark=True) == panel_svg(run, ACCURACY, dark=True)
