"""The tiles of the MLP in inference."""

import pytest

mlp = pytest.importorskip("models.kernels.triton.mlp", exc_type=ImportError)


@pytest.mark.parametrize(
    ("channels", "tiles"),
    [
        *((96, (64, 32)), (65, (64, 16)), (48, (32, 16))),
        *((128, (128, 0)), (112, (128, 0)), (24, (32, 0)), (17, (32, 0)), (16, (16, 0)), (3, (16, 0))),
    ],
)
def test_two_tiles_where_one_would_have_idle_lanes(channels: int, tiles: tuple[int, int]) -> None:
    assert mlp.split_width(channels) == tiles
