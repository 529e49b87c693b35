"""Triton kernels for linear attention: rope(q) (rope(k)^T v) / N / (q . mean(k)) + lepe(v), times SiLU(gate).

Forward: one pass over k and v sums a (head_dim, head_dim) matrix and the mean of k for each head; one pass over q gives
the attention; the depthwise kernel adds lepe(v) and opens the gate. Backward: one pass over q, gate and the gradient,
and one over k and v. ELU, rotation, normaliser and gate are computed in registers in float32; nothing of them reaches
memory. All are split over tokens into parts with a buffer of their own, so that the order of adding is fixed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.depthwise import conv_gate_forward
from models.kernels.functions import positive, positive_gradient, reciprocal, sigmoid
from models.kernels.launch import num_multiprocessors, on_its_device, precision_of

NORMALISER_EPS = tl.constexpr(1e-6)


@triton.jit
def load_angles(cos, sin, token, token_ok, width, head, half_channels, HALF: tl.constexpr, MIXED: tl.constexpr):
    """cos and sin (tokens, pairs) by which the pairs of this head turn; the tables hold (position, frequency).

    The first half of all pairs turns by the row, the other by the column; MIXED: a head may have pairs of both.
    """
    pair = head * HALF + tl.arange(0, HALF)[None, :]
    frequencies = half_channels // 2
    ok = token_ok[:, None]
    if MIXED:
        is_row = pair < frequencies
        position = tl.where(is_row, (token // width)[:, None], (token % width)[:, None])
        place = position * frequencies + tl.where(is_row, pair, pair - frequencies)
        ok &= pair < half_channels
    else:
        is_row = head * HALF < frequencies
        position = tl.where(is_row, token // width, token % width)
        place = position[:, None] * frequencies + pair - tl.where(is_row, 0, frequencies)
    return tl.load(cos + place, mask=ok, other=1.0), tl.load(sin + place, mask=ok, other=0.0)


@triton.jit
def turn(x, cos, sin, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Each pair (a, b) of x (tokens, DIM) to (a cos - b sin, a sin + b cos)."""
    first, second = tl.split(tl.reshape(x, (BLOCK, DIM // 2, 2)))
    return tl.reshape(tl.join(first * cos - second * sin, first * sin + second * cos), (BLOCK, DIM))


@triton.jit
def load_state(matrix, mean, part_stride, mean_part_stride, head_index, parts, DIM: tl.constexpr):
    """The sums over parts of a (DIM, DIM) matrix and a (DIM,) vector of one image's head."""
    i = tl.arange(0, DIM)
    total = tl.zeros((DIM, DIM), dtype=tl.float32)
    vector = tl.zeros((DIM,), dtype=tl.float32)
    for part in range(parts):
        total += tl.load(matrix + part * part_stride + head_index * DIM * DIM + i[:, None] * DIM + i[None, :])
        vector += tl.load(mean + part * mean_part_stride + head_index * DIM + i)
    return total, vector


@triton.jit
def key_value_kernel(
    qk, v, cos, sin, matrix, mean, num_tokens, width, heads, tokens_per_part,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """matrix = rope(k)^T v / N and mean = sum(k) / N, of one part of one image's tokens and one head."""
    head_index = tl.program_id(0)
    part = tl.program_id(1)
    image, head = head_index // heads, head_index % heads
    channels = heads * DIM
    i = tl.arange(0, DIM)
    k_pointer = qk + image.to(tl.int64) * num_tokens * 2 * channels + channels + head * DIM
    v_pointer = v + image.to(tl.int64) * num_tokens * channels + head * DIM
    total = tl.zeros((DIM, DIM), dtype=tl.float32)
    k_sum = tl.zeros((BLOCK, DIM), dtype=tl.float32)
    end = tl.minimum((part + 1) * tokens_per_part, num_tokens)
    for first in range(part * tokens_per_part, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        ok = token < end
        k = tl.load(k_pointer + token[:, None] * 2 * channels + i[None, :], mask=ok[:, None], other=0.0)
        value = tl.load(v_pointer + token[:, None] * channels + i[None, :], mask=ok[:, None], other=0.0)
        k = tl.where(ok[:, None], positive(k.to(tl.float32)), 0.0)
        k_sum += k
        c, s = load_angles(cos, sin, token, ok, width, head, channels // 2, DIM // 2, MIXED)
        turned = turn(k, c, s, BLOCK, DIM).to(value.dtype)
        total = tl.dot(tl.trans(turned), value, total, input_precision=PRECISION)
    base = (part * tl.num_programs(0) + head_index) * DIM
    tl.store(matrix + base * DIM + i[:, None] * DIM + i[None, :], total / num_tokens)
    tl.store(mean + base + i, tl.sum(k_sum, 0) / num_tokens)


@triton.jit
def attend_kernel(
    qk, cos, sin, matrix, mean, out, num_tokens, width, heads, parts, tokens_per_program,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """out = rope(q) matrix / (q . mean)."""
    head_index = tl.program_id(0)
    image, head = head_index // heads, head_index % heads
    channels = heads * DIM
    channel = head * DIM + tl.arange(0, DIM)[None, :]
    image = image.to(tl.int64) * num_tokens
    kv, mean_k = load_state(
        matrix, mean, tl.num_programs(0) * DIM * DIM, tl.num_programs(0) * DIM, head_index, parts, DIM
    )
    dtype = qk.dtype.element_ty
    kv = kv.to(dtype)
    end = tl.minimum((tl.program_id(1) + 1) * tokens_per_program, num_tokens)
    for first in range(tl.program_id(1) * tokens_per_program, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        ok = token < end
        mask = ok[:, None]
        q = tl.load(qk + (image + token[:, None]) * 2 * channels + channel, mask=mask, other=0.0)
        q = positive(q.to(tl.float32))
        inverse = reciprocal(tl.sum(q * mean_k[None, :], 1, keep_dims=True) + NORMALISER_EPS)
        c, s = load_angles(cos, sin, token, ok, width, head, channels // 2, DIM // 2, MIXED)
        turned = (turn(q, c, s, BLOCK, DIM)).to(dtype)
        result = tl.dot(turned, kv, input_precision=PRECISION) * inverse
        tl.store(out + (image + token[:, None]) * channels + channel, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def query_backward_kernel(
    grad, qk, gate, ungated, cos, sin, matrix, mean, grad_qk, grad_gate, grad_ungated, grad_matrix, grad_mean,
    num_tokens, width, heads, parts, tokens_per_part, gate_stride,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """From grad, that of the output: gradients of gate, of what came before the gate, of q, of matrix and of mean."""
    head_index = tl.program_id(0)
    part = tl.program_id(1)
    image, head = head_index // heads, head_index % heads
    channels = heads * DIM
    i = tl.arange(0, DIM)
    channel = head * DIM + i
    image = image.to(tl.int64) * num_tokens
    kv, mean_k = load_state(
        matrix, mean, tl.num_programs(0) * DIM * DIM, tl.num_programs(0) * DIM, head_index, parts, DIM
    )
    dtype = qk.dtype.element_ty
    kv = kv.to(dtype)
    total = tl.zeros((DIM, DIM), dtype=tl.float32)
    mean_total = tl.zeros((BLOCK, DIM), dtype=tl.float32)
    end = tl.minimum((part + 1) * tokens_per_part, num_tokens)
    for first in range(part * tokens_per_part, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        ok = token < end
        mask = ok[:, None]
        place = (image + token[:, None]) * channels + channel[None, :]
        upstream = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gate + (image + token[:, None]) * gate_stride + channel[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        before = tl.load(ungated + place, mask=mask, other=0.0).to(tl.float32)
        q_place = (image + token[:, None]) * 2 * channels + channel[None, :]
        q_before = tl.load(qk + q_place, mask=mask, other=0.0).to(tl.float32)

        opened = sigmoid(g)
        g_gate = upstream * before * opened * (1.0 + g * (1.0 - opened))
        upstream *= g * opened
        tl.store(grad_gate + place, g_gate.to(grad_gate.dtype.element_ty), mask=mask)
        tl.store(grad_ungated + place, upstream.to(grad_ungated.dtype.element_ty), mask=mask)

        q = positive(q_before)
        c, s = load_angles(cos, sin, token, ok, width, head, channels // 2, DIM // 2, MIXED)
        turned = turn(q, c, s, BLOCK, DIM).to(dtype)
        inverse = reciprocal(tl.sum(q * mean_k[None, :], 1, keep_dims=True) + NORMALISER_EPS)
        attended = tl.dot(turned, kv, input_precision=PRECISION) * inverse
        scaled = upstream * inverse
        g_normaliser = tl.where(mask, -tl.sum(scaled * attended, 1, keep_dims=True), 0.0)
        scaled = scaled.to(dtype)
        g_q = turn(tl.dot(scaled, tl.trans(kv), input_precision=PRECISION), c, -s, BLOCK, DIM)
        g_q = (g_q + g_normaliser * mean_k[None, :]) * positive_gradient(q_before, q)
        tl.store(grad_qk + q_place, g_q.to(grad_qk.dtype.element_ty), mask=mask)
        total = tl.dot(tl.trans(turned), scaled, total, input_precision=PRECISION)
        mean_total += g_normaliser * q
    base = (part * tl.num_programs(0) + head_index) * DIM
    tl.store(grad_matrix + base * DIM + i[:, None] * DIM + i[None, :], total)
    tl.store(grad_mean + base + i, tl.sum(mean_total, 0))


@triton.jit
def key_value_backward_kernel(
    qk, v, cos, sin, grad_matrix, grad_mean, grad_qk, grad_v, num_tokens, width, heads, parts, tokens_per_program,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Gradients of k and of v, the latter without its part through lepe."""
    head_index = tl.program_id(0)
    image, head = head_index // heads, head_index % heads
    channels = heads * DIM
    channel = head * DIM + tl.arange(0, DIM)[None, :]
    image = image.to(tl.int64) * num_tokens
    g_matrix, g_mean = load_state(
        grad_matrix, grad_mean, tl.num_programs(0) * DIM * DIM, tl.num_programs(0) * DIM, head_index, parts, DIM
    )
    dtype = v.dtype.element_ty
    g_matrix = (g_matrix / num_tokens).to(dtype)
    end = tl.minimum((tl.program_id(1) + 1) * tokens_per_program, num_tokens)
    for first in range(tl.program_id(1) * tokens_per_program, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        ok = token < end
        mask = ok[:, None]
        k_place = (image + token[:, None]) * 2 * channels + channels + channel
        place = (image + token[:, None]) * channels + channel
        k_before = tl.load(qk + k_place, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(v + place, mask=mask, other=0.0)
        k = positive(k_before)
        c, s = load_angles(cos, sin, token, ok, width, head, channels // 2, DIM // 2, MIXED)
        turned = turn(k, c, s, BLOCK, DIM).to(dtype)
        g_v = tl.dot(turned, g_matrix, input_precision=PRECISION)
        tl.store(grad_v + place, g_v.to(grad_v.dtype.element_ty), mask=mask)
        g_k = turn(tl.dot(value, tl.trans(g_matrix), input_precision=PRECISION), c, -s, BLOCK, DIM)
        g_k = (g_k + (g_mean / num_tokens)[None, :]) * positive_gradient(k_before, k)
        tl.store(grad_qk + k_place, g_k.to(grad_qk.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """Tokens that a program takes at a time, its warps, and the stages of its pipeline of loads."""

    tokens: int
    warps: int
    stages: int


def num_parts(num_tokens: int, head_count: int, device: torch.device) -> int:
    """Into how many parts an image's tokens are split, so that there are programs enough for the whole GPU."""
    wanted = triton.cdiv(8 * num_multiprocessors(device), head_count)
    return max(1, min(wanted, triton.cdiv(num_tokens, 256), 8))


@on_its_device
def attention_forward(
    qk: Tensor, v: Tensor, gate: Tensor, lepe_weight: Tensor, lepe_bias: Tensor, cos: Tensor, sin: Tensor,
    heads: int, *, keep: bool, parts: int | None = None, tiles: tuple[Tile, Tile] = (Tile(32, 2, 1), Tile(64, 4, 1)),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gated output (B, H, W, C), what came before the gate if `keep`, and the heads' matrices and means by parts.

    qk is (B, H, W, 2 C) and v (B, H, W, C), contiguous; gate is like v, maybe a part of wider tokens; cos and sin are
    (positions, C / 4). `tiles` are those of the two kernels.
    """
    batch, height, width, channels = v.shape
    num_tokens, dim = height * width, channels // heads
    parts = parts or num_parts(num_tokens, batch * heads, v.device)
    matrix = torch.empty(parts, batch * heads, dim, dim, dtype=torch.float32, device=v.device)
    mean = torch.empty(parts, batch * heads, dim, dtype=torch.float32, device=v.device)
    attended = torch.empty_like(v)
    precision = precision_of(v.dtype)
    key_value_kernel[(batch * heads, parts)](
        *(qk, v, cos, sin, matrix, mean, num_tokens, width, heads, triton.cdiv(num_tokens, parts)),
        BLOCK=tiles[0].tokens, DIM=dim, PRECISION=precision, MIXED=heads % 2 == 1, num_warps=tiles[0].warps,
        num_stages=tiles[0].stages,
    )  # fmt: skip
    chunks = max(parts, min(triton.cdiv(num_tokens, 64), 2 * num_multiprocessors(v.device) // (batch * heads)))
    attend_kernel[(batch * heads, chunks)](
        *(qk, cos, sin, matrix, mean, attended, num_tokens, width, heads, parts, triton.cdiv(num_tokens, chunks)),
        BLOCK=tiles[1].tokens, DIM=dim, PRECISION=precision, MIXED=heads % 2 == 1, num_warps=tiles[1].warps,
        num_stages=tiles[1].stages,
    )  # fmt: skip
    out, ungated = conv_gate_forward(v, lepe_weight, lepe_bias, attended, gate, keep=keep)
    return out, ungated, matrix, mean


@on_its_device
def attention_backward(
    grad: Tensor, qk: Tensor, v: Tensor, gate: Tensor, ungated: Tensor, cos: Tensor, sin: Tensor,
    matrix: Tensor, mean: Tensor, heads: int, *, tiles: tuple[Tile, Tile] = (Tile(32, 2, 1), Tile(64, 4, 1)),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qk, of v (without lepe's part), of gate, and of the output before the gate."""
    batch, height, width, channels = v.shape
    num_tokens, dim = height * width, channels // heads
    parts = matrix.shape[0]
    grad_qk, grad_v, grad_gate, grad_ungated = (torch.empty_like(qk), *(torch.empty_like(v) for _ in range(3)))
    grad_matrix, grad_mean = torch.empty_like(matrix), torch.empty_like(mean)
    precision = precision_of(v.dtype)
    query_backward_kernel[(batch * heads, parts)](
        *(grad, qk, gate, ungated, cos, sin, matrix, mean),
        *(grad_qk, grad_gate, grad_ungated, grad_matrix, grad_mean),
        *(num_tokens, width, heads, parts, triton.cdiv(num_tokens, parts), gate.stride(2)),
        BLOCK=tiles[0].tokens, DIM=dim, PRECISION=precision, MIXED=heads % 2 == 1, num_warps=tiles[0].warps,
        num_stages=tiles[0].stages,
    )  # fmt: skip
    key_value_backward_kernel[(batch * heads, parts)](
        *(qk, v, cos, sin, grad_matrix, grad_mean, grad_qk, grad_v),
        *(num_tokens, width, heads, parts, triton.cdiv(num_tokens, parts)),
        BLOCK=tiles[1].tokens, DIM=dim, PRECISION=precision, MIXED=heads % 2 == 1, num_warps=tiles[1].warps,
        num_stages=tiles[1].stages,
    )  # fmt: skip
    return grad_qk, grad_v, grad_gate, grad_ungated
