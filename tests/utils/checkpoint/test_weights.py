"""Weights in files of every kind, and into models that they fit more or less."""

import argparse
import logging
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from downstream.backbone import MLLABackbone
from models import MLLA
from tests.helpers import MICRO, random_values
from utils.checkpoint.weight_sets import find_weight_sets
from utils.checkpoint.weights import (
    check_classes,
    load_pretrained,
    load_weights,
    read_state_dict,
    read_weights,
)
from utils.checkpoint.weights_file import CheckpointError
from utils.logs.logger import logger

SMALL = {**MICRO, "img_size": 32, "embed_dim": 8, "num_heads": (1, 1, 1, 1)}


@pytest.fixture(autouse=True)
def _log_is_seen(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="mlla")


def small(**changes: Any) -> MLLA:
    return MLLA(**{**SMALL, "num_classes": 10, **changes})


def with_rotations(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**weights, "layers.0.blocks.0.attn.rope.rotations": torch.zeros(8, 8, 4, 2)}


def official_checkpoint(model: nn.Module, ema: nn.Module) -> dict[str, Any]:
    """Return what the official training script saves, with a yacs node and NumPy numbers."""
    config = CfgNode({"MODEL": {"NAME": "mlla_tiny"}, "DATA": {"IMG_SIZE": 32}})
    config.freeze()
    optimizer = torch.optim.AdamW(model.parameters())
    return {
        "model": OrderedDict(with_rotations(model.state_dict())),
        "state_dict_ema": OrderedDict(with_rotations(ema.state_dict())),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [0.1, 0.1], "t_in_epochs": False},
        "max_accuracy": np.float64(81.0),
        "max_accuracy_e": 82.0,
        "epoch": 7,
        "config": config,
        "args": argparse.Namespace(local_rank=0),
    }


def same(weights: dict[str, torch.Tensor] | None, model: nn.Module) -> bool:
    own = model.state_dict()
    return weights is not None and all(weights[name].equal(value) for name, value in own.items())


def test_weights_in_every_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ema, path = small(), small(), tmp_path / "w.pth"
    weights = model.state_dict()
    kinds: dict[str, Any] = {
        "official": official_checkpoint(model, ema),
        "official release": {"model": with_rotations(weights)},
        "timm": {"arch": "mlla_tiny", "state_dict": weights, "args": argparse.Namespace(opt="adamw")},
        "bare": weights,
        "DataParallel": {"model": {f"module.{name}": value for name, value in weights.items()}},
        "compiled DDP": {f"module._orig_mod.{name}": value for name, value in weights.items()},
        "Lightning": {"state_dict": {f"model.{n}": v for n, v in weights.items()}, "pytorch-lightning_version": "2.6"},
        "parameters": {name: nn.Parameter(v) if v.is_floating_point() else v for name, v in weights.items()},
    }
    for name, content in kinds.items():
        torch.save(content, path)
        loaded = read_weights(path)
        assert same(loaded.model, model), name
        assert same(loaded.ema, ema) == (name == "official"), name
        new = small()
        load_weights(new, loaded.model or {}, path)
        assert same(new.state_dict(), model), name
    torch.save({"state_dict_ema": weights}, path)
    loaded = read_weights(path)
    assert (loaded.model, loaded.classes) == (None, None)
    assert same(loaded.ema, model)


def test_content_without_weights(tmp_path: Path) -> None:
    for odd in ([torch.zeros(3)], {1: torch.zeros(3)}, {"a": 1}, "text", {}):
        assert find_weight_sets({"model": odd}).model is None
    weights = {"a": torch.tensor(1.0), "module.b": torch.tensor(2.0)}
    assert find_weight_sets(weights).model == weights  # not every name has the prefix
    assert find_weight_sets({"model": weights}).ema is None
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"no weights under model, state_dict, .*; found epoch"):
        read_weights(tmp_path / "none.pth")


