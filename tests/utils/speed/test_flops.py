import pytest
import timm
import torch
from torch import nn

from models import MLLA, PAPER_PROFILES
from tests.helpers import MICRO
from utils.speed.flops import profile, profile_table, training_flops


def test_counts_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Linear(8, 5)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[0](self.conv(x))
            return self.layers[1](x.mean(dim=(2, 3)))

    parts = {part.name: part[1:] for part in profile(Net(), 16)}
    assert parts == {
        "conv": (216, 216 * 256),
        "layers.0": (80, 72 * 256),
        "layers.1": (45, 40),
        "total": (341, 216 * 256 + 72 * 256 + 40),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gmacs"), [("mlla_tiny", 4.131), ("mlla_small", 7.249), ("mlla_base", 16.114)])
def test_released_sizes(name: str, gmacs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    *parts, total = profile(model, 224)
    assert total.macs / 1e9 == pytest.approx(gmacs, rel=1e-3)
    assert sum(part.macs for part in parts) == total.macs
    assert sum(part.parameters for part in parts) == total.parameters
    assert total.macs / 1e9 == pytest.approx(PAPER_PROFILES[name].gmacs, rel=0.02)
    assert total.parameters / 1e6 == pytest.approx(PAPER_PROFILES[name].parameters_m, rel=0.025)


def test_the_model_is_not_changed() -> None:
    model = MLLA(**MICRO, num_classes=10).train()
    profile(model, 64)
    assert model.training
    assert not any(p.is_meta for p in model.parameters())


def test_size_may_be_height_and_width() -> None:
    """Twice as many pixels, twice the work, but for the head, which sees one token."""
    model = MLLA(**MICRO, num_classes=10)
    square, wide = ({part.name: part.macs for part in profile(model, size)} for size in (64, (64, 128)))
    assert wide["layers.1"] == 2 * square["layers.1"]
    assert wide["head"] == square["head"]


def test_table() -> None:
    table = profile_table(profile(MLLA(**MICRO, num_classes=10), 64), paper=(25, 4.2)).splitlines()
    assert [line.split()[0] for line in table] == [
        *("part", "patch_embed", "layers.0", "layers.1", "layers.2", "layers.3", "norm", "head", "total", "paper")
    ]
    assert table[-1].split()[1:] == ["25", "M", "4.2"]


@pytest.mark.parametrize(("parameters_m", "gmacs"), [(25.0, 4.2), (43.0, 7.3), (96.0, 16.2), (25.6, 4.1), (28.6, 4.5)])
def test_training_flops_follow_from_the_parameters(parameters_m: float, gmacs: float) -> None:
    """MLLA-T, S, B in the paper's table 3; ResNet-50; ConvNeXt-T."""
    assert training_flops(int(parameters_m * 1e6), (224, 224), 10) == pytest.approx(60e9 * gmacs, rel=0.25)
