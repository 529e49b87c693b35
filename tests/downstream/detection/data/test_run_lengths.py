import numpy as np
from faster_coco_eval import mask as rle

from downstream.detection.data.run_lengths import CHUNK, COMPRESSED, totals_of


def random_mask(rng: np.random.Generator, number: int) -> np.ndarray:
    """Noise of any density, one run only, or a rectangle with long runs on a large image."""
    if number % 4 == 0:
        return np.full(rng.integers(1, 90, 2), number // 4 % 2, dtype=np.uint8)
    if number % 4 == 1:
        mask = np.zeros((700, 900), dtype=np.uint8)
        mask[rng.integers(300) : 301 + rng.integers(399), rng.integers(400) : 401 + rng.integers(499)] = 1
        return mask
    return (rng.random(rng.integers(1, 90, 2)) < rng.random() ** 2).astype(np.uint8)


def test_totals_match_the_masks() -> None:
    rng = np.random.default_rng(0)
    masks = [random_mask(rng, number) for number in range(200)]
    texts = [rle.encode(np.asfortranarray(mask))["counts"].decode() for mask in masks]
    assert all(map(COMPRESSED.fullmatch, texts))
    times = CHUNK // len(texts) + 2  # more than one chunk
    totals = totals_of(texts * times)
    assert totals.pixels.tolist() == [mask.size for mask in masks] * times
    assert totals.area.tolist() == [int(mask.sum()) for mask in masks] * times


def test_negative_runs_are_marked() -> None:
    """As numbers: 4, 8; 4, -1, 5; 1, 2, 3 and the difference -3 to the 2, which makes a run of -1."""
    totals = totals_of(["48", "4O5", "123M"])
    assert totals.pixels.tolist() == [12, -1, -1]
    assert totals.area.tolist() == [8, -1, -1]


def test_damaged_counts_do_not_match() -> None:
    for text in ("", "0P", "~", "\n", "0 0", "é", "P" * 7 + "0"):
        assert not COMPRESSED.fullmatch(text)
