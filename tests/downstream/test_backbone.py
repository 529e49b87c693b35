from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from downstream.backbone import MLLABackbone, TimmBackbone
from models import MLLA
from tests.helpers import GOLDEN, MICRO, fill_weights, random_values
from utils.checkpoint.weights import load_pretrained
from utils.config.errors import ConfigError


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


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "swin_tiny_patch4_window7_224"])
def test_timm_models_as_backbones(name: str) -> None:
    """NHWC and NCHW ones, ones that round sizes up and down, and one whose first map has stride 2."""
    backbone = TimmBackbone(name).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 100, 132))
    grids = [(25, 33), (13, 17), (7, 9), (4, 5)]
    assert [tuple(x.shape) for x in maps] == [(1, c, *grid) for c, grid in zip(backbone.widths, grids, strict=True)]


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "swin_tiny_patch4_window7_224"])
def test_imagenet_weights_of_timm_fit_its_backbones(tmp_path: Path, name: str) -> None:
    classifier, backbone = timm.create_model(name), TimmBackbone(name)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    load_pretrained(backbone.body, tmp_path / "weights.pth")
    source = classifier.state_dict()
    assert all(torch.equal(value, source[key]) for key, value in backbone.body.state_dict().items())


def test_every_parameter_of_a_timm_backbone_has_a_gradient() -> None:
    backbone = TimmBackbone("test_convnext")
    sum(x.square().mean() for x in backbone(torch.randn(1, 3, 64, 64))).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "message"), [("convnext_tinny", "did you mean timm:convnext_tiny"), ("vit_tiny_patch16_224", "no maps at")]
)
def test_unsuitable_timm_models_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TimmBackbone(name)
    assert caught.value.key == "MODEL.TYPE"
