import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from models import MLLA
from tests.helpers import MICRO


class Registry:
    """The part of mmengine's registry that a registration uses."""

    def __init__(self) -> None:
        self.modules: dict[str, type] = {}

    def register_module(self, *, name: str) -> Any:
        return lambda module: self.modules.setdefault(name, module)


def test_the_registered_backbone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry = ModuleType("mmengine.registry")
    registry.MODELS = Registry()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mmengine", ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, "mmengine.registry", registry)
    monkeypatch.delitem(sys.modules, "downstream.openmmlab", raising=False)
    importlib.import_module("downstream.openmmlab")
    monkeypatch.delitem(sys.modules, "downstream.openmmlab")
    classifier = MLLA(**MICRO)
    torch.save({"model": classifier.state_dict()}, tmp_path / "mlla.pth")
    backbone = registry.MODELS.modules["MLLA"](pretrained=str(tmp_path / "mlla.pth"), **MICRO)
    backbone.init_weights()
    name = "layers.3.blocks.0.in_proj.weight"
    assert torch.equal(backbone.state_dict()[name], classifier.state_dict()[name])
    assert [x.shape[1] for x in backbone(torch.randn(1, 3, 64, 64))] == [32, 64, 128, 256]
