"""Functions of float32 values in registers that several kernels share."""

import os

import torch
import triton
import triton.language as tl

# PTX's approximations flush denormals, which saves the comparisons and rescaling of tl.exp and of divisions: a third of
# a depthwise kernel's instructions. Their errors are a few units in float32's last place.
USE_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)
SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def as_tile(x):
    """Make a number a (1, 1) tensor: Triton's interpreter cannot combine masks of tensors with masks of numbers."""
    return x + tl.zeros((1, 1), dtype=tl.int32)


@triton.jit
def exponential(x):
    """Return e^x; 0 where that is below the normal numbers."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # noqa: RET505
        return tl.exp(x)


@triton.jit
def reciprocal(x):
    """Return 1 / x; 0 for infinity."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505
        return 1.0 / x


@triton.jit
def rescale(x, scale):
    """Return scale x; 0 where scale is 0, even if x is infinite: a float16 product before the scale may overflow."""
    return tl.where(scale == 0.0, 0.0, scale * x)


@triton.jit
def pinned(x):
    """Return float32 x, of which Triton computes nothing again in another layout, such as that of a product's input."""
    if USE_PTX:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)
    else:  # noqa: RET505
        return x


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + exponential(-x))


@triton.jit
def positive(x):
    """Return ELU(x) + 1."""
    return tl.where(x > 0, x + 1.0, exponential(tl.minimum(x, 0.0)))


@triton.jit
def positive_gradient(x, y):
    """Return d(ELU(x) + 1) / dx, given y = ELU(x) + 1."""
    return tl.where(x > 0, 1.0, y)


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """Return x Phi(x); without EXACT by a polynomial, off by 7e-5 at most, since a fused MLP would wait for erf."""
    if EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    else:  # noqa: RET505
        z = tl.minimum(tl.maximum(x, -4.5), 4.5)
        s = z * z
        p = 3.03642833e-11 * s - 3.31466917e-09
        p = p * s + 1.59100043e-07
        p = p * s - 4.45173653e-06
        p = p * s + 8.14252514e-05
        p = p * s - 0.00103759188
        p = p * s + 0.00958520516
        p = p * s - 0.0659846599
        p = p * s + 0.398712609
        return x * (z * p + 0.5)
