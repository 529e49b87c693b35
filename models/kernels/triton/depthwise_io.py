"""Loads and stores of the depthwise kernels: rows of tokens with their neighbors, weights, sums of gradients."""

import triton
import triton.language as tl

from models.kernels.triton.math import as_tile


@triton.jit
def load_row(pointer, row, height, ok0, ok1, ok2, ok3, row_stride, token_stride):
    """Load a pair of tokens of a row between their left and right neighbors; zeros outside the image."""
    inside = (as_tile(row) < height) & (as_tile(row) >= 0)
    here = pointer + row * row_stride
    left = tl.load(here - token_stride, mask=ok0 & inside, other=0.0)
    first = tl.load(here, mask=ok1 & inside, other=0.0)
    second = tl.load(here + token_stride, mask=ok2 & inside, other=0.0)
    right = tl.load(here + 2 * token_stride, mask=ok3 & inside, other=0.0)
    return left, first, second, right


@triton.jit
def load_pair(pointer, row, height, ok1, ok2, row_stride, token_stride):
    """Load a pair of tokens of a row; zeros outside the image."""
    inside = as_tile(row) < height
    here = pointer + row * row_stride
    first = tl.load(here, mask=ok1 & inside, other=0.0)
    second = tl.load(here + token_stride, mask=ok2 & inside, other=0.0)
    return first, second


@triton.jit
def load_gate(attended, gate, row, height, ok1, ok2, width, channels, gate_token_stride):
    """Load attention's output and the gate for a pair of a row's tokens."""
    inside = as_tile(row) < height
    attended += row * width * channels
    gate += row * width * gate_token_stride
    first = tl.load(attended, mask=ok1 & inside, other=0.0)
    second = tl.load(attended + channels, mask=ok2 & inside, other=0.0)
    first_gate = tl.load(gate, mask=ok1 & inside, other=0.0)
    second_gate = tl.load(gate + gate_token_stride, mask=ok2 & inside, other=0.0)
    return first, second, first_gate, second_gate


@triton.jit
def load_taps(weight, channel, channel_ok, row: tl.constexpr):
    """Load the three weights of one row of the stencil, each (1, channels)."""
    base = weight + channel * 9 + row * 3
    first = tl.load(base, mask=channel_ok, other=0.0).to(tl.float32)
    second = tl.load(base + 1, mask=channel_ok, other=0.0).to(tl.float32)
    third = tl.load(base + 2, mask=channel_ok, other=0.0).to(tl.float32)
    return first, second, third


@triton.jit
def load_stencil(weight, channel, channel_ok):
    """Load the nine weights, row by row, each (1, channels)."""
    top0, top1, top2 = load_taps(weight, channel, channel_ok, 0)
    mid0, mid1, mid2 = load_taps(weight, channel, channel_ok, 1)
    low0, low1, low2 = load_taps(weight, channel, channel_ok, 2)
    return top0, top1, top2, mid0, mid1, mid2, low0, low1, low2


@triton.jit
def store_sums(
    target, channels, channel_ok, t0, t1, t2, m0, m1, m2, l0, l1, l2, total, input_sum, INPUT_BIAS: tl.constexpr
):  # fmt: skip
    """Store a program's sums over tokens, (10, channels): gradients of the nine taps, then of the bias.

    With INPUT_BIAS, (11, channels): also of a bias that was added to the convolution's input.
    """
    tl.store(target, tl.sum(t0, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + channels, tl.sum(t1, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 2 * channels, tl.sum(t2, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 3 * channels, tl.sum(m0, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 4 * channels, tl.sum(m1, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 5 * channels, tl.sum(m2, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 6 * channels, tl.sum(l0, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 7 * channels, tl.sum(l1, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 8 * channels, tl.sum(l2, 0, keep_dims=True), mask=channel_ok)
    tl.store(target + 9 * channels, tl.sum(total, 0, keep_dims=True), mask=channel_ok)
    if INPUT_BIAS:
        tl.store(target + 10 * channels, tl.sum(input_sum, 0, keep_dims=True), mask=channel_ok)


@triton.jit
def to_float(a, b, c, d):
    return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
