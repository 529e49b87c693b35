"""Building blocks of MLLA. Tokens flow as (B, H, W, C): seen as (B, C, H, W) that is channels_last, so no copies."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DepthwiseConv(nn.Conv2d):
    """3x3 depthwise convolution with bias on (B, C, H, W)."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__(channels, channels, kernel_size=3, stride=stride, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # oneDNN's 16-bit depthwise backward takes 2 to 10 times as long as its float32 one.
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.to(self.weight.dtype)).to(x.dtype)
        return super().forward(x)


class TokenConv(DepthwiseConv):
    """3x3 depthwise convolution with bias on tokens (B, H, W, C) -> (B, H, W, C)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the branch x (B, ...) of an image with probability `drop_prob`.

    The rate is a tensor, so that torch.compile makes one graph for blocks with different rates.
    """

    keep_prob: Tensor

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.register_buffer("keep_prob", torch.tensor(1 - drop_prob), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.draw(x) if self.training else x

    def draw(self, x: Tensor) -> Tensor:
        """Return the branch's scale for each image, (B, 1, ...): 0 or 1 / keep_prob in training, else 1."""
        if not self.training:
            return x.new_ones(x.shape[0], *[1] * (x.ndim - 1))
        keep = self.keep_prob
        uniform = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device)
        return ((uniform < keep) / keep).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.drop_prob:.3f}"


class ConvLayer(nn.Module):
    """Convolution on (B, C, H, W), then batch norm if `norm`, then ReLU if `activation`."""

    def __init__(self, conv: nn.Conv2d, *, norm: bool = True, activation: bool = True) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity()
        self.act = nn.ReLU() if activation else nn.Identity()  # in place, it would break backward hooks on the norm

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Stem(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, ceil(H / 4), ceil(W / 4), embed_dim)."""

    is_region = True  # torch.compile makes one graph of it

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        half = embed_dim // 2
        self.conv1 = ConvLayer(nn.Conv2d(in_chans, half, 3, stride=2, padding=1, bias=False))
        self.conv2 = nn.Sequential(
            ConvLayer(nn.Conv2d(half, half, 3, padding=1, bias=False)),
            ConvLayer(nn.Conv2d(half, half, 3, padding=1, bias=False), activation=False),
        )
        self.conv3 = nn.Sequential(
            ConvLayer(nn.Conv2d(half, embed_dim * 4, 3, stride=2, padding=1, bias=False)),
            ConvLayer(nn.Conv2d(embed_dim * 4, embed_dim, 1, bias=False), activation=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = channels_last(pad_to_multiple(images, 4))
        x = self.conv1(x)  # (B, E / 2, H / 2, W / 2)
        x = x + self.conv2(x)
        return self.conv3(x).permute(0, 2, 3, 1)  # (B, H / 4, W / 4, E)


class Downsample(nn.Module):
    """Halve the token grid and double the width: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C)."""

    is_region = True  # torch.compile makes one graph of it

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = 2 * channels * expansion
        self.conv = nn.Sequential(
            ConvLayer(nn.Conv2d(channels, hidden, 1), norm=False),
            ConvLayer(DepthwiseConv(hidden, stride=2), norm=False),
            ConvLayer(nn.Conv2d(hidden, 2 * channels, 1), activation=False),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = pad_to_multiple(tokens.permute(0, 3, 1, 2), 2)  # (B, C, H, W), both even
        return self.conv(x).permute(0, 2, 3, 1)  # (B, H / 2, W / 2, 2 C)


def channels_last(x: Tensor) -> Tensor:
    """Return x (B, C, H, W) in channels_last memory, also under torch.func.vmap, which refuses memory formats."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad x (B, C, H, W) with zeros at the right and the bottom to multiples of `multiple`."""
    pad_bottom, pad_right = -x.shape[2] % multiple, -x.shape[3] % multiple
    if pad_bottom or pad_right:
        x = F.pad(x, (0, pad_right, 0, pad_bottom))
    return x
