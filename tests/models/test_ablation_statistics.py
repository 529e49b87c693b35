import pytest

from models.ablation_statistics import Difference, differences, holm, rank_correlation


def test_differences_from_the_first_row() -> None:
    """Welch's test by hand: 1 +- 0.5 * sqrt(2 / 3) * t with 4 degrees of freedom, of which the 97.5% point is 2.776."""
    found = differences({"a": [90.0, 90.5, 91.0], "b": [91.0, 91.5, 92.0], "same": [90.0, 90.5, 91.0]})
    margin = 2.7764 * 0.5 * (2 / 3) ** 0.5
    assert found["b"][:3] == pytest.approx((1.0, 1.0 - margin, 1.0 + margin), abs=1e-3)
    assert found["b"].p == pytest.approx(2 * 0.0705, abs=1e-3)  # twice, for two rows
    assert found["same"].p == 1
    assert list(found) == ["b", "same"]


def test_cells_of_a_difference() -> None:
    assert Difference(1.0, 0.5, 1.5, 0.0004).cells() == ["+1.00 (+0.50 to +1.50)", "< 0.001"]
    assert Difference(-0.1, -0.5, 0.3, 0.0312).cells()[1] == "0.031"


def test_rows_without_spread() -> None:
    found = differences({"a": [90.0, 90.0], "b": [91.0, 91.0], "c": [90.0, 90.0]})
    assert found == {"b": Difference(1.0, 1.0, 1.0, 0.0), "c": Difference(0.0, 0.0, 0.0, 1.0)}


def test_holm() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]


def test_rank_correlation() -> None:
    paper = [1.0, 2.0, 3.0]
    assert rank_correlation(paper, [[10.0, 10.1], [20.0, 20.1], [30.0, 30.1]], num_resamples=20) == (1.0, 1.0, 1.0)
    value, low, high = rank_correlation(paper, [[10.0, 10.1], [20.0, 31.0], [20.2, 30.0]], num_resamples=50)
    assert value == 0.5
    assert (low, high) == (0.5, 1.0)
