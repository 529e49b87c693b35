import pytest

from downstream.transforms import fitting_size


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((400, 1000), 800, 1333, (533, 1333)),  # the long side decides
        ((427, 640), 800, 1333, (800, 1199)),
        ((100, 100), 800, 1333, (800, 800)),
        ((683, 512), 512, 2048, (683, 512)),
        ((256, 341), 512, 2048, (512, 682)),
        ((300, 2000), 512, 2048, (307, 2048)),  # the long side limits
        ((1000, 1000), 512, 2048, (512, 512)),
        ((512, 683), 256, 1024, (256, 342)),  # 341.5 rounds up
        ((683, 512), 256, 1024, (342, 256)),
        ((1, 5000), 800, 1333, (1, 1333)),  # never 0
    ],
)
def test_fitting_size(size: tuple[int, int], short: int, long: int, expected: tuple[int, int]) -> None:
    assert fitting_size(size, short=short, long=long) == expected
