"""Backbones of dense predictors: MLLA or a timm model, with four maps at strides 4, 8, 16 and 32."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from models import MLLA
from models.layers import pad_to_multiple
from utils.checkpoint.download import check_timm_model
from utils.config.errors import ConfigError

STRIDES = (4, 8, 16, 32)


class MLLABackbone(MLLA):
    """MLLA from images (B, in_chans, H, W) of any size to each stage's output, normalized, before downsampling.

    Takes the arguments of `MLLA` except num_classes. ImageNet weights fit except their `head` and `norm`; the
    LayerNorms of the outputs, `norm0`, `norm1`, ..., are newly initialized.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(num_classes=0, **kwargs)
        for i, width in enumerate(self.widths):
            self.add_module(f"norm{i}", nn.LayerNorm(width))
        del self.norm  # the classifier's

    def forward(self, images: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Return maps (B, embed_dim * 2^i, ceil(H / s), ceil(W / s)) with s = 4 * 2^i, i = 0, 1, ..."""
        maps = []
        x = self.embed(images)
        for i, stage in enumerate(self.stages):
            output, x = stage(x)  # (B, H, W, C), and (B, H / 2, W / 2, 2 C) for the next
            maps.append(self.get_submodule(f"norm{i}")(output).permute(0, 3, 1, 2))  # (B, C, H, W)
        return maps


class TimmBackbone(nn.Module):
    """Pyramid classifier of timm, from images (B, 3, H, W) of any size to four maps.

    The maps pass LayerNorms of their own, `norm0` to `norm3`, as in `MLLABackbone`. The network is `body`, with timm's
    names, so that ImageNet weights fit.

    Args:
        name: timm's name of a model with maps at strides 4, 8, 16 and 32, such as swin_tiny_patch4_window7_224.
        drop_path_rate: stochastic depth rate of the last block.

    Raises:
        ConfigError: timm has no such model, or the model has no such maps.
    """

    def __init__(self, name: str, *, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        check_timm_model("MODEL.TYPE", name)
        # Swin takes one image size only unless told otherwise; other models lack this argument.
        options: dict[str, Any] = {"strict_img_size": False} if name.startswith("swin") else {}
        body: Any = timm.create_model(name, num_classes=0, drop_path_rate=drop_path_rate, **options)
        info = getattr(body, "feature_info", [])
        stages = getattr(info, "info", info)
        reductions = [stage["reduction"] for stage in stages]
        if not hasattr(body, "forward_intermediates") or not set(STRIDES) <= set(reductions):
            raise ConfigError(
                f"MODEL.TYPE timm:{name}: has no maps at strides {STRIDES}; take a model such as convnext_tiny",
                key="MODEL.TYPE",
            )
        chosen = [reductions.index(stride) for stride in STRIDES]
        self.widths = [stages[index]["num_chs"] for index in chosen]
        self.indices = body.prune_intermediate_layers(chosen, prune_norm=True, prune_head=True)
        if hasattr(body, "head"):  # timm before 1.0.31 leaves ConvNeXt's norm in it
            body.head = nn.Identity()
        self.body = body
        for i, width in enumerate(self.widths):
            self.add_module(f"norm{i}", nn.LayerNorm(width))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return maps (B, widths[i], ceil(H / s), ceil(W / s)) with s = 4 * 2^i."""
        height, width = images.shape[2:]
        # Some models round odd sizes up, others down; with padding they all agree.
        x = pad_to_multiple(images, STRIDES[-1]).contiguous(memory_format=torch.channels_last)
        outputs = self.body.forward_intermediates(
            x, indices=self.indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        maps = []
        for i, (stride, output) in enumerate(zip(STRIDES, outputs, strict=True)):
            output = output[:, :, : -(-height // stride), : -(-width // stride)].permute(0, 2, 3, 1)  # (B, H, W, C)
            maps.append(self.get_submodule(f"norm{i}")(output).permute(0, 3, 1, 2))  # (B, C, H, W)
        return maps
