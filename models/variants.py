"""MLLA-T, -S and -B: their sizes, what the paper reports of them, and their registration in timm."""

from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from models.mlla import MLLA


class PaperFigures(NamedTuple):
    """What the paper prints for a model at 224x224: millions of parameters and GMACs ("FLOPs")."""

    parameters_m: float
    gmacs: float


MLLA_FIGURES = {
    "mlla_tiny": PaperFigures(25, 4.2),
    "mlla_small": PaperFigures(43, 7.3),
    "mlla_base": PaperFigures(96, 16.2),
}

DEFAULT_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "min_input_size": (3, 32, 32),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.conv1.conv",
    "classifier": "head",
    "license": "mit",
}
default_cfgs = generate_default_cfgs({name: dict(DEFAULT_CFG) for name in MLLA_FIGURES})


def create_variant(name: str, pretrained: bool, sizes: dict[str, Any], **kwargs: Any) -> MLLA:
    if kwargs.get("features_only"):
        raise ValueError(f"{name} has no features_only; downstream.backbone.MLLABackbone gives the stages' maps")
    return build_model_with_cfg(MLLA, name, pretrained, **{**sizes, **kwargs})


@register_model
def mlla_tiny(pretrained: bool = False, **kwargs: Any) -> MLLA:
    """MLLA-T: 24.4 M parameters, 4.1 GMACs at 224x224. Keywords are those of `MLLA`."""
    sizes = {"embed_dim": 64, "depths": (2, 4, 8, 4), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.2}
    return create_variant("mlla_tiny", pretrained, sizes, **kwargs)


@register_model
def mlla_small(pretrained: bool = False, **kwargs: Any) -> MLLA:
    """MLLA-S: 43.0 M parameters, 7.2 GMACs at 224x224. Keywords are those of `MLLA`."""
    sizes = {"embed_dim": 64, "depths": (3, 6, 21, 6), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.3}
    return create_variant("mlla_small", pretrained, sizes, **kwargs)


@register_model
def mlla_base(pretrained: bool = False, **kwargs: Any) -> MLLA:
    """MLLA-B: 96.0 M parameters, 16.1 GMACs at 224x224. Keywords are those of `MLLA`."""
    sizes = {"embed_dim": 96, "depths": (3, 6, 21, 6), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.5}
    return create_variant("mlla_base", pretrained, sizes, **kwargs)
