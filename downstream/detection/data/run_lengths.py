"""Checks of COCO's run-length encoded masks, many at a time."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A run is a number in digits of 5 bits, the lowest first: "P" to "o" where another digit follows,
# "0" to "O" for the last.
COMPRESSED = re.compile("(?:[P-o]{0,6}[0-O])+")
CHUNK = 1000  # masks at a time


class Totals(NamedTuple):
    """Pixels that the runs of N masks cover, (N,) int64; -1 for a mask with a run of negative length.

    Attributes:
        pixels: of all runs; right if it is height times width.
        area: of the runs within the object.
    """

    pixels: np.ndarray
    area: np.ndarray


def totals_of(texts: Sequence[str]) -> Totals:
    """Return the totals of one or more compressed counts, each of which must match COMPRESSED."""
    totals = [totals_of_chunk(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
    return Totals(np.concatenate([part.pixels for part in totals]), np.concatenate([part.area for part in totals]))


def totals_of_chunk(texts: Sequence[str]) -> Totals:
    digits = np.frombuffer("".join(texts).encode("ascii"), dtype=np.uint8) - np.uint8(ord("0"))
    last = np.flatnonzero(digits < 32)  # the last digit of each number
    first = np.concatenate(([0], last[:-1] + 1))
    values = -((digits[last] & 16) // 16).astype(np.int64)  # two's complement
    for place in range(int((last - first).max()), -1, -1):
        longer = np.flatnonzero(last - first >= place) if place else slice(None)
        values[longer] = values[longer] << 5 | digits[first[longer] + place] & 31

    text_ends = np.cumsum([len(text) for text in texts])
    counts = np.diff(np.searchsorted(last, text_ends), prepend=0)  # numbers of each text
    starts = np.cumsum(counts) - counts
    index = np.arange(len(values)) - np.repeat(starts, counts)  # within the text
    is_object = index % 2 == 1  # runs alternate, and the first is outside
    # From the fourth on, a number is the difference to the run before the last one: two sums, of every other number.
    sums = np.empty_like(values)
    for parity in (0, 1):
        np.cumsum(values[parity::2], out=sums[parity::2])
    before = np.concatenate(([0], sums))[starts]
    runs = sums - np.where(is_object, np.repeat(before, counts), np.repeat(sums[starts], counts))
    runs[starts] = values[starts]
    is_valid = np.minimum.reduceat(runs, starts) >= 0
    pixels = np.add.reduceat(runs, starts)
    area = np.add.reduceat(np.where(is_object, runs, 0), starts)
    return Totals(np.where(is_valid, pixels, -1), np.where(is_valid, area, -1))
