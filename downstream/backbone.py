"""Backbones of dense predictors: MLLA, or a timm model, as four maps at strides 4, 8, 16 and 32."""

import difflib
from typing import Any

import timm
import torch
from torch import Tensor, nn

from models import MLLA
from models.layers import pad_to_multiple

STRIDES = (4, 8, 16, 32)


class MLLABackbone(MLLA):
    """Images (B, in_chans, H, W), any H and W, to each stage's output before downsampling, through its own LayerNorm.

    Takes the keywords of `MLLA` but num_classes. An ImageNet checkpoint fits but for its `head` and `norm`, and for
    `norm0`, `norm1`, ... here, which start fresh.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(num_classes=0, **kwargs)
        for i, width in enumerate(self.widths):
            self.add_module(f"norm{i}", nn.LayerNorm(width))
        del self.norm  # the classifier's

    def forward(self, images: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Maps (B, embed_dim * 2^i, ceil(H / s), ceil(W / s)) with s = 4 * 2^i, i = 0, 1, ..."""
        maps = []
        x = self.embed(images)
        for i, stage in enumerate(self.stages):
            output, x = stage(x)  # (B, H, W, C), and (B, H / 2, W / 2, 2 C) for the next
            maps.append(self.get_submodule(f"norm{i}")(output).permute(0, 3, 1, 2))  # (B, C, H, W)
        return maps


class TimmBackbone(nn.Module):
    """A pyramid classifier of timm as a backbone: images (B, 3, H, W), any H and W, to four maps through LayerNorms of
    their own, `norm0` to `norm3`, as MLLA's. The network is `body`, with timm's names, so that ImageNet weights fit.

    Args:
        name: timm's name of a model with maps at strides 4, 8, 16 and 32, such as swin_tiny_patch4_window7_224.
        drop_path_rate: stochastic depth of the last block.

    Raises:
        ValueError: timm has no such model, or not with such maps.
    """

    def __init__(self, name: str, *, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=1)
            raise ValueError(f"timm:{name}: timm has no such model{f'; did you mean {near[0]}?' if near else ''}")
        # Swin insists on one image size unless told otherwise; other models do not know the word.
        options: dict[str, Any] = {"strict_img_size": False} if name.startswith("swin") else {}
        body: Any = timm.create_model(name, num_classes=0, drop_path_rate=drop_path_rate, **options)
        info = getattr(body, "feature_info", [])
        stages = getattr(info, "info", info)
        reductions = [stage["reduction"] for stage in stages]
        if not hasattr(body, "forward_intermediates") or not set(STRIDES) <= set(reductions):
            raise ValueError(f"timm:{name}: has no maps at strides {STRIDES}; take a model such as convnext_tiny")
        chosen = [reductions.index(stride) for stride in STRIDES]
        self.widths = [stages[index]["num_chs"] for index in chosen]
        self.indices = body.prune_intermediate_layers(chosen, prune_norm=True, prune_head=True)
        if hasattr(body, "head"):  # timm before 1.0.31 leaves ConvNeXt's norm in it
            body.head = nn.Identity()
        self.body = body
        for i, width in enumerate(self.widths):
            self.add_module(f"norm{i}", nn.LayerNorm(width))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, widths[i], ceil(H / s), ceil(W / s)) with s = 4 * 2^i."""
        height, width = images.shape[2:]
        # Models round odd sizes up or down as they please; padded, they all agree.
        x = pad_to_multiple(images, STRIDES[-1]).contiguous(memory_format=torch.channels_last)
        outputs = self.body.forward_intermediates(
            x, indices=self.indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        maps = []
        for i, (stride, output) in enumerate(zip(STRIDES, outputs, strict=True)):
            output = output[:, :, : -(-height // stride), : -(-width // stride)].permute(0, 2, 3, 1)  # (B, H, W, C)
            maps.append(self.get_submodule(f"norm{i}")(output).permute(0, 3, 1, 2))  # (B, C, H, W)
        return maps
