"""Statistics of the ablation study: each row against the first one, and the agreement with the paper's order."""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NUM_RESAMPLES = 2000
LEVEL = 0.95  # of all intervals


class Difference(NamedTuple):
    """Difference of a row's mean from the first row's, in points, its confidence interval, and its p-value.

    The p-value is Welch's t-test's, two-sided, corrected for the number of rows by Holm's method.
    """

    mean: float
    low: float
    high: float
    p: float

    def cells(self) -> list[str]:
        """Return the cells of a table: the difference with its interval, and the p-value."""
        interval = f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"
        return [interval, "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"]


class RankCorrelation(NamedTuple):
    """Spearman's rank correlation and its bootstrap interval over seeds."""

    value: float
    low: float
    high: float


def differences(scores: Mapping[str, Sequence[float]]) -> dict[str, Difference]:
    """Compare every row with the first one.

    Args:
        scores: accuracies by row, in percent, one per seed; at least two each.
    """
    from scipy.stats import ttest_ind

    (_, first), *others = scores.items()
    found = {}
    for name, values in others:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rows without spread
            test: Any = ttest_ind(values, first, equal_var=False)
            interval = test.confidence_interval(LEVEL)
        mean = statistics.mean(values) - statistics.mean(first)
        # Without any spread the test has no value.
        limits = (mean, mean) if math.isnan(interval.low) else (float(interval.low), float(interval.high))
        p = float(mean == 0) if math.isnan(test.pvalue) else float(test.pvalue)
        found[name] = Difference(mean, *limits, p)
    corrected = holm([difference.p for difference in found.values()])
    return {name: row._replace(p=p) for (name, row), p in zip(found.items(), corrected, strict=True)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method, in the same order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def rank_correlation(
    paper: Sequence[float], scores: Sequence[Sequence[float]], *, num_resamples: int = NUM_RESAMPLES
) -> RankCorrelation:
    """Return the rank correlation of the rows' means with the paper's accuracies.

    Its interval is from rows whose seeds are drawn again with replacement: it is about other seeds, not about other
    rows.
    """
    from scipy.stats import spearmanr

    def correlation(means: Sequence[float]) -> float:
        result: Any = spearmanr(paper, means)
        return float(result.statistic)

    rng = np.random.default_rng(0)
    resampled = [
        correlation([float(np.mean(rng.choice(values, len(values)))) for values in scores])
        for _ in range(num_resamples)
    ]
    low, high = np.nanquantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return RankCorrelation(correlation([statistics.mean(values) for values in scores]), float(low), float(high))
