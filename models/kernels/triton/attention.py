"""Triton kernels for linear attention: rope(q) (rope(k)^T v) / N / (q . mean(k)) + lepe(v), times SiLU(gate).

Eager reference: `LinearAttention` in models/attention.py.

One pass over k and v sums a (head_dim, head_dim) matrix and the mean of k for each head; one pass over q gives the
attention. For inference of many images with few tokens both passes are one launch. The depthwise kernel adds lepe(v)
and applies the gate. ELU, rotation and normalizer are computed in registers in float32 and do not reach memory. Sums
over tokens are split into parts, each with a buffer of its own, so that the order of additions is fixed. A program
loads its next tokens before it works on the present ones.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.depthwise import conv_gate_forward
from models.kernels.triton.launch import matmul_precision, num_multiprocessors, on_its_device
from models.kernels.triton.math import positive, reciprocal
from models.kernels.triton.sums import sum_parts

NORMALIZER_EPS = tl.constexpr(1e-6)
TOKENS_PER_PART = 256  # at least
MAX_PARTS = 8  # of which kernels add up the sums as they read them
SMALL_ROWS, SMALL_TOKENS = 14, 256  # of images whose attention is one launch in inference


@triton.jit
def load_angles(cos, sin, token, token_ok, width, head, half_channels, HALF: tl.constexpr, MIXED: tl.constexpr):
    """Load cos and sin (tokens, pairs) of this head's rotation from the tables (position, frequency).

    Rows rotate the first half of all pairs, columns the other; MIXED: a head may have pairs of both.
    """
    pair = head * HALF + tl.arange(0, HALF)[None, :]
    frequencies = half_channels // 2
    ok = token_ok[:, None]
    if MIXED:
        is_row = pair < frequencies
        position = tl.where(is_row, (token // width)[:, None], (token % width)[:, None])
        index = position * frequencies + tl.where(is_row, pair, pair - frequencies)
        ok &= pair < half_channels
    else:
        is_row = head * HALF < frequencies
        position = tl.where(is_row, token // width, token % width)
        index = position[:, None] * frequencies + pair - tl.where(is_row, 0, frequencies)
    return tl.load(cos + index, mask=ok, other=1.0), tl.load(sin + index, mask=ok, other=0.0)


@triton.jit
def load_tokens(pointer, token, end, stride, channel):
    """Load (tokens, channels), with zeros for tokens from `end` on."""
    return tl.load(pointer + token[:, None] * stride + channel[None, :], mask=(token < end)[:, None], other=0.0)


@triton.jit
def rotate(x, cos, sin, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Rotate each pair (a, b) of x (tokens, DIM) to (a cos - b sin, a sin + b cos)."""
    first, second = tl.split(tl.reshape(x, (BLOCK, DIM // 2, 2)))
    return tl.reshape(tl.join(first * cos - second * sin, first * sin + second * cos), (BLOCK, DIM))


@triton.jit
def load_state(matrix, mean, part_stride, mean_part_stride, head_index, parts, DIM: tl.constexpr):
    """Load a (DIM, DIM) matrix and a (DIM,) vector of one image's head, summed over parts."""
    i = tl.arange(0, DIM)
    total = tl.zeros((DIM, DIM), dtype=tl.float32)
    vector = tl.zeros((DIM,), dtype=tl.float32)
    for part in range(parts):
        total += tl.load(matrix + part * part_stride + head_index * DIM * DIM + i[:, None] * DIM + i[None, :])
        vector += tl.load(mean + part * mean_part_stride + head_index * DIM + i)
    return total, vector


@triton.jit
def sum_keys_and_values(
    k_pointer, v_pointer, cos, sin, start, end, width, head, channels,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Return rope(k)^T v (DIM, DIM) and the sum of k (DIM,) over tokens from `start` to `end` of one head."""
    i = tl.arange(0, DIM)
    total = tl.zeros((DIM, DIM), dtype=tl.float32)
    k_sum = tl.zeros((BLOCK, DIM), dtype=tl.float32)
    token = start + tl.arange(0, BLOCK)
    k_next = load_tokens(k_pointer, token, end, 2 * channels, i)
    value_next = load_tokens(v_pointer, token, end, channels, i)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        ok = token < end
        k, value = k_next.to(tl.float32), value_next
        k_next = load_tokens(k_pointer, token + BLOCK, end, 2 * channels, i)
        value_next = load_tokens(v_pointer, token + BLOCK, end, channels, i)
        k = tl.where(ok[:, None], positive(k), 0.0)
        k_sum += k
        c, s = load_angles(cos, sin, token, ok, width, head, channels // 2, DIM // 2, MIXED)
        rotated = rotate(k, c, s, BLOCK, DIM).to(value.dtype)
        total = tl.dot(tl.trans(rotated), value, total, input_precision=PRECISION)
    return total, tl.sum(k_sum, 0)


@triton.jit
def attend_to(
    q_pointer, q_next, cos, sin, kv, mean_k, out, start, end, width, head, channels,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Store rope(q) kv / (q . mean_k) for tokens from `start` to `end` of one head; q_next are the first."""
    i = tl.arange(0, DIM)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        ok = token < end
        q = q_next.to(tl.float32)
        q_next = load_tokens(q_pointer, token + BLOCK, end, 2 * channels, i)
        q = positive(q)
        inverse = reciprocal(tl.sum(q * mean_k[None, :], 1, keep_dims=True) + NORMALIZER_EPS)
        c, s = load_angles(cos, sin, token, ok, width, head, channels // 2, DIM // 2, MIXED)
        rotated = rotate(q, c, s, BLOCK, DIM).to(kv.dtype)
        result = tl.dot(rotated, kv, input_precision=PRECISION) * inverse
        tl.store(out + token[:, None] * channels + i[None, :], result.to(out.dtype.element_ty), mask=ok[:, None])


@triton.jit(do_not_specialize=["num_tokens", "width", "tokens_per_part"])
def key_value_kernel(
    qk, v, cos, sin, matrix, mean, num_tokens, width, heads, tokens_per_part,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Store matrix = rope(k)^T v / N and mean = sum(k) / N of one part of an image's tokens and one head."""
    head_index = tl.program_id(0)
    part = tl.program_id(1)
    image, head = head_index // heads, head_index % heads
    channels = heads * DIM
    i = tl.arange(0, DIM)
    k_pointer = qk + image.to(tl.int64) * num_tokens * 2 * channels + channels + head * DIM
    v_pointer = v + image.to(tl.int64) * num_tokens * channels + head * DIM
    start = part * tokens_per_part
    end = tl.minimum(start + tokens_per_part, num_tokens)
    total, k_sum = sum_keys_and_values(
        k_pointer, v_pointer, cos, sin, start, end, width, head, channels, BLOCK, DIM, PRECISION, MIXED
    )
    base = (part * tl.num_programs(0) + head_index) * DIM
    tl.store(matrix + base * DIM + i[:, None] * DIM + i[None, :], total / num_tokens)
    tl.store(mean + base + i, k_sum / num_tokens)


@triton.jit(do_not_specialize=["num_tokens", "width", "parts", "tokens_per_program"])
def attend_kernel(
    qk, cos, sin, matrix, mean, out, num_tokens, width, heads, parts, tokens_per_program,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Store out = rope(q) matrix / (q . mean)."""
    head_index = tl.program_id(0)
    image, head = head_index // heads, head_index % heads
    channels = heads * DIM
    i = tl.arange(0, DIM)
    image = image.to(tl.int64) * num_tokens
    qk += image * 2 * channels + head * DIM
    out += image * channels + head * DIM
    start = tl.program_id(1) * tokens_per_program
    end = tl.minimum(start + tokens_per_program, num_tokens)
    q_next = load_tokens(qk, start + tl.arange(0, BLOCK), end, 2 * channels, i)
    kv, mean_k = load_state(
        matrix, mean, tl.num_programs(0) * DIM * DIM, tl.num_programs(0) * DIM, head_index, parts, DIM
    )
    kv = kv.to(qk.dtype.element_ty)
    attend_to(qk, q_next, cos, sin, kv, mean_k, out, start, end, width, head, channels, BLOCK, DIM, PRECISION, MIXED)


@triton.jit(do_not_specialize=["num_tokens", "width"])
def small_attention_kernel(
    qk, v, cos, sin, out, num_tokens, width, heads,
    BLOCK: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Store out = rope(q) (rope(k)^T v / N) / (q . mean(k)) of one image's head, whose matrix stays in registers."""
    head_index = tl.program_id(0)
    image, head = head_index // heads, head_index % heads
    channels = heads * DIM
    first_token = image.to(tl.int64) * num_tokens
    qk += first_token * 2 * channels + head * DIM
    v += first_token * channels + head * DIM
    out += first_token * channels + head * DIM
    total, k_sum = sum_keys_and_values(
        qk + channels, v, cos, sin, 0, num_tokens, width, head, channels, BLOCK, DIM, PRECISION, MIXED
    )
    kv, mean_k = (total / num_tokens).to(qk.dtype.element_ty), k_sum / num_tokens
    q_next = load_tokens(qk, tl.arange(0, QUERIES), num_tokens, 2 * channels, tl.arange(0, DIM))
    attend_to(
        qk, q_next, cos, sin, kv, mean_k, out, 0, num_tokens, width, head, channels, QUERIES, DIM, PRECISION, MIXED
    )


class Tile(NamedTuple):
    """Tokens that a program takes at a time, and its warps."""

    tokens: int
    warps: int


def num_parts(num_tokens: int, head_count: int, device: torch.device, programs: int) -> int:
    """Return the number of parts of an image's tokens for which `programs` of them run on each multiprocessor."""
    parts = min(programs * num_multiprocessors(device) // head_count, triton.cdiv(num_tokens, TOKENS_PER_PART))
    return max(1, parts if parts > 2 * MAX_PARTS else min(parts, MAX_PARTS))


def forward_parts(num_tokens: int, head_count: int, device: torch.device) -> int:
    """Return the parts of the pass over k and v, whose programs have one warp."""
    return num_parts(num_tokens, head_count, device, 16)


def few_parts(parts: Tensor) -> Tensor:
    """Sum float32 (parts, heads, ...) over parts, unless they are few enough for the kernels that read them."""
    if parts.shape[0] <= MAX_PARTS:
        return parts
    return sum_parts(parts.flatten(1).unsqueeze(1)).view(1, *parts.shape[1:])


def forward_tiles(v: Tensor, dim: int, programs: int) -> tuple[Tile, Tile]:
    """Return the tiles of the passes over k and v and over q that were fastest on an H200 with 32 channels a head."""
    if dim <= 32 and programs >= 2 * num_multiprocessors(v.device):
        return Tile(16, 1), Tile(64, 4)
    # Each program works alone on its multiprocessor. In float32 the products take more registers.
    return Tile(32 if v.dtype == torch.float32 else 64, 4), Tile(64, 4)


def attend(qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the attention (B, H, W, C), and the heads' matrices and means by parts."""
    batch, height, width, channels = v.shape
    num_tokens, dim, head_count = height * width, channels // heads, batch * heads
    parts = forward_parts(num_tokens, head_count, v.device)
    matrix = torch.empty(parts, head_count, dim, dim, dtype=torch.float32, device=v.device)
    mean = torch.empty(parts, head_count, dim, dtype=torch.float32, device=v.device)
    attended = torch.empty_like(v)
    tiles = forward_tiles(v, dim, head_count * parts)
    constants = kernel_constants(v, heads)
    key_value_kernel[(head_count, parts)](
        *(qk, v, cos, sin, matrix, mean, num_tokens, width, heads, triton.cdiv(num_tokens, parts)),
        BLOCK=tiles[0].tokens, num_warps=tiles[0].warps, **constants,
    )  # fmt: skip
    matrix, mean = few_parts(matrix), few_parts(mean)
    chunks = max(1, min(triton.cdiv(num_tokens, 64), 16 * num_multiprocessors(v.device) // head_count))
    attend_kernel[(head_count, chunks)](
        *(qk, cos, sin, matrix, mean, attended, num_tokens, width, heads, matrix.shape[0]),
        triton.cdiv(num_tokens, chunks),
        BLOCK=tiles[1].tokens, num_warps=tiles[1].warps, **constants,
    )  # fmt: skip
    return attended, matrix, mean


def kernel_constants(v: Tensor, heads: int) -> dict[str, int | bool | str]:
    dim = v.shape[-1] // heads
    return {"DIM": dim, "PRECISION": matmul_precision(v.dtype), "MIXED": heads % 2 == 1, "num_stages": 1}


def attend_small(qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Return the attention (B, H, W, C) in one launch, a program for each head of an image."""
    batch, height, width, _ = v.shape
    attended = torch.empty_like(v)
    small_attention_kernel[(batch * heads,)](
        *(qk, v, cos, sin, attended, height * width, width, heads),
        BLOCK=16, QUERIES=32, num_warps=1, **kernel_constants(v, heads),
    )  # fmt: skip
    return attended


def is_small(v: Tensor, heads: int) -> bool:
    """Return whether the images have few tokens, and heads are many and narrow enough to be a program each."""
    batch, height, width, channels = v.shape
    is_few = height <= SMALL_ROWS and height * width <= SMALL_TOKENS
    return is_few and channels <= 32 * heads and batch * heads >= 2 * num_multiprocessors(v.device)


@on_its_device
def attention_forward(
    qk: Tensor, v: Tensor, gate: Tensor, lepe_weight: Tensor, lepe_bias: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gated output and the ungated one (B, H, W, C), and the heads' matrices and means by parts.

    qk (B, H, W, 2 C) and v (B, H, W, C) are contiguous; gate is like v or a slice of wider tokens; cos and sin are
    (positions, C / 4).
    """
    attended, matrix, mean = attend(qk, v, cos, sin, heads)
    return *conv_gate_forward(v, lepe_weight, lepe_bias, attended, gate, keep=True), matrix, mean


@on_its_device
def attention_inference(
    qk: Tensor, v: Tensor, gate: Tensor, lepe_weight: Tensor, lepe_bias: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """Return the gated output alone, of arguments as in `attention_forward`."""
    attended = attend_small(qk, v, cos, sin, heads) if is_small(v, heads) else attend(qk, v, cos, sin, heads)[0]
    return conv_gate_forward(v, lepe_weight, lepe_bias, attended, gate, keep=False)[0]
