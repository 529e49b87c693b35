"""From a configuration to what dense tasks share."""

from torch import nn
from yacs.config import CfgNode

from downstream.backbone import MLLABackbone, TimmBackbone
from models.build import mlla_sizes


def build_backbone(config: CfgNode) -> nn.Module:
    """The backbone that MODEL.* describes, with fresh weights: four maps at strides 4, 8, 16, 32, `widths` wide.

    Raises:
        ValueError: sizes that do not fit each other, or a timm model that does not exist or has no such maps.
    """
    kind, _, name = config.MODEL.TYPE.partition(":")
    if kind == "timm":
        return TimmBackbone(name, drop_path_rate=config.MODEL.DROP_PATH_RATE)
    return MLLABackbone(**mlla_sizes(config))