def test_misfits_are_counted_and_listed() -> None:
    model, other = small(), small(embed_dim=16)
    with pytest.raises(CheckpointError, match=r"w.pth: does not fit the model. \d+ of another shape: ") as caught:
        load_weights(model, other.state_dict(), "w.pth")
    text = str(caught.value)
    assert "patch_embed.conv1.conv.weight (8, 3, 3, 3) where the model has (4, 3, 3, 3), " in text
    assert len(text) < 300
    shapes = [[value.shape for value in each.state_dict().values()] for each in (model, other)]
    num_other = sum(a != b for a, b in zip(*shapes, strict=True))
    assert f". {num_other} of another shape" in text
    assert "\n" not in text
    weights = dict(model.state_dict())
    weights["extra"] = weights.pop("norm.weight")
    with pytest.raises(CheckpointError, match=r"1 missing: norm.weight; 1 not in the model: extra\. Use the --cfg"):
        load_weights(model, weights, "w.pth")


def test_an_unknown_prefix_is_named() -> None:
    """Also where the file has two sets, of which only the user knows which one is meant."""
    model = small()
    weights = {f"student.{name}": value for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"Its names have the prefix 'student\.'; save the weights") as caught:
        load_weights(model, weights, "w.pth")
    assert "--cfg" not in str(caught.value)
    weights |= {f"teacher.{name}": value for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"the prefix 'student\.' or 'teacher\.'; save the weights of one"):
        load_weights(model, weights, "w.pth")


