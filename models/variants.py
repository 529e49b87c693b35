"""MLLA-T, -S and -B: their sizes, their profiles in the paper, and their registration in timm."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import is_scriptable
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from torch import nn

from models.kernels.fused_modules import use_kernels
from models.layers import Downsample, Stem
from models.mlla import MLLA, MLLABlock
from models.rope import position_tables
from models.timm_interface import checkpoint_filter_fn, not_scriptable


class PaperProfile(NamedTuple):
    """The paper's millions of parameters and GMACs ("FLOPs") of a model at 224x224."""

    parameters_m: float
    gmacs: float


MLLA_PROFILES = {
    "mlla_tiny": PaperProfile(25, 4.2),
    "mlla_small": PaperProfile(43, 7.3),
    "mlla_base": PaperProfile(96, 16.2),
}

# The released ImageNet-1K classifiers; timm stores each under the file name beside its URL, which has none.
RELEASED = {
    "tiny": ("https://cloud.tsinghua.edu.cn/f/7a19712877cb4242889c/?dl=1", "mlla-t_b28db327.pth"),
    "small": ("https://cloud.tsinghua.edu.cn/f/0e5d0b1409d540aaa80c/?dl=1", "mlla-s_904aa273.pth"),
    "base": ("https://cloud.tsinghua.edu.cn/f/91c85c5a1061496d8796/?dl=1", "mlla-b_3cbd8b6f.pth"),
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 64, "depths": (2, 4, 8, 4), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.2},
    "small": {"embed_dim": 64, "depths": (3, 6, 21, 6), "num_heads": (2, 4, 8, 16), "drop_path_rate": 0.3},
    "base": {"embed_dim": 96, "depths": (3, 6, 21, 6), "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.5},
}


def pretrained_cfg(size: str) -> dict[str, Any]:
    """Return timm's description of a released classifier: where its weights are, and how to prepare its images."""
    return {
        "url": RELEASED[size],
        "custom_load": True,  # by MLLA.load_pretrained
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1.conv",
        "classifier": "head",
        "license": "other",  # the released files state none
        "origin_url": "https://github.com/LeapLabTHU/MLLA",
        "paper_ids": "arXiv:2405.16605",
        "paper_name": "Demystify Mamba in Vision: A Linear Attention Perspective",
    }


# The last version of the paper calls MLLA MILA.
default_cfgs = generate_default_cfgs(
    {f"{family}_{size}.in1k": pretrained_cfg(size) for family in ("mlla", "mila") for size in SIZES}
)

# torch.fx takes these as single operations, since what they do depends on sizes, devices and dtypes.
for module in (Stem, MLLABlock, Downsample):
    register_notrace_module(module)
register_notrace_function(position_tables)


def create_variant(
    name: str,
    pretrained: bool,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    kernels: str = "auto",
    **kwargs: Any,
) -> nn.Module:
    """Make the model of one of these names as timm.create_model does.

    Args:
        name: such as mlla_tiny.
        pretrained: load the released weights.
        device, dtype: of the parameters.
        kernels: "auto" (Triton kernels where they can run), "triton" or "torch", see `use_kernels`.
        kwargs: keywords of timm, and of `MLLA`, which override the model's sizes.

    Raises:
        ValueError: timm asks for a scriptable model; these can be traced and exported, but not scripted.
    """
    if is_scriptable():
        raise ValueError(not_scriptable(name))
    kwargs = {**SIZES[name.split("_")[1]], **kwargs}
    with torch.device(device) if device is not None else nullcontext():
        model = build_model_with_cfg(
            MLLA,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": tuple(range(len(kwargs["depths"]))), "feature_cls": "getter"},
            **kwargs,
        )
    return use_kernels(model if dtype is None else model.to(dtype), kernels)


@register_model
def mlla_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MLLA-T: 24.4 M parameters, 4.1 GMACs at 224x224. Keywords are those of `create_variant` and `MLLA`."""
    return create_variant("mlla_tiny", pretrained, **kwargs)


@register_model
def mlla_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MLLA-S: 43.0 M parameters, 7.2 GMACs at 224x224. Keywords are those of `create_variant` and `MLLA`."""
    return create_variant("mlla_small", pretrained, **kwargs)


@register_model
def mlla_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MLLA-B: 96.0 M parameters, 16.1 GMACs at 224x224. Keywords are those of `create_variant` and `MLLA`."""
    return create_variant("mlla_base", pretrained, **kwargs)


@register_model
def mila_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """mlla_tiny under its name in the paper's last version."""
    return create_variant("mila_tiny", pretrained, **kwargs)


@register_model
def mila_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """mlla_small under its name in the paper's last version."""
    return create_variant("mila_small", pretrained, **kwargs)


@register_model
def mila_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """mlla_base under its name in the paper's last version."""
    return create_variant("mila_base", pretrained, **kwargs)
