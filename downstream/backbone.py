"""MLLA as the backbone of a dense predictor: four maps at strides 4, 8, 16 and 32."""

from typing import Any

from torch import Tensor, nn

from models import MLLA


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
