from collections import Counter

import numpy as np
import pytest

from data.errors import DataError
from data.sources.digits import Digits


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


def test_a_subset_of_the_digits() -> None:
    whole, some = Digits("train", 8), Digits("train", 8, ["7", "2"])
    assert some.classes == ["2", "7"]
    positions = [i for i, label in enumerate(whole.labels) if label in (2, 7)]
    assert some.labels == [(2, 7).index(whole.labels[i]) for i in positions]
    assert all(some.images[i].tobytes() == whole.images[p].tobytes() for i, p in enumerate(positions))
    assert len(Digits("val", 8, ["0"])) == 36
    with pytest.raises(DataError, match=r"DATA\.CLASSES: no digit is called ten, x; there are \['0', '1'"):
        Digits("val", 8, ["x", "1", "ten"])
