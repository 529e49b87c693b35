from collections import Counter

import numpy as np
import pytest

from data.digits import Digits


def test_digits_split_is_stratified_fixed_and_disjoint() -> None:
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1437, 360)
    assert set(Counter(val.labels).values()) == {36}
    assert val.labels[:10] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    image = train.read(0)
    assert (image.size, image.mode) == ((32, 32), "RGB")
    # Every image is in one split: their mean brightness is that of scikit-learn's whole set.
    total = sum(float(np.asarray(image).mean()) for image in train.images + val.images) / 1797
    assert total == pytest.approx(4.884 * 255 / 16, rel=0.02)
