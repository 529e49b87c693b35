import numpy as np
import torch
from conftest import GOLDEN, MICRO, fill_weights, random_values

from downstream.backbone import MLLABackbone
from models import MLLA


def test_golden_dense() -> None:
    golden = np.load(GOLDEN / "mlla_micro_dense_96x160.npz")
    model = MLLABackbone(**MICRO).eval()
    fill_weights(model)
    with torch.no_grad():
        maps = model(random_values(3, 1, 3, 96, 160))
    for i, x in enumerate(maps):
        assert x.shape == tuple(golden[f"shape{i}"])
        np.testing.assert_allclose(x.mean(dim=(2, 3)), golden[f"mean{i}"], atol=1e-4)
        np.testing.assert_allclose(x[..., :2, :2], golden[f"corner{i}"], atol=1e-4)
        np.testing.assert_allclose(x[..., -1, -1], golden[f"end{i}"], atol=1e-4)


def test_odd_sizes_round_up() -> None:
    maps = MLLABackbone(**MICRO).eval()(torch.randn(2, 3, 33, 50))
    assert [x.shape for x in maps] == [(2, 32, 9, 13), (2, 64, 5, 7), (2, 128, 3, 4), (2, 256, 2, 2)]


def test_imagenet_weights_fit_but_for_norms_and_head() -> None:
    classifier, backbone = MLLA(**MICRO, num_classes=10), MLLABackbone(**MICRO)
    missing, unexpected = backbone.load_state_dict(classifier.state_dict(), strict=False)
    assert set(missing) == {f"norm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    assert set(unexpected) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
