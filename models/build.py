"""Build a model from a configuration."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from models.kernels.fused_modules import use_kernels
from models.kernels.scan import use_scan_kernels
from models.mlla import MLLA
from models.timm_classifier import create_timm_classifier
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
        ConfigError: timm cannot make its model with these settings, or its backbone cannot be frozen.
        ValueError: sizes that do not fit each other, or an unknown MODEL.TYPE.
    """
    builders: dict[str, Callable[..., Any]] = {"mlla": build_mlla, "linear_vit": build_linear_vit, "timm": build_timm}
    kind = config.MODEL.TYPE.partition(":")[0]
    if kind not in builders:
        raise ValueError(f"MODEL.TYPE {config.MODEL.TYPE!r}: known are {', '.join(builders)}")
    num_classes = num_classes or config.MODEL.NUM_CLASSES or KNOWN_CLASSES.get(config.DATA.DATASET, 1000)
    model = builders[kind](config, num_classes)
    if config.TRAIN.FREEZE:
        with config_errors("TRAIN.FREEZE", f"TRAIN.FREEZE with {config.MODEL.TYPE}"):
            model.freeze_backbone()
    return model


@contextmanager
def config_errors(key: str, start: str) -> Iterator[None]:
    """Raise ValueErrors as ConfigErrors about a key, whose messages begin with `start`."""
    from utils.config.errors import ConfigError  # not at the top: torch.hub needs nothing but `models`

    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{start}: {error}", key=key) from error


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


def build_timm(config: "CfgNode", num_classes: int) -> nn.Module:
    with config_errors("MODEL.TYPE", f"MODEL.TYPE {config.MODEL.TYPE}"):
        return create_timm_classifier(
            config.MODEL.TYPE.removeprefix("timm:"),
            num_classes=num_classes,
            img_size=config.DATA.IMG_SIZE,
            drop_rate=config.MODEL.DROP_RATE,
            drop_path_rate=config.MODEL.DROP_PATH_RATE,
            use_checkpoint=config.TRAIN.USE_CHECKPOINT,
            args=config.MODEL.TIMM.ARGS,
        )


def input_channels(config: "CfgNode") -> int:
    """Return the channels of the images that the model of this configuration takes."""
    return 3 if config.MODEL.TYPE.startswith("timm:") else config.MODEL[config.MODEL.TYPE.upper()].IN_CHANS
