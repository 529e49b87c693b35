"""From a configuration to a model."""

from torch import nn
from yacs.config import CfgNode

from models.mlla import MLLA

KNOWN_CLASSES = {"digits": 10, "imagenet": 1000, "folder": 1000}


def build_model(config: CfgNode, num_classes: int | None = None) -> nn.Module:
    """Make the model that MODEL.* describes, with fresh weights; with TRAIN.FREEZE only its classifier learns.

    Args:
        config: the whole configuration.
        num_classes: classes of the data set; without it MODEL.NUM_CLASSES, or else 10 for digits, 1000 for others.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown MODEL.TYPE.
    """
    if config.MODEL.TYPE != "mlla":
        raise ValueError(f"MODEL.TYPE {config.MODEL.TYPE!r}: known is 'mlla'")
    sizes = config.MODEL.MLLA
    model = MLLA(
        img_size=config.DATA.IMG_SIZE,
        patch_size=sizes.PATCH_SIZE,
        in_chans=sizes.IN_CHANS,
        num_classes=num_classes or config.MODEL.NUM_CLASSES or KNOWN_CLASSES[config.DATA.DATASET],
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
    if config.TRAIN.FREEZE:
        model.freeze_backbone()
    return model
