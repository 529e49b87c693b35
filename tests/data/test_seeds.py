"""Seeds of a batch against NumPy's SeedSequence."""

import numpy as np
import pytest

from data.seeds import sample_seeds


@pytest.mark.parametrize("largest", [5, 2**31, 2**32, 2**32 + 1, 2**70])
def test_seeds_are_those_of_numpy(largest: int) -> None:
    rng = np.random.default_rng(0)
    rows = [(largest - 1, int(rng.integers(300)), int(rng.integers(10**7))) for _ in range(50)] + [(0, 0, 0)]
    assert sample_seeds(rows) == [np.random.SeedSequence(row).generate_state(4).tolist() for row in rows]
    assert sample_seeds([]) == []
