"""MLLA as a backbone for OpenMMLab's detectors and segmentors; nothing else needs this file.

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
    """`MLLABackbone` that can start from the weights file of an ImageNet classifier, `pretrained`."""

    def __init__(self, pretrained: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pretrained = pretrained

    def init_weights(self) -> None:
        """Load the pretrained weights; OpenMMLab's runner calls this once before training."""
        if self.pretrained:
            load_pretrained(self, self.pretrained)
