"""Triton kernels for the block of one image or a few: inference then takes as long as its launches, so these are few.

Eager reference: `MLLABlock` in models/mlla.py, and `LinearAttention` in models/attention.py.

Each half of a block is a chain of products. What comes before a product, a depthwise convolution and LayerNorm or SiLU,
is computed again by every program for its own tokens, with all channels in registers. Programmatic dependent launch,
where there is any, starts a kernel beside the previous one: it loads its weights, then waits for the other's results.
"""

import triton
import triton.language as tl

from models.kernels.triton.attention import NORMALIZER_EPS, load_angles, load_tokens, rotate, sum_keys_and_values
from models.kernels.triton.depthwise_io import load_stencil
from models.kernels.triton.launch import launch_dependents, wait_for_previous
from models.kernels.triton.math import gelu, pinned, positive, reciprocal, sigmoid


@triton.jit
def load_shifted(x, token, ok, shift, stride, channel, channel_ok):
    """Load tokens (tokens, channels) that lie `shift` tokens further; zeros where not ok."""
    return tl.load(x + (token + shift)[:, None] * stride + channel, mask=ok[:, None] & channel_ok, other=0.0)


@triton.jit
def convolve(
    x, token, token_ok, height, width, stride, channel, channel_ok, bias,
    top0, top1, top2, mid0, mid1, mid2, low0, low1, low2, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Return the depthwise convolution of x with bias, + x if RESIDUAL; float32 (tokens, channels).

    All loads come first: taps change their layout behind barriers, over which no load can be moved.
    """
    row, column = token // width % height, token % width
    left, right = column > 0, column + 1 < width
    above, below = token_ok & (row > 0), token_ok & (row + 1 < height)
    x0 = load_shifted(x, token, above & left, -width - 1, stride, channel, channel_ok)
    x1 = load_shifted(x, token, above, -width, stride, channel, channel_ok)
    x2 = load_shifted(x, token, above & right, 1 - width, stride, channel, channel_ok)
    x3 = load_shifted(x, token, token_ok & left, -1, stride, channel, channel_ok)
    x4 = load_shifted(x, token, token_ok, 0, stride, channel, channel_ok)
    x5 = load_shifted(x, token, token_ok & right, 1, stride, channel, channel_ok)
    x6 = load_shifted(x, token, below & left, width - 1, stride, channel, channel_ok)
    x7 = load_shifted(x, token, below, width, stride, channel, channel_ok)
    x8 = load_shifted(x, token, below & right, width + 1, stride, channel, channel_ok)
    total = bias + top0 * x0.to(tl.float32) + top1 * x1.to(tl.float32) + top2 * x2.to(tl.float32)
    total += mid0 * x3.to(tl.float32) + mid1 * x4.to(tl.float32) + mid2 * x5.to(tl.float32)
    total += low0 * x6.to(tl.float32) + low1 * x7.to(tl.float32) + low2 * x8.to(tl.float32)
    if RESIDUAL:
        total += x4.to(tl.float32)
    return pinned(total)


@triton.jit
def convolve_and_norm(
    x, taps, conv_bias, norm_weight, norm_bias, conv_out, token, num_tokens, height, width, stride, eps,
    NORM: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Wait for the previous kernel; return a product's input (tokens, WIDTH), and what is stored beside it.

    NORM: LayerNorm(x + conv(x)) and x + conv(x), else SiLU(conv(x)) twice.
    """
    channel = tl.arange(0, WIDTH)[None, :]
    channel_ok = channel < CHANNELS
    token_ok = token < num_tokens
    top0, top1, top2, mid0, mid1, mid2, low0, low1, low2 = load_stencil(taps, channel, channel_ok)
    start = tl.load(conv_bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    scale, shift = start, start
    if NORM:
        scale = tl.load(norm_weight + channel, mask=channel_ok, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    total = convolve(
        x, token, token_ok, height, width, stride, channel, channel_ok, start,
        top0, top1, top2, mid0, mid1, mid2, low0, low1, low2, NORM,
    )  # fmt: skip
    dtype = conv_out.dtype.element_ty
    if NORM:
        rounded = total.to(dtype)
        value = rounded.to(tl.float32)
        mean = tl.sum(value, axis=1, keep_dims=True) / CHANNELS
        centered = tl.where(channel_ok, value - mean, 0.0)
        variance = tl.sum(centered * centered, axis=1, keep_dims=True) / CHANNELS
        operand = (centered * tl.rsqrt(variance + eps) * scale + shift).to(dtype)
    else:
        rounded = (total * sigmoid(total)).to(dtype)
        operand = rounded
    return operand, rounded


@triton.jit
def load_weight(
    weight, unit, unit_ok, first, LENGTH: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Load weight^T of (units, LENGTH), inputs from `first` on: (BLOCK, units) or (SPLIT, BLOCK / SPLIT, units)."""
    if SPLIT > 1:
        PART: tl.constexpr = BLOCK // SPLIT  # noqa: N806
        k = first + tl.arange(0, SPLIT)[:, None, None] * PART + tl.arange(0, PART)[None, :, None]
        place = weight + unit[None, None, :] * LENGTH + k
        loaded = tl.load(place, mask=unit_ok[None, None, :] & (k < LENGTH), other=0.0)
    else:
        k = first + tl.arange(0, BLOCK)[:, None]
        loaded = tl.load(weight + unit[None, :] * LENGTH + k, mask=unit_ok[None, :] & (k < LENGTH), other=0.0)
    return loaded


@triton.jit
def load_input(
    x, token, num_tokens, first, LENGTH: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Load a product's input (tokens, BLOCK) from `first` on, or (SPLIT, tokens, BLOCK / SPLIT)."""
    token_ok = token < num_tokens
    if SPLIT > 1:
        PART: tl.constexpr = BLOCK // SPLIT  # noqa: N806
        k = first + tl.arange(0, SPLIT)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
        place = x + token[None, :, None] * LENGTH + k
        loaded = tl.load(place, mask=token_ok[None, :, None] & (k < LENGTH), other=0.0)
    else:
        k = first + tl.arange(0, BLOCK)[None, :]
        loaded = tl.load(x + token[:, None] * LENGTH + k, mask=token_ok[:, None] & (k < LENGTH), other=0.0)
    return loaded


@triton.jit
def multiply(value, weight, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Return value weight, (tokens, units) in float32; with SPLIT the sum over the first dimension of both."""
    if SPLIT > 1:
        total = tl.sum(tl.dot(value, weight, input_precision=PRECISION), 0)
    else:
        total = tl.dot(value, weight, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["num_tokens", "height", "width"])
def conv_linear_kernel(
    x, taps, conv_bias, norm_weight, norm_bias, weight, bias, conv_out, out,
    num_tokens, height, width, stride, units, eps,
    NORM: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store conv_out and out = a product with weight^T + bias, or GELU of that.

    NORM: conv_out = x + conv(x), and the product is of LayerNorm(conv_out); else conv_out = SiLU(conv(x)), and of that.
    """
    launch_dependents(PDL)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    unit_ok = unit < units
    matrix = load_weight(weight, unit, unit_ok, 0, CHANNELS, WIDTH, 1)
    operand, beside = convolve_and_norm(
        x, taps, conv_bias, norm_weight, norm_bias, conv_out, token, num_tokens, height, width, stride, eps,
        NORM, CHANNELS, WIDTH, PDL,
    )  # fmt: skip
    if tl.program_id(1) == 0:
        channel = tl.arange(0, WIDTH)[None, :]
        ok = (token < num_tokens)[:, None] & (channel < CHANNELS)
        tl.store(conv_out + token[:, None] * CHANNELS + channel, beside, mask=ok)
    total = tl.dot(operand, matrix, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + unit, mask=unit_ok, other=0.0).to(tl.float32)[None, :]
    if GELU:
        total = gelu(total, PRECISION == "ieee")
    ok = (token < num_tokens)[:, None] & unit_ok[None, :]
    tl.store(out + token[:, None] * units + unit[None, :], total.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_tokens", "height", "width"])
def conv_mlp_kernel(
    x, taps, conv_bias, norm_weight, norm_bias, weight1, bias1, weight2, bias2, out,
    num_tokens, height, width, stride, eps,
    PRECISION: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store out = y + MLP(LayerNorm(y)) with y = x + conv(x)."""
    launch_dependents(PDL)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDTH)
    channel_ok = channel < CHANNELS
    operand, beside = convolve_and_norm(
        x, taps, conv_bias, norm_weight, norm_bias, out, token, num_tokens, height, width, stride, eps,
        True, CHANNELS, WIDTH, PDL,
    )  # fmt: skip
    total = beside.to(tl.float32) + tl.load(bias2 + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    for first in tl.static_range(0, HIDDEN, UNITS):
        unit = first + tl.arange(0, UNITS)
        unit_ok = unit < HIDDEN
        matrix = load_weight(weight1, unit, unit_ok, 0, CHANNELS, WIDTH, 1)
        hidden = tl.dot(operand, matrix, input_precision=PRECISION)
        hidden += tl.load(bias1 + unit, mask=unit_ok, other=0.0).to(tl.float32)[None, :]
        hidden = gelu(hidden, PRECISION == "ieee").to(operand.dtype)
        matrix = load_weight(weight2, channel, channel_ok, first, HIDDEN, UNITS, 1)
        total = tl.dot(hidden, matrix, total, input_precision=PRECISION)
    ok = (token < num_tokens)[:, None] & channel_ok[None, :]
    tl.store(out + token[:, None] * CHANNELS + channel[None, :], total.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_tokens"])
def linear_add_kernel(
    x, weight, bias, residual, out, num_tokens, units,
    PRECISION: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store out = residual + x weight^T + bias; x (num_tokens, LENGTH), out may be residual."""
    launch_dependents(PDL)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    unit_ok = unit < units
    matrix = load_weight(weight, unit, unit_ok, 0, LENGTH, BLOCK, SPLIT)
    later = tl.load(bias + unit, mask=unit_ok, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    index = token[:, None] * units + unit[None, :]
    ok = (token < num_tokens)[:, None] & unit_ok[None, :]
    total = tl.load(residual + index, mask=ok, other=0.0).to(tl.float32) + later[None, :]
    total += multiply(load_input(x, token, num_tokens, 0, LENGTH, BLOCK, SPLIT), matrix, SPLIT, PRECISION)
    for first in tl.static_range(BLOCK, LENGTH, BLOCK):
        matrix = load_weight(weight, unit, unit_ok, first, LENGTH, BLOCK, SPLIT)
        total += multiply(load_input(x, token, num_tokens, first, LENGTH, BLOCK, SPLIT), matrix, SPLIT, PRECISION)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_tokens", "width", "tokens_per_part"])
def few_sums_kernel(
    qk, v, cos, sin, matrix, mean, num_tokens, width, heads, tokens_per_part,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store matrix = rope(k)^T v / N and mean = sum(k) / N of one part of an image's tokens and one head."""
    launch_dependents(PDL)
    wait_for_previous(PDL)
    head_index, part = tl.program_id(0), tl.program_id(1)
    image, head = head_index // heads, head_index % heads
    channels = heads * DIM
    i = tl.arange(0, DIM)
    first_token = image * num_tokens
    start = part * tokens_per_part
    end = tl.minimum(start + tokens_per_part, num_tokens)
    k_pointer = qk + first_token * 2 * channels + channels + head * DIM
    v_pointer = v + first_token * channels + head * DIM
    total, k_sum = sum_keys_and_values(
        k_pointer, v_pointer, cos, sin, start, end, width, head, channels, BLOCK, DIM, PRECISION, MIXED
    )
    base = (head_index * tl.num_programs(1) + part) * DIM
    tl.store(matrix + base * DIM + i[:, None] * DIM + i[None, :], total / num_tokens)
    tl.store(mean + base + i, k_sum / num_tokens)


@triton.jit(do_not_specialize=["num_tokens", "height", "width"])
def attend_gate_kernel(
    qk, v, gate, taps, conv_bias, cos, sin, matrix, mean, out, num_tokens, height, width, heads, gate_stride,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
    MIXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store out = (rope(q) kv / (q . mean) + conv(v)) SiLU(gate) for some tokens of an image and one head.

    kv and mean are sums over PARTS of `few_sums_kernel`; where that is 0 they are computed here.
    """
    launch_dependents(PDL)
    head_index = tl.program_id(0)
    image, head = head_index // heads, head_index % heads
    channels = heads * DIM
    i = tl.arange(0, DIM)
    channel = (head * DIM + i)[None, :]
    channel_ok = channel < channels
    top0, top1, top2, mid0, mid1, mid2, low0, low1, low2 = load_stencil(taps, channel, channel_ok)
    bias = tl.load(conv_bias + channel, mask=channel_ok, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    first_token = image * num_tokens
    position = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    ok = position < num_tokens
    token = first_token + position
    q = load_tokens(qk + first_token * 2 * channels + head * DIM, position, num_tokens, 2 * channels, i)
    g = load_shifted(gate, token, ok, 0, gate_stride, channel, channel_ok)
    c, s = load_angles(cos, sin, position, ok, width, head, channels // 2, DIM // 2, MIXED)
    lepe = convolve(
        v, token, ok, height, width, channels, channel, channel_ok, bias,
        top0, top1, top2, mid0, mid1, mid2, low0, low1, low2, False,
    )  # fmt: skip
    if PARTS:
        kv = tl.zeros((DIM, DIM), dtype=tl.float32)
        mean_k = tl.zeros((DIM,), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            base = (head_index * PARTS + part) * DIM
            kv += tl.load(matrix + base * DIM + i[:, None] * DIM + i[None, :])
            mean_k += tl.load(mean + base + i)
        kv = pinned(kv)
    else:
        k_pointer = qk + first_token * 2 * channels + channels + head * DIM
        v_pointer = v + first_token * channels + head * DIM
        kv, mean_k = sum_keys_and_values(
            k_pointer, v_pointer, cos, sin, 0, num_tokens, width, head, channels, BLOCK, DIM, PRECISION, MIXED
        )
        kv /= num_tokens
        mean_k /= num_tokens
    q, g, c, s = positive(pinned(q.to(tl.float32))), pinned(g.to(tl.float32)), pinned(c), pinned(s)
    inverse = reciprocal(tl.sum(q * mean_k[None, :], 1, keep_dims=True) + NORMALIZER_EPS)
    rotated = rotate(q, c, s, QUERIES, DIM).to(qk.dtype.element_ty)
    result = tl.dot(rotated, kv.to(qk.dtype.element_ty), input_precision=PRECISION) * inverse
    result = (result + lepe) * g * sigmoid(g)
    tl.store(out + token[:, None] * channels + channel, result.to(out.dtype.element_ty), mask=ok[:, None])
