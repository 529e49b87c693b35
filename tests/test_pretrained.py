import logging
from pathlib import Path

import pytest
import timm
import torch
from conftest import MICRO

from downstream.backbone import MLLABackbone, TimmBackbone
from downstream.pretrained import load_backbone
from models import MLLA
from utils.checkpoint import CheckpointError


def save(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


def test_a_classifier_fits_but_for_head_and_norm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    classifier, backbone = MLLA(**MICRO, num_classes=10), MLLABackbone(**MICRO)
    fresh = backbone.norm0.weight.data.fill_(0.5).clone()
    weights = classifier.state_dict()
    weights["layers.0.blocks.0.attn.rope.rotations"] = torch.zeros(16, 16, 16, 2)  # as official files have it
    logging.getLogger("mlla").propagate = True
    with caplog.at_level(logging.INFO, logger="mlla"):
        load_backbone(backbone, save(tmp_path / "c.pth", {"model": weights}))
    own = backbone.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in classifier.state_dict().items() if name in own)
    assert torch.equal(backbone.norm0.weight, fresh)
    assert "not used: head, norm; start fresh: norm0, norm1, norm2, norm3" in caplog.text


def test_the_average_goes_before_the_model(tmp_path: Path) -> None:
    model, average, backbone = MLLA(**MICRO), MLLA(**MICRO), MLLABackbone(**MICRO)
    content = {"model": model.state_dict(), "state_dict_ema": average.state_dict()}
    load_backbone(backbone, save(tmp_path / "c.pth", content))
    name = "layers.0.blocks.0.in_proj.weight"
    assert torch.equal(backbone.state_dict()[name], average.state_dict()[name])


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "swin_tiny_patch4_window7_224"])
def test_timm_weights_fit_timm_backbones(tmp_path: Path, name: str) -> None:
    classifier, backbone = timm.create_model(name), TimmBackbone(name)
    load_backbone(backbone, save(tmp_path / "t.pth", classifier.state_dict()))
    source = classifier.state_dict()
    assert all(torch.equal(value, source[key]) for key, value in backbone.body.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_other_weights_are_refused(tmp_path: Path, change: str) -> None:
    weights = MLLA(**MICRO).state_dict()
    name = "layers.3.blocks.0.out_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "shape":
        weights[name] = weights[name][:5]
    else:
        weights["layers.3.blocks.9.out_proj.weight"] = weights[name]
    with pytest.raises(CheckpointError, match=r"1 keys do not fit: layers\.3\.blocks") as caught:
        load_backbone(MLLABackbone(**MICRO), save(tmp_path / "c.pth", {"model": weights}))
    assert "\n" not in str(caught.value)
