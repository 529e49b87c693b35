"""A small problem for each kernel, whose answer is compared with plain PyTorch in float64."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from models.kernels import ops, segments
from models.rope import position_tables, rotate_pairs, spread_over_grid

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the norm of each result
COLUMNS = 6
FULL_SIZE = 2**15 + 2**14  # images times channels that keep a GPU busy: kernels take the tiles that training takes
INFERENCE_ONLY = ("mlp", "stem_conv_relu")  # without gradient
Outputs = tuple[Tensor, ...]


def full_batch(device: torch.device, channels: int) -> int:
    return max(2, FULL_SIZE // channels) if device.type == "cuda" else 2


def run(
    kernel: str, device: torch.device, dtype: torch.dtype, channels: int, head_width: int, *, rows: int, batch: int
) -> str:
    """What is wrong with a kernel at (batch, rows, 6, channels), forward or backward; an empty string if nothing is.

    It raises nothing but torch.OutOfMemoryError, and leaves the random number generators as they are.
    """
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            worst = largest_error(kernel, device, dtype, channels, head_width, rows=rows, batch=batch)
    except torch.OutOfMemoryError:  # not the kernel's fault
        raise
    except Exception as error:  # whatever a compiler may say
        return f"the {kernel} kernel fails here, {type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
    tolerance = TOLERANCES[dtype]
    return "" if worst < tolerance else f"the {kernel} kernel's result is off by {worst:.1e} in {dtype}"


def largest_error(
    kernel: str, device: torch.device, dtype: torch.dtype, channels: int, head_width: int, *, rows: int, batch: int
) -> float:
    """The worst relative error, by norm, among results and gradients; infinite where there is a NaN."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device) * scale
        return values.to(of).requires_grad_(kernel not in INFERENCE_ONLY)

    fused, plain, inputs = problem(kernel, draw, (batch, rows, COLUMNS, channels), head_width)
    doubled = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    trained, doubled_trained = ([tensor for tensor in t if tensor.requires_grad] for t in (inputs, doubled))
    with torch.set_grad_enabled(bool(trained)):
        found, expected = list(fused(*inputs)), list(plain(*doubled))
    if trained:
        upstream = [torch.randn(o.shape, generator=generator, device=device).to(o.dtype) for o in found]
        expected += torch.autograd.grad(expected, doubled_trained, [u.double() for u in upstream])
        found += torch.autograd.grad(found, trained, upstream)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def problem(
    kernel: str, draw: Callable[..., Tensor], tokens: tuple[int, int, int, int], head_width: int
) -> tuple[Callable[..., Outputs], Callable[..., Outputs], list[Tensor]]:
    """(the kernel, the same in plain PyTorch, arguments of both)."""
    batch, rows, columns, channels = tokens
    full = torch.float32
    taps = [draw(channels, 1, 3, 3, scale=0.3, of=full), draw(channels, of=full)]
    if kernel == "conv_norm":
        inputs = [draw(*tokens), *taps, draw(channels, of=full), draw(channels, of=full)]
        for width in (channels, 2 * channels):
            inputs += [draw(width, channels, scale=channels**-0.5, of=full), draw(width, of=full)]
        return (lambda *a: segments.NormedProducts.apply(*a[:5], 1e-5, *a[5:])), plain_normed_products, inputs
    before = draw(channels, of=full)  # a bias that is in the input: only its gradient is the kernel's
    if kernel == "conv_silu":
        return (lambda *a: ops.conv_silu(*a, True)[:1]), plain_conv_silu, [draw(*tokens), *taps, before]
    scale = ((torch.arange(batch, device=before.device) + 1) % 3).to(draw(1).dtype).view(-1, 1, 1, 1)
    if kernel == "scaled_branch":
        return (
            lambda *a: (segments.ScaledBranch.apply(a[0], scale, a[1]),),
            lambda *a: (with_gradient_of(*a) * scale,),
            [draw(*tokens), before],
        )
    if kernel == "gelu_branch":
        hidden = 4 * channels
        inputs = [draw(*tokens), draw(*tokens[:3], hidden), draw(hidden, of=full)]
        inputs += [draw(channels, hidden, scale=hidden**-0.5, of=full), before]
        return (
            lambda *a: (segments.GeluBranch.apply(*a, scale),),
            lambda x, h, b, *a: (x + scale * F.linear(F.gelu(with_gradient_of(h, b)), *a),),
            inputs,
        )
    if kernel == "strided_conv":
        inputs = [draw(batch, rows + rows % 2, columns, channels), *taps, before]
        return (lambda *a: (ops.strided_conv(*a),)), plain_strided_conv, inputs
    if kernel.startswith("stem_conv"):
        inputs = [draw(batch, 3, 4 * rows, 4 * columns).detach(), draw(channels, 3, 3, 3, scale=0.2, of=full)]
        inputs += [draw(channels, of=full)] if kernel == "stem_conv_relu" else []
        return fused_stem, plain_stem, inputs
    if kernel == "mlp":
        hidden = 4 * channels
        inputs = [draw(*tokens), draw(hidden, channels, scale=channels**-0.5), draw(hidden)]
        inputs += [draw(channels, hidden, scale=hidden**-0.5), draw(channels), draw(*tokens)]
        return (lambda *a: (ops.mlp(*a),)), plain_mlp, inputs
    heads = channels // head_width
    inputs = [draw(*tokens[:3], 2 * channels), draw(*tokens), draw(*tokens), *taps]
    rotary = position_tables(rows, columns, channels, inputs[0].device)
    return (
        lambda *a: ops.linear_attention(*a, *rotary, heads, True)[:1],
        lambda *a: (plain_attention(*a, rotary=rotary, heads=heads),),
        inputs,
    )


def conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    x = x.permute(0, 3, 1, 2)  # (B, C, H, W)
    return F.conv2d(x, weight, bias, stride, padding=1, groups=weight.shape[0]).permute(0, 2, 3, 1)  # (B, H, W, C)


def plain_normed_products(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, *products: Tensor
) -> Outputs:
    x = x + conv(x, weight, bias)
    y = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, 1e-5)
    return x, F.linear(y, *products[:2]), F.linear(y, *products[2:])


def with_gradient_of(x: Tensor, bias: Tensor) -> Tensor:
    """x, of which a bias is a part already."""
    return x + (bias - bias.detach())


def plain_conv_silu(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> Outputs:
    return (F.silu(conv(with_gradient_of(x, before), weight, bias)),)


def plain_strided_conv(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor) -> Outputs:
    return (F.relu(conv(F.relu(with_gradient_of(x, before)), weight, bias, stride=2)),)


def fused_stem(images: Tensor, weight: Tensor, *bias: Tensor) -> Outputs:
    """Of images as a loader gives them, to be computed as autocast asks, and of others; ReLU where there is a bias."""
    conv = ops.stem_conv_relu if bias else ops.stem_conv
    loaded = images.float().contiguous(memory_format=torch.channels_last)
    return conv(loaded, weight, *bias, images.dtype), conv(images, weight, *bias, images.dtype)


def plain_stem(images: Tensor, weight: Tensor, *bias: Tensor) -> Outputs:
    x = F.conv2d(images, weight, bias[0] if bias else None, stride=2, padding=1).permute(0, 2, 3, 1)
    return (x.relu() if bias else x,) * 2  # (B, H / 2, W / 2, C) each


def plain_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor) -> Outputs:
    return (residual + F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2),)


def plain_attention(
    qk: Tensor, v: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *, rotary: tuple[Tensor, Tensor], heads: int
) -> Tensor:
    _, height, width, channels = v.shape
    cos, sin = (spread_over_grid(table, height, width).double() for table in rotary)  # (H, W, C / 2)

    def split(x: Tensor) -> Tensor:
        return x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, N, head_dim)

    q, k = (F.elu(qk) + 1).split(channels, dim=-1)
    weights = split(rotate_pairs(q, cos, sin)) @ split(rotate_pairs(k, cos, sin)).transpose(-2, -1)  # (B, heads, N, N)
    normaliser = (split(q) @ split(k).transpose(-2, -1)).sum(dim=-1, keepdim=True)
    attended = (weights / normaliser @ split(v)).transpose(1, 2).reshape(v.shape)  # (B, H, W, C)
    return (attended + conv(v, weight, bias)) * F.silu(gate)
