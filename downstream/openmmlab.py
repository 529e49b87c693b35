"""MLLA as a backbone of OpenMMLab's detectors and segmenters, for those who have them; nothing else needs this file.

custom_imports = dict(imports=["downstream.openmmlab"])
backbone = dict(_delete_=True, type="MLLA", pretrained="mlla_t.pth")
model = dict(backbone=backbone, neck=dict(in_channels=[64, 128, 256, 512]))
"""

from typing import Any

from mmengine.registry import MODELS

from downstream.backbone import MLLABackbone
from utils.checkpoint.weights import load_pretrained


@MODELS.register_module(name="MLLA")
class OpenMMLabMLLA(MLLABackbone):
    """`MLLABackbone` with its keywords, and `pretrained`: an ImageNet classifier's file to start from."""

    def __init__(self, pretrained: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pretrained = pretrained

    def init_weights(self) -> None:
        """Called once by OpenMMLab's runner, before training."""
        if self.pretrained:
            load_pretrained(self, self.pretrained)
