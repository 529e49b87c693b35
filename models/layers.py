"""Building blocks of MLLA. Tokens flow as (B, H, W, C): seen as (B, C, H, W) that is channels_last, so no copies."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import dispatch
from models.kernels.matmul import add_product

# The official classifier stores rotary tables for its one image size; here they follow from the grid.
DERIVED_KEY_SUFFIX = "attn.rope.rotations"
RGB, WIDEST_STEM = 3, 128  # channels of the images that the stem's kernel reads, and at most of its outputs


def ops() -> Any:
    """The kernels, which need Triton: imported where they are used."""
    from models.kernels import ops

    return ops


def segments() -> Any:
    """Stretches of the network with gradients of their own, of these kernels."""

    return segments


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

    later_bias: Tensor | None

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        # For inference: that of the projection whose result will be added to what `conv_norm` gives.
        self.register_buffer("later_bias", None, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask what computes with these for a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class AddedLinear(nn.Linear):
    """For inference: x + linear(y) with the sum in the matrix product. Its bias is in x already (`later_bias`)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, H, W, C), which is overwritten, plus the projection of y (B, H, W, K)."""
        if x.dtype != self.weight.dtype or not x.is_contiguous():
            return x + F.linear(y, self.weight)
        add_product(x, y.to(x.dtype), self.weight)
        return x


class DropPath(nn.Module):
    """Stochastic depth: in training, leave the branch x (B, ...) out of an image with probability `drop_prob`.

    The rate lies in a tensor, so that torch.compile makes one graph for blocks with different rates.
    """

    keep_prob: Tensor

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.register_buffer("keep_prob", torch.tensor(1 - drop_prob), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.draw(x) if self.training else x

    def draw(self, x: Tensor) -> Tensor:
        """What to multiply x (B, ...) by, (B, 1, ...): 0 or 1 / keep_prob for each image in training, else 1."""
        if not self.training:
            return x.new_ones(x.shape[0], *[1] * (x.ndim - 1))
        keep = self.keep_prob
        uniform = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device)
        return ((uniform < keep) / keep).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.drop_prob:.3f}"


class ConvLayer(nn.Module):
    """A convolution, then batch norm if `norm`, then ReLU if `activation`, on (B, C, H, W)."""

    def __init__(self, conv: nn.Conv2d, *, norm: bool = True, activation: bool = True) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity()
        self.act = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def computed_dtype(x: Tensor) -> torch.dtype:
    """In what a convolution of x is computed: its own dtype, or autocast's (where a kernel might run, which asks)."""
    kind = x.device.type
    is_cast = x.dtype in dispatch.DTYPES and kind in ("cuda", "cpu") and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_cast else x.dtype


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than compute; kernels, which read weights, would leave that out."""
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks)


def is_original(
    layer: ConvLayer,
    kind: type[nn.Conv2d],
    size: int,
    *,
    has_bias: bool,
    norm: type[nn.Module] | None = nn.Identity,
    act: type[nn.Module] = nn.ReLU,
) -> bool:
    """Whether a layer is what its kernel computes, and nothing in it has hooks.

    That is a convolution of this kind, with stride 2 if it has a window, act, and norm (None: its own is called).
    """
    conv = layer.conv
    if any(map(has_hooks, layer.modules())) or type(layer.act) is not act or (norm and type(layer.norm) is not norm):
        return False
    if type(conv) is not kind or (conv.bias is not None) is not has_bias:
        return False
    stride, padding = (2, 2) if size > 1 else (1, 1), (size // 2, size // 2)
    known = (size, size), stride, padding, (1, 1), (conv.in_channels if kind is DepthwiseConv else 1)
    return (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) == known


def stem_conv(images: Tensor, layer: ConvLayer, kernels: str = "auto") -> Tensor:
    """layer(images) for the stem's first layer, (B, in_chans, H, W) -> (B, C, H / 2, W / 2); H and W / 2 are even.

    The kernel reads images of any strides and dtype, and knows no gradient for them.
    """
    conv, dtype = layer.conv, computed_dtype(images)
    is_folded = isinstance(layer.norm, nn.Identity)  # the convolution has taken up the batch norm, for inference
    kernel, frozen = ("stem_conv_relu", (images, conv.weight, conv.bias)) if is_folded else ("stem_conv", (images,))
    is_known = conv.in_channels == RGB and conv.out_channels <= WIDEST_STEM and not needs_gradient(*frozen)
    is_known = is_known and is_original(layer, nn.Conv2d, 3, has_bias=is_folded, norm=None)
    if not (is_known and dispatch.takes(kernels, images, kernel, channels=conv.out_channels, dtype=dtype)):
        return layer(images.contiguous(memory_format=torch.channels_last))
    if is_folded:
        return ops().stem_conv_relu(images, conv.weight, conv.bias, dtype)  # (B, C, H / 2, W / 2)
    return layer.act(layer.norm(ops().stem_conv(images, conv.weight, dtype)))  # (B, C, H / 2, W / 2)


class Stem(nn.Module):
    """Images (B, in_chans, H, W) to tokens (B, ceil(H / 4), ceil(W / 4), embed_dim)."""

    is_region = True  # compiled for itself

    def __init__(self, in_chans: int, embed_dim: int, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels = kernels
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
        x = stem_conv(pad_to_multiple(images, 4), self.conv1, self.kernels)  # (B, E / 2, H / 2, W / 2)
        x = x + self.conv2(x)
        return self.conv3(x).permute(0, 2, 3, 1)  # (B, H / 4, W / 4, E)


class Downsample(nn.Module):
    """Halve the token grid and double the width: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2 C)."""

    is_region = True  # compiled for itself

    def __init__(self, channels: int, expansion: int = 4, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels = kernels
        hidden = 2 * channels * expansion
        self.conv = nn.Sequential(
            ConvLayer(nn.Conv2d(channels, hidden, 1), norm=False),
            ConvLayer(DepthwiseConv(hidden, stride=2), norm=False),
            ConvLayer(nn.Conv2d(hidden, 2 * channels, 1), activation=False),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = pad_to_multiple(tokens.permute(0, 3, 1, 2), 2)  # (B, C, H, W), both even
        widen, depthwise, narrow = (cast("ConvLayer", layer) for layer in self.conv)
        dtype = computed_dtype(tokens)
        is_known = (
            not has_hooks(self.conv)
            and is_original(widen, nn.Conv2d, 1, has_bias=True)
            and is_original(depthwise, DepthwiseConv, 3, has_bias=True)
            and is_original(narrow, nn.Conv2d, 1, has_bias=True, norm=None, act=nn.Identity)
        )
        if is_known and dispatch.takes(
            self.kernels, tokens, "wide_conv", channels=widen.conv.out_channels, dtype=dtype
        ):
            x = x.permute(0, 2, 3, 1).to(dtype)  # (B, H, W, C)
            x = segments().WideConv.apply(
                *(x, widen.conv.weight.flatten(1), widen.conv.bias, depthwise.conv.weight, depthwise.conv.bias)
            )  # (B, H / 2, W / 2, 8 C)
            x = F.linear(x, narrow.conv.weight.flatten(1), narrow.conv.bias)  # (B, H / 2, W / 2, 2 C)
            return narrow.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.conv(x).permute(0, 2, 3, 1)  # (B, H / 2, W / 2, 2 C)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad x (B, C, H, W) with zeros at the right and the bottom until H and W are multiples of `multiple`."""
    pad_bottom, pad_right = -x.shape[2] % multiple, -x.shape[3] % multiple
    if pad_bottom or pad_right:
        x = F.pad(x, (0, pad_right, 0, pad_bottom))
    return x
