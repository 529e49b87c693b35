"""Feature pyramid (Lin et al., arXiv 1612.03144): from maps at strides 4 to 32 to five maps of one width."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class NamedConv(nn.Module):
    """Convolution under the name `conv`, as in the published weights."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FPN(nn.Module):
    """Feature pyramid from maps (B, widths[i], H_i, W_i) to maps (B, width, H_i, W_i) and one more.

    The extra map takes every other row and column of the last one.
    """

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(NamedConv(nn.Conv2d(channels, width, 1)) for channels in widths)
        self.fpn_convs = nn.ModuleList(NamedConv(nn.Conv2d(width, width, 3, padding=1)) for _ in widths)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        merged = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = add_upsampled(merged[i - 1], merged[i])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=True)]
        return [*outputs, outputs[-1][:, :, ::2, ::2]]  # (B, width, ceil(H / 2), ceil(W / 2))


def add_upsampled(fine: Tensor, coarse: Tensor) -> Tensor:
    """Return fine (B, C, H, W) plus the nearest cells of coarse (B, C, h, w), in fine's dtype.

    Twice the size is the rule, and takes one pass over the tensors; autocast would interpolate in float32.
    """
    (height, width), (coarse_height, coarse_width) = fine.shape[2:], coarse.shape[2:]
    if (height, width) != (2 * coarse_height, 2 * coarse_width):
        return fine + F.interpolate(coarse, (height, width), mode="nearest")
    blocks = fine.permute(0, 2, 3, 1).unflatten(2, (coarse_width, 2)).unflatten(1, (coarse_height, 2))
    total = blocks + coarse.permute(0, 2, 3, 1)[:, :, None, :, None]  # (B, h, 2, w, 2, C), so that gradients are NHWC
    return total.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