def test_a_refused_file_does_not_change_the_model() -> None:
    model, weights = small(), dict(small().state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del weights["norm.weight"]
    with pytest.raises(CheckpointError):
        load_weights(model, weights, "w.pth")
    assert same(before, model)


def test_a_head_with_another_number_of_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, other, path = small(), small(num_classes=7), tmp_path / "w.pth"
    own_head = model.head.weight.detach().clone()
    torch.save({"model": with_rotations(other.state_dict())}, path)
    with pytest.raises(CheckpointError, match=r"2 of another shape: head.weight"):
        load_weights(model, read_weights(path).model or {}, path)
    load_pretrained(model, path)
    assert model.head.weight.equal(own_head)
    assert model.norm.weight.equal(other.norm.weight)
    assert "the file has 7 classes, the data 10" in caplog.text
    assert "re-initialized: head" in caplog.text


def test_pretraining_prefers_the_ema(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, ema, path = small(), small(), tmp_path / "w.pth"
    torch.save({**official_checkpoint(model, ema), "classes": [str(i) for i in range(10)]}, path)
    new = small()
    load_pretrained(new, path, [*"012345678", "ten"])
    assert same(new.state_dict(), ema)
    assert "(EMA)" in caplog.text
    assert "1 of 10 differ: 9 was 9, is ten" in caplog.text
    assert "re-initialized" not in caplog.text


def test_a_file_without_a_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, path = small(), tmp_path / "w.pth"
    torch.save({name: v for name, v in model.state_dict().items() if not name.startswith("head")}, path)
    new = small()
    head = new.head.weight.detach().clone()
    load_pretrained(new, path)
    assert new.head.weight.equal(head)
    assert new.norm.weight.equal(model.norm.weight)
    assert "re-initialized: head" in caplog.text
    torch.save({name: v for name, v in model.state_dict().items() if not name.startswith("norm")}, path)
    with pytest.raises(CheckpointError, match=r"2 missing: norm.weight, norm.bias"):
        load_pretrained(small(), path)


def test_a_detectors_backbone_into_a_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone, path = MLLABackbone(**SMALL), tmp_path / "w.pth"
    weights = {f"backbone.{name}": value for name, value in with_rotations(backbone.state_dict()).items()}
    torch.save({"state_dict": {**weights, "neck.conv.weight": torch.zeros(3)}}, path)
    new = small()
    load_pretrained(new, path)
    assert same({**new.state_dict(), **{n: v for n, v in backbone.state_dict().items() if "norm" in n[:5]}}, backbone)
    assert "re-initialized: head, norm" in caplog.text
    assert "in the file and not used: norm0, norm1, norm2, norm3" in caplog.text


def test_a_classifier_into_a_dense_backbone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, path, backbone = small(), tmp_path / "w.pth", MLLABackbone(**SMALL)
    torch.save({"model": with_rotations(model.state_dict())}, path)
    load_pretrained(backbone, path)
    assert backbone.layers[3].blocks[0].out_proj.weight.equal(model.layers[3].blocks[0].out_proj.weight)
    assert "re-initialized: norm0, norm1, norm2, norm3" in caplog.text
    assert "in the file and not used: head, norm" in caplog.text
    broken = {name: value for name, value in model.state_dict().items() if "layers.2.blocks.1.norm2" not in name}
    torch.save(broken, path)
    with pytest.raises(CheckpointError, match=r"2 missing: layers.2.blocks.1.norm2.weight"):
        load_pretrained(backbone, path)


def test_a_position_table_of_another_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The model of the larger size computes the same as the smaller one on larger images."""
    model, larger, path = small(ape=True), small(ape=True, img_size=64), tmp_path / "w.pth"
    nn.init.normal_(model.absolute_pos_embed)
    torch.save(model.state_dict(), path)
    load_pretrained(larger, path)
    assert "position table resized from 8x8 to 16x16 tokens" in caplog.text
    images = random_values(0, 1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(larger.eval()(images), model.eval()(images), rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"1 of another shape: absolute_pos_embed \(1, 64, 8\) where the model"):
        load_weights(larger, model.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"1 not in the model: absolute_pos_embed"):
        load_pretrained(small(), path)
    torch.save(small().state_dict(), path)
    with pytest.raises(CheckpointError, match=r"1 missing: absolute_pos_embed"):
        load_pretrained(small(ape=True), path)


class Unknown:
    """Class of a package that is not installed where the file is read."""


def test_state_dicts_of_detectors(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    weights = {"backbone.a": torch.tensor(1.0), "backbone.layers.0.blocks.0.attn.rope.rotations": torch.zeros(2)}
    ema = {"backbone.a": torch.tensor(2.0)}
    content = {"meta": {"unknown": Unknown(), "CLASSES": ("cat",)}, "state_dict": weights, "optimizer": {}}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"it holds \S*test_weights\.Unknown"):
        read_weights(path)
    assert read_state_dict(path) == {"backbone.a": torch.tensor(1.0)}
    torch.save({**content, "ema_state_dict": ema}, path)
    assert read_state_dict(path) == ema
    torch.save({**content, "ema_state_dict": ema, "scores": {"model": 3.0, "EMA": 2.0}}, path)
    assert read_state_dict(path, ema=True) == ema
    assert read_state_dict(path) == {"backbone.a": torch.tensor(1.0)}
    assert read_state_dict(path, ema=False) == {"backbone.a": torch.tensor(1.0)}
    torch.save({"meta": 1}, path)
    with pytest.raises(CheckpointError, match="found meta"):
        read_state_dict(path)


def test_classes(caplog: pytest.LogCaptureFixture) -> None:
    check_classes(None, ["a"], "w.pth")
    check_classes(["a", "b"], ["a", "b"], "w.pth")
    assert not caplog.text
    check_classes([*"abcdef"], [*"abcxyz"], "w.pth")
    assert "3 of 6 differ: 3 was d, is x, 4 was e, is y, 5 was f, is z" in caplog.text
    many = [str(i) for i in range(1000)]
    with pytest.raises(
        CheckpointError, match=re.escape("trained on 2 classes (a, b), the data has 1000 (0, 1, 2, ...")
    ):
        check_classes(["a", "b"], many, "w.pth")
    with pytest.raises(CheckpointError):
        check_classes(many, ["a", "b"], "w.pth", num_outputs=3)
    caplog.clear()
    check_classes(many, ["0", "1"], "w.pth", num_outputs=1000)
    assert not caplog.text
    check_classes(many, ["0", "b"], "w.pth", num_outputs=1000)
    assert "1 of 2 differ: 1 was 1, is b" in caplog.text
