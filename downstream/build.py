"""From a configuration to what dense tasks share."""

from torch import nn
from yacs.config import CfgNode

from downstream.backbone import MLLABackbone, TimmBackbone


def build_backbone(config: CfgNode) -> nn.Module:
    """The backbone that MODEL.* describes, with fresh weights: four maps at strides 4, 8, 16, 32, `widths` wide.

    Raises:
        ValueError: sizes that do not fit each other, or a timm model that does not exist or has no such maps.
    """
    kind, _, name = config.MODEL.TYPE.partition(":")
    if kind == "timm":
        return TimmBackbone(name, drop_path_rate=config.MODEL.DROP_PATH_RATE)
    sizes = config.MODEL.MLLA
    return MLLABackbone(
        patch_size=sizes.PATCH_SIZE,
        in_chans=sizes.IN_CHANS,
        embed_dim=sizes.EMBED_DIM,
        depths=sizes.DEPTHS,
        num_heads=sizes.NUM_HEADS,
        mlp_ratio=sizes.MLP_RATIO,
        qkv_bias=sizes.QKV_BIAS,
        drop_rate=config.MODEL.DROP_RATE,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
        ape=sizes.APE,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT,
    )
