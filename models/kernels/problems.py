"""A small problem for each kernel, its eager PyTorch reference, and how far the kernel is from that in float64."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from models.kernels import autograd, inference_halves, ops
from models.rope import position_tables, rotate_pairs, spread_over_grid

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the norm of each result
COLUMNS = 6
FULL_SIZE = 2**14 + 2**13  # images times channels that keep a GPU busy: kernels take the tiles that training takes
LEAST_FULL_BATCH = 112  # likewise, of the widest tokens
FEW_COLUMNS = 16  # for kernels for few tokens: with 17 rows, an image of more than they sum in a step
# Without gradient.
INFERENCE_ONLY = (
    *("inference_mixer", "inference_mlp", "mlp", "stem_conv_relu", "stem_layer"),
    *("few_tokens_mixer", "few_tokens_mlp"),
)
EPS = 1e-5  # of the norms
Outputs = tuple[Tensor, ...]


def full_batch(device: torch.device, channels: int) -> int:
    """Return the batch size of the self-test: on a GPU large enough for the tiles of training."""
    return max(LEAST_FULL_BATCH, FULL_SIZE // channels) if device.type == "cuda" else 2


def find_error(
    kernel: str, device: torch.device, dtype: torch.dtype, channels: int, head_dim: int, *, rows: int, batch: int
) -> str:
    """Return what is wrong with a kernel at (batch, rows, 6, channels), forward or backward, or an empty string.

    It raises nothing but torch.OutOfMemoryError, and leaves the random number generators as they are.
    """
    precision = None
    try:
        precision = torch.get_float32_matmul_precision()  # an error where it was set by torch's newer names
        torch.set_float32_matmul_precision("highest")  # TF32 is not the kernel's fault
        # A checkpoint around the block must not see what is saved here: hooks of our own hide it.
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        no_autocast = torch.autocast(device.type, enabled=False)
        with _disable_current_modes(), torch.inference_mode(False), no_autocast, hooks:
            worst = largest_error(kernel, device, dtype, channels, head_dim, rows=rows, batch=batch)
    except torch.OutOfMemoryError:  # not the kernel's fault
        raise
    except Exception as error:  # whatever a compiler may say
        last_line = " ".join(str(error).strip().splitlines()[-1:])
        return f"the {kernel} kernel fails here, {type(error).__name__}: {last_line}"
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
    tolerance = TOLERANCES[dtype]
    return "" if worst < tolerance else f"the {kernel} kernel's result is off by {worst:.1e} in {dtype}"


def largest_error(
    kernel: str, device: torch.device, dtype: torch.dtype, channels: int, head_dim: int, *, rows: int, batch: int
) -> float:
    """Return the largest of `relative_errors`."""
    return max(relative_errors(kernel, device, dtype, channels, head_dim, rows=rows, batch=batch))


def relative_errors(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    head_dim: int,
    *,
    rows: int,
    batch: int,
    eager: bool = False,
) -> list[float]:
    """Return the errors of results and gradients by norm, relative to float64; infinite where there is a NaN.

    With `eager`, return those of eager PyTorch under autocast of this dtype instead of the kernel's.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device) * scale
        return values.to(of).requires_grad_(kernel not in INFERENCE_ONLY)

    tokens = (batch, rows, COLUMNS, channels)
    if kernel.startswith("few_tokens"):
        tokens = (min(batch, 2), rows, FEW_COLUMNS if rows > COLUMNS else COLUMNS, channels)
    fused, reference, inputs = problem(kernel, draw, tokens, head_dim)
    doubled = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    trained, doubled_trained = ([tensor for tensor in t if tensor.requires_grad] for t in (inputs, doubled))
    with torch.set_grad_enabled(bool(trained)):
        with torch.autocast(device.type, dtype, enabled=eager and dtype != torch.float32):
            results = list((reference if eager else fused)(*inputs))
        expected = list(reference(*doubled))
    if trained:
        upstream = [torch.randn(o.shape, generator=generator, device=device).to(o.dtype) for o in results]
        expected += torch.autograd.grad(expected, doubled_trained, [u.double() for u in upstream])
        results += torch.autograd.grad(results, trained, upstream)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True)]
    return [error if error == error else float("inf") for error in errors]


