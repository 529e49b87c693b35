"""Building blocks of MLLA. Tokens flow as (B, H, W, C): seen as (B, C, H, W) that is channels_last, so no copies."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from models.kernels import choice
from models.kernels.products import add_product, linear_gelu

# The official classifier stores rotary tables for its one image size; here they follow from the grid.
DERIVED_KEY_SUFFIX = "attn.rope.rotations"
WIDEST_FUSED_MLP = 128  # beyond, the matrix products are too large to keep a hidden layer in registers
RGB, WIDEST_STEM = 3, 128  # channels of the images that the stem's kernel reads, and at most of its outputs


def ops() -> Any:
    """The kernels, which need Triton: imported where they are used."""
    from models.kernels import ops

    return ops


def segments() -> Any:
    from models.kernels import segments

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


def fuses_norm(x: Tensor, conv: TokenConv, norm: nn.Module, kernels: str) -> bool:
    """Whether the kernels take x + conv(x) and its norm."""
    return isinstance(norm, nn.LayerNorm) and choice.takes(
        kernels, x, "conv_norm", channels=conv.in_channels, norm=norm
    )


def conv_norm(x: Tensor, conv: TokenConv, norm: nn.Module, kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """x + conv(x) and its norm, both (B, H, W, C); without gradient in one pass over x where the kernels can."""
    if not torch.is_grad_enabled() and fuses_norm(x, conv, norm, kernels):
        return ops().conv_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, conv.later_bias)
    x = x + conv(x)
    return x if conv.later_bias is None else x + conv.later_bias.to(x.dtype), norm(x)


def project_normed(
    x: Tensor, conv: TokenConv, norm: nn.Module, inner: nn.Linear, gate: nn.Module, kernels: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """With x' = x + conv(x): x', inner(norm(x')) and gate(norm(x')), (B, H, W, C) each.

    What comes next is `conv_silu`, which sums the gradient of inner's bias. For inference `inner` may hold both
    products (see `prepare_for_inference`); then `gate` is an identity.
    """
    if isinstance(gate, nn.Linear) and fuses_norm(x, conv, norm, kernels):
        is_summed_later = choice.takes(kernels, x, "conv_silu", channels=conv.in_channels)
        bias = cast("Tensor", inner.bias)
        return segments().NormedProducts.apply(
            *(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps),
            *(inner.weight, bias.detach() if is_summed_later else bias, gate.weight, gate.bias),
        )
    x, y = conv_norm(x, conv, norm, kernels)
    if isinstance(gate, nn.Identity):
        first, second = inner(y).chunk(2, dim=-1)
        return x, first, second
    return x, inner(y), gate(y)


def conv_silu(x: Tensor, conv: TokenConv, bias_before: Tensor, kernels: str = "auto") -> Tensor:
    """SiLU(conv(x)), (B, H, W, C), in one pass over x where the kernels can.

    x comes from `project_normed`, with `bias_before` in it.
    """
    if choice.takes(kernels, x, "conv_silu", channels=conv.in_channels):
        keep = needs_gradient(x, bias_before, conv.weight, conv.bias)
        return ops().conv_silu(x, conv.weight, conv.bias, bias_before if keep else None, keep)[0]
    return F.silu(conv(x))


def add_branch(x: Tensor, y: Tensor, proj: nn.Linear, drop_path: "DropPath", kernels: str = "auto") -> Tensor:
    """x + drop_path(proj(y)), (B, H, W, C)."""
    if isinstance(proj, AddedLinear):
        return proj(x, y)
    if torch.is_grad_enabled() and choice.takes(kernels, x, "scaled_branch", channels=x.shape[-1]):
        branch = F.linear(y, proj.weight, proj.bias.detach())
        return x + segments().ScaledBranch.apply(branch, drop_path.draw(branch), proj.bias)
    return x + drop_path(proj(y))


def add_mlp(
    x: Tensor, conv: TokenConv, norm: nn.Module, mlp: Mlp, drop_path: "DropPath", kernels: str = "auto"
) -> Tensor:
    """With x' = x + conv(x): x' + drop_path(mlp(norm(x'))), (B, H, W, C)."""
    drops_out = mlp.training and mlp.drop1.p > 0
    is_fused = torch.is_grad_enabled() and not drops_out and fuses_norm(x, conv, norm, kernels)
    if is_fused and choice.takes(kernels, x, "gelu_branch", channels=x.shape[-1]):
        bias_before = cast("Tensor", mlp.fc1.bias)
        x, hidden = segments().NormedProducts.apply(
            *(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, mlp.fc1.weight, bias_before.detach())
        )
        return segments().GeluBranch.apply(x, hidden, bias_before, mlp.fc2.weight, mlp.fc2.bias, drop_path.draw(x))
    x, y = conv_norm(x, conv, norm, kernels)
    if torch.is_grad_enabled() or mlp.training:
        return x + drop_path(mlp(y))
    return infer_mlp(x, y, mlp, kernels)


def infer_mlp(x: Tensor, y: Tensor, mlp: Mlp, kernels: str) -> Tensor:
    """x + mlp(y), (B, H, W, C), without gradient; on narrow tokens in one pass where the kernels can."""
    width = cast("int", mlp.fc1.in_features)
    if width <= WIDEST_FUSED_MLP and choice.takes(kernels, x, "mlp", channels=width):
        return ops().mlp(y.to(x.dtype), mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, x)
    if isinstance(mlp.fc2, AddedLinear) and is_sixteen_bit_product(x, mlp.fc1.weight):
        # In the plain path autocast has left y, a norm's result, in float32.
        hidden = linear_gelu(y.to(x.dtype), mlp.fc1.weight, mlp.fc1.bias)
    else:
        hidden = mlp.fc1(y)
        is_fused = choice.takes(kernels, x, "gelu_branch", channels=width)
        hidden = ops().gelu(hidden) if is_fused else mlp.act(hidden)
    return mlp.fc2(x, hidden) if isinstance(mlp.fc2, AddedLinear) else x + mlp.fc2(hidden)


def is_sixteen_bit_product(x: Tensor, weight: Tensor) -> bool:
    """Whether cuBLAS can compute GELU inside of the product."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and weight.dtype == x.dtype


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
    is_cast = x.dtype in choice.DTYPES and kind in ("cuda", "cpu") and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_cast else x.dtype


def stem_conv(images: Tensor, layer: ConvLayer, kernels: str = "auto") -> Tensor:
    """layer(images) for the stem's first layer, (B, in_chans, H, W) -> (B, C, H / 2, W / 2); H and W / 2 are even.

    The kernel reads images of any strides and dtype, and knows no gradient for them.
    """
    conv, dtype = layer.conv, computed_dtype(images)
    is_folded = conv.bias is not None  # it has taken up the batch norm, for inference
    kernel, frozen = ("stem_conv_relu", (images, conv.weight, conv.bias)) if is_folded else ("stem_conv", (images,))
    is_known = conv.in_channels == RGB and conv.out_channels <= WIDEST_STEM and not needs_gradient(*frozen)
    if not (is_known and choice.takes(kernels, images, kernel, channels=conv.out_channels, dtype=dtype)):
        return layer(images.contiguous(memory_format=torch.channels_last))
    if is_folded:
        return ops().stem_conv_relu(images, conv.weight, conv.bias, dtype).permute(0, 3, 1, 2)  # (B, C, H / 2, W / 2)
    x = ops().stem_conv(images, conv.weight, dtype).permute(0, 3, 1, 2)  # (B, C, H / 2, W / 2)
    return layer.act(layer.norm(x))


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
        if choice.takes(self.kernels, tokens, "strided_conv", channels=widen.conv.out_channels):
            x, bias = x.permute(0, 2, 3, 1), cast("Tensor", widen.conv.bias)
            x = F.linear(x, widen.conv.weight.flatten(1), bias.detach())  # (B, H, W, 8 C)
            # Both ReLUs are in it, and the gradient of the bias before.
            x = ops().strided_conv(x, depthwise.conv.weight, depthwise.conv.bias, bias)  # (B, H / 2, W / 2, 8 C)
            x = F.linear(x, narrow.conv.weight.flatten(1), narrow.conv.bias)  # (B, H / 2, W / 2, 2 C)
            return narrow.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.conv(x).permute(0, 2, 3, 1)  # (B, H / 2, W / 2, 2 C)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad x (B, C, H, W) with zeros at the right and the bottom until H and W are multiples of `multiple`."""
    pad_bottom, pad_right = -x.shape[2] % multiple, -x.shape[3] % multiple
    if pad_bottom or pad_right:
        x = F.pad(x, (0, pad_right, 0, pad_bottom))
    return x
