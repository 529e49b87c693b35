"""UperNet (Xiao et al., ECCV 2018, arXiv 1807.10221): pyramid pooling and a feature pyramid over a backbone's maps.

Names of parameters are those of the published segmentors. All resizing is bilinear with align_corners=False.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL_SIZES = (1, 2, 3, 6)
AUXILIARY_STAGE = 2  # the third of four
Function = Callable[..., tuple[Tensor, ...]]


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, ReLU; keeps height and width."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))  # in place, it would break backward hooks on bn


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, C, H, W) to (B, C, *size), bilinear."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if x.is_cuda and x.requires_grad and torch.is_grad_enabled():
        return ResizeByMatmul.apply(x, tuple(size))
    return interpolate(x, tuple(size))


def interpolate(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ResizeByMatmul(torch.autograd.Function):
    """`interpolate`, whose gradient is two matrix products.

    PyTorch's kernel adds up the gradient by atomic operations in its dtype, slowly and in no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        ctx.sizes = x.shape[2:]
        return interpolate(x, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (batch, channels, out_height, out_width), (height, width) = gradient.shape, ctx.sizes
        rows = resize_weights(height, out_height, gradient)
        is_square = (height, out_height) == (width, out_width)
        columns = rows if is_square else resize_weights(width, out_width, gradient)
        x = gradient.permute(0, 2, 3, 1).reshape(batch, out_height, -1)  # (B, H', W' C)
        x = torch.bmm(rows.expand(batch, -1, -1), x).view(-1, out_width, channels)  # (B H, W', C)
        x = torch.bmm(columns.expand(len(x), -1, -1), x)  # (B H, W, C)
        return x.view(batch, height, width, channels).permute(0, 3, 1, 2), None


def resize_weights(size: int, out_size: int, like: Tensor) -> Tensor:
    """Return the share of each of `size` positions in each of `out_size` resized ones, (size, out_size)."""
    one_hot = torch.eye(size, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return F.interpolate(one_hot[None], out_size, mode="linear", align_corners=False)[0].to(like.dtype)


class Classifier(nn.Module):
    """Last layers of both heads: channel dropout, then a 1x1 convolution to classes."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))


class UPerHead(Classifier):
    """Head from four maps at strides 4, 8, 16, 32 to logits (B, num_classes, H / 4, W / 4)."""

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(channels, num_classes, dropout)
        *lower, top = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvNormAct(top, channels, 1)) for size in POOL_SIZES
        )
        self.bottleneck = ConvNormAct(top + len(POOL_SIZES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(width, channels, 1) for width in lower)
        self.fpn_convs = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in lower)
        self.fpn_bottleneck = ConvNormAct(len(in_channels) * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=False)]
        levels.append(self.pool_pyramid(maps[-1]))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[2:])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)] + levels[-1:]
        outputs = [resize(x, outputs[0].shape[2:]) for x in outputs]
        return self.classify(self.fpn_bottleneck(torch.cat(outputs, dim=1)))  # (B, num_classes, H / 4, W / 4)

    def pool_pyramid(self, x: Tensor) -> Tensor:
        """Merge the last map (B, C, H, W) with its means over 1, 4, 9 and 36 cells: (B, channels, H, W)."""
        pooled = [resize(module(x), x.shape[2:]) for module in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class FCNHead(Classifier):
    """Auxiliary head from one map to logits (B, num_classes, H, W); it only helps to train the backbone."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(channels, num_classes, dropout)
        self.convs = nn.ModuleList([ConvNormAct(in_channels, channels, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return self.classify(x)


class SegmentationLogits(NamedTuple):
    """Outputs of a segmentor in training, coarser than the image; see `losses.segmentation_loss`."""

    decode: Tensor  # (B, classes, H / 4, W / 4)
    auxiliary: Tensor | None  # (B, classes, H / 16, W / 16)


class UperNet(nn.Module):
    """Segmentor from normalized images (B, 3, H, W) of any size to logits of classes.

    In evaluation mode logits are (B, num_classes, H, W), resized to the images. In training mode they are
    `SegmentationLogits`, at the heads' own sizes, for the loss to resize.

    Args:
        backbone: module from images to maps at strides 4, 8, 16 and 32, (B, C_i, ceil(H / s), ceil(W / s)).
        in_channels: the widths C_i of those maps.
        num_classes: number of classes.
        channels: width of the head; 512 in the published models.
        auxiliary_channels: width of the auxiliary head; 0: no auxiliary head.
        dropout: probability that a channel is dropped before each classifier.
    """

    def __init__(
        self,
        backbone: nn.Module,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        auxiliary_channels: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.decode_head = UPerHead(in_channels, channels, num_classes, dropout)
        self.auxiliary_head = None
        if auxiliary_channels:
            self.auxiliary_head = FCNHead(in_channels[AUXILIARY_STAGE], auxiliary_channels, num_classes, dropout)

    def forward(self, images: Tensor) -> Tensor | SegmentationLogits:
        if not self.training:
            (logits,) = self.coarse_logits(images)
            return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)  # (B, classes, H, W)
        maps = self.backbone(images)
        logits = self.decode_head(maps)
        auxiliary = None if self.auxiliary_head is None else self.auxiliary_head(maps[AUXILIARY_STAGE])
        return SegmentationLogits(logits, auxiliary)

    def coarse_logits(self, images: Tensor) -> tuple[Tensor]:
        """Return logits (B, num_classes, H / 4, W / 4)."""
        return (self.decode_head(self.backbone(images)),)

    def record_inference(self, make: Callable[[Function], Function]) -> None:
        """Replace `coarse_logits` by what `make` makes of it; CUDA graphs may take its place."""
        self.coarse_logits = make(self.coarse_logits)  # type: ignore[method-assign, assignment]