def problem(
    kernel: str, draw: Callable[..., Tensor], tokens: tuple[int, int, int, int], head_dim: int
) -> tuple[Callable[..., Outputs], Callable[..., Outputs], list[Tensor]]:
    """Return (the kernel, the same in eager PyTorch, arguments of both) for tokens of a shape (B, H, W, C)."""
    batch, rows, columns, channels = tokens

    def product(width: int, wide: int = channels) -> list[Tensor]:
        return [draw(width, wide, scale=wide**-0.5, of=torch.float32), draw(width, of=torch.float32)]

    def taps(width: int = channels) -> list[Tensor]:
        return [draw(width, 1, 3, 3, scale=0.3, of=torch.float32), draw(width, of=torch.float32)]

    def norm() -> list[Tensor]:
        return [draw(channels, of=torch.float32), draw(channels, of=torch.float32)]

    if kernel.startswith("stem"):
        return stem_problem(kernel, draw, tokens)
    if kernel == "wide_conv":
        narrow = max(1, channels // 8)
        inputs = [draw(batch, rows + rows % 2, columns, narrow), *product(channels, narrow), *taps()]
        return (lambda *a: (autograd.WideConv.apply(*a),)), reference_wide_conv, inputs
    x = draw(*tokens)
    if kernel == "mlp":
        inputs = [x, *product(4 * channels), *product(channels, 4 * channels), draw(*tokens)]
        return (lambda *a: (ops.mlp(*a),)), reference_mlp, inputs
    scale = ((torch.arange(batch, device=x.device) + 1) % 3).view(-1, 1, 1, 1)  # of the branch, for each image
    few = kernel.startswith("few_tokens")
    if kernel in ("mlp_branch", "inference_mlp", "few_tokens_mlp"):
        inputs = [x, *taps(), *norm(), *product(4 * channels), *product(channels, 4 * channels)]
        if kernel != "mlp_branch":
            return lambda *a: inference_mlp(*a, few=few), lambda *a: (reference_mlp_branch(*a),), inputs
        return (
            lambda x, *a: (autograd.MlpBranch.apply(x, scale.to(x.dtype), EPS, *a),),
            lambda *a: (reference_mlp_branch(*a, scale=scale),),
            inputs,
        )
    heads = channels // head_dim
    rotary = position_tables(rows, columns, channels, x.device)
    inputs = [x, *taps(), *norm(), *product(channels), *product(channels), *taps(), *product(2 * channels)]
    inputs += [*taps(), *product(channels)]
    if kernel != "mixer":
        return (
            lambda *a: inference_mixer(*a, rotary=rotary, heads=heads, few=few),
            lambda *a: (reference_mixer(*a, rotary=rotary, heads=heads),),
            inputs,
        )
    return (
        lambda x, *a: (autograd.Mixer.apply(x, *rotary, scale.to(x.dtype), heads, EPS, *a),),
        lambda *a: (reference_mixer(*a, scale=scale, rotary=rotary, heads=heads),),
        inputs,
    )


def stem_problem(
    kernel: str, draw: Callable[..., Tensor], tokens: tuple[int, int, int, int]
) -> tuple[Callable[..., Outputs], Callable[..., Outputs], list[Tensor]]:
    """Return what `problem` does, for a kernel of the stem."""
    batch, rows, columns, channels = tokens
    if kernel == "stem_layer":
        x = draw(batch, channels, 2 * rows, 2 * columns)
        inputs = [x, draw(channels, channels, 3, 3, scale=channels**-0.5 / 3), draw(channels), draw(*x.shape)]
        return fused_stem_layers, reference_stem_layers, inputs
    with_relu = kernel == "stem_conv_relu"  # for inference, whose weights are cast once
    images = draw(batch, 3, 4 * rows, 4 * columns).detach()
    of = images.dtype if with_relu else torch.float32
    inputs = [images, draw(channels, 3, 3, 3, scale=0.2, of=of), *([draw(channels, of=of)] if with_relu else [])]
    return fused_stem, reference_stem, inputs


def inference_mixer(x: Tensor, *weights: Tensor, rotary: tuple[Tensor, Tensor], heads: int, few: bool) -> Outputs:
    """Compute the first half of a block with joined and cast matrices, as `InferenceBlock` does."""
    inner, inner_bias, gate, gate_bias, dwc, dwc_bias, qk, qk_bias, lepe, lepe_bias, out, out_bias = weights[4:]
    matrices = torch.cat([inner, gate]), torch.cat([inner_bias, gate_bias]), qk, qk_bias, out
    joined, joined_bias, qk, qk_bias, out = (matrix.to(x.dtype) for matrix in matrices)
    others = [joined, joined_bias, dwc, dwc_bias, qk, qk_bias, lepe, lepe_bias, out, out_bias]
    return (inference_halves.mix_tokens(x, rotary, heads, EPS, *weights[:4], *others, few=few),)


def inference_mlp(x: Tensor, *weights: Tensor, few: bool) -> Outputs:
    """Compute the second half of a block with cast matrices, as `InferenceBlock` does."""
    adds_bias = x.shape[-1] > inference_halves.WIDEST_FUSED_MLP  # to the residual, as it is
    count = 7 if adds_bias else 8
    cast = [weight.to(x.dtype) for weight in weights[4:count]]
    return (inference_halves.mix_channels(x, EPS, *weights[:4], *cast, *weights[count:], few=few),)


def conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    x = x.permute(0, 3, 1, 2)  # (B, C, H, W)
    return F.conv2d(x, weight, bias, stride, padding=1, groups=weight.shape[0]).permute(0, 2, 3, 1)  # (B, H, W, C)


def reference_wide_conv(x: Tensor, widen: Tensor, widen_bias: Tensor, taps: Tensor, taps_bias: Tensor) -> Outputs:
    return (F.relu(conv(F.relu(F.linear(x, widen, widen_bias)), taps, taps_bias, stride=2)),)


def reference_mlp_branch(x: Tensor, *weights: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    cpe, norm, widen, narrow = zip(weights[::2], weights[1::2], strict=True)
    x = x + conv(x, *cpe)
    return x + scale * F.linear(F.gelu(F.linear(layer_norm(x, *norm), *widen)), *narrow)


def reference_mixer(
    x: Tensor, *weights: Tensor, scale: Tensor | float = 1.0, rotary: tuple[Tensor, Tensor], heads: int
) -> Tensor:
    cpe, norm, inner, gate, dwc, qk, lepe, out = zip(weights[::2], weights[1::2], strict=True)
    x = x + conv(x, *cpe)
    y = layer_norm(x, *norm)
    v = F.silu(conv(F.linear(y, *inner), *dwc))
    attended = reference_attention(F.linear(v, *qk), v, rotary, heads) + conv(v, *lepe)
    return x + scale * F.linear(attended * F.silu(F.linear(y, *gate)), *out)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def reference_attention(qk: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], heads: int) -> Tensor:
    _, height, width, channels = v.shape
    cos, sin = (spread_over_grid(table, height, width).to(v.dtype) for table in rotary)  # (H, W, C / 2)

    def split(x: Tensor) -> Tensor:
        return x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, N, head_dim)

    q, k = (F.elu(qk) + 1).split(channels, dim=-1)
    weights = split(rotate_pairs(q, cos, sin)) @ split(rotate_pairs(k, cos, sin)).transpose(-2, -1)  # (B, heads, N, N)
    normalizer = (split(q) @ split(k).transpose(-2, -1)).sum(dim=-1, keepdim=True)
    return (weights / normalizer @ split(v)).transpose(1, 2).reshape(v.shape)  # (B, H, W, C)


def reference_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor
) -> Outputs:
    return (residual + F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2),)


def fused_stem(images: Tensor, weight: Tensor, *bias: Tensor) -> Outputs:
    """Convolve images as a loader returns them, float32 and packed, and others; with ReLU where there is a bias."""
    conv = ops.stem_conv_relu if bias else ops.stem_conv
    loaded = images.float().contiguous(memory_format=torch.channels_last)
    return conv(loaded, weight, *bias, images.dtype), conv(images, weight, *bias, images.dtype)


def reference_stem(images: Tensor, weight: Tensor, *bias: Tensor) -> Outputs:
    x = F.conv2d(images, weight, bias[0] if bias else None, stride=2, padding=1)
    return (x.relu() if bias else x,) * 2  # (B, C, H / 2, W / 2) each


def fused_stem_layers(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Outputs:
    """Compute both layers of the stem with stride 1: the one with ReLU, and the one with a residual."""
    return ops.stem_layer(x, weight, bias), ops.stem_layer(x, weight, bias, residual)


def reference_stem_layers(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Outputs:
    x = F.conv2d(x, weight, bias, padding=1)
    return x.relu(), residual + x  # (B, C, H, W) each
