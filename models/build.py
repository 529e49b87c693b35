"""Build a model from a configuration."""

from typing import TYPE_CHECKING, Any

from torch import nn

from models.kernels.fused_modules import use_kernels
from models.kernels.scan import use_scan_kernels
from models.mlla import MLLA
from models.unified.block import Switches
from models.unified.linear_vit import LinearViT

if TYPE_CHECKING:
    from yacs.config import CfgNode

KNOWN_CLASSES = {"digits": 10, "imagenet": 1000, "folder": 1000}


def build_model(config: "CfgNode", num_classes: int | None = None) -> nn.Module:
    """Build the model that MODEL.* describes, with initial weights; with TRAIN.FREEZE only its classifier learns.

    Args:
        config: the whole configuration.
        num_classes: classes of the dataset; by default MODEL.NUM_CLASSES, or else 10 for digits and 1000 for others.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown MODEL.TYPE.
    """
    builders = {"mlla": build_mlla, "linear_vit": build_linear_vit}
    if config.MODEL.TYPE not in builders:
        raise ValueError(f"MODEL.TYPE {config.MODEL.TYPE!r}: known are {', '.join(builders)}")
    num_classes = num_classes or config.MODEL.NUM_CLASSES or KNOWN_CLASSES.get(config.DATA.DATASET, 1000)
    model = builders[config.MODEL.TYPE](config, num_classes)
    if config.TRAIN.FREEZE:
        model.freeze_backbone()
    return model


def build_mlla(config: "CfgNode", num_classes: int) -> MLLA:
    model = MLLA(img_size=config.DATA.IMG_SIZE, num_classes=num_classes, **mlla_sizes(config))
    use_kernels(model, config.MODEL.KERNELS)
    return model


def mlla_sizes(config: "CfgNode") -> dict[str, Any]:
    """Return the keywords that the classifier and the dense backbone share."""
    sizes = config.MODEL.MLLA
    return {
        "patch_size": sizes.PATCH_SIZE,
        "in_chans": sizes.IN_CHANS,
        "embed_dim": sizes.EMBED_DIM,
        "depths": sizes.DEPTHS,
        "num_heads": sizes.NUM_HEADS,
        "mlp_ratio": sizes.MLP_RATIO,
        "qkv_bias": sizes.QKV_BIAS,
        "ape": sizes.APE,
        "drop_rate": config.MODEL.DROP_RATE,
        "drop_path_rate": config.MODEL.DROP_PATH_RATE,
        "use_checkpoint": config.TRAIN.USE_CHECKPOINT,
    }


def build_linear_vit(config: "CfgNode", num_classes: int) -> LinearViT:
    sizes = config.MODEL.LINEAR_VIT
    switches = Switches(
        input_gate=sizes.INPUT_GATE,
        forget_gate=sizes.FORGET_GATE,
        shortcut=sizes.SHORTCUT,
        normalize=sizes.NORMALISE,
        single_head=sizes.SINGLE_HEAD,
        block=sizes.BLOCK,
        ape=sizes.APE,
        lepe=sizes.LEPE,
        cpe=sizes.CPE,
        rope=sizes.ROPE,
    )
    model = LinearViT(
        img_size=config.DATA.IMG_SIZE,
        patch_size=sizes.PATCH_SIZE,
        in_chans=sizes.IN_CHANS,
        num_classes=num_classes,
        embed_dim=sizes.EMBED_DIM,
        depths=sizes.DEPTHS,
        num_heads=sizes.NUM_HEADS,
        mlp_ratio=sizes.MLP_RATIO,
        qkv_bias=sizes.QKV_BIAS,
        drop_rate=config.MODEL.DROP_RATE,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT,
        switches=switches,
    )
    use_scan_kernels(model, config.MODEL.KERNELS)
    return model


def input_channels(config: "CfgNode") -> int:
    """Return the channels of the images that the model of this configuration takes."""
    return config.MODEL[config.MODEL.TYPE.upper()].IN_CHANS
