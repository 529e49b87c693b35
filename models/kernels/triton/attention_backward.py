"""Triton kernels for the gradients of `attention.py`: one pass over q, gate and the gradient, and one over k and v."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.attention import (
    NORMALIZER_EPS,
    Tile,
    few_parts,
    load_angles,
    load_state,
    load_tokens,
    num_parts,
    turn,
)
from models.kernels.triton.launch import on_its_device, precision_of
from models.kernels.triton.math import positive, positive_gradient, reciprocal, sigmoid, sum_parts


@triton.jit
def query_backward_kernel(
    grad, qk, gate, ungated, cos, sin, matrix, mean,
    grad_qk, grad_gate, grad_ungated, gated, grad_matrix, grad_mean, sums,
    num_tokens, width, heads, parts, tokens_per_part,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """From grad, that of the output: gradients of gate, of what came before the gate, of q, of matrix and of mean; the
    output once more, gated; and the sums over tokens of q's and gate's gradients, rows 0 and 2 of `sums`
    (parts, images, 3, channels). A product with ones sums them: its result takes fewer registers than the summands.
    """
    head_index = tl.program_id(0)
    part = tl.program_id(1)
    image, head = head_index // heads, head_index % heads
    channels = heads * DIM
    i = tl.arange(0, DIM)
    image = image.to(tl.int64) * num_tokens
    offset = image * channels + head * DIM
    grad, gate, ungated, gated = grad + offset, gate + offset, ungated + offset, gated + offset
    grad_gate, grad_ungated = grad_gate + offset, grad_ungated + offset
    qk, grad_qk = qk + image * 2 * channels + head * DIM, grad_qk + image * 2 * channels + head * DIM
    end = tl.minimum((part + 1) * tokens_per_part, num_tokens)
    token = part * tokens_per_part + tl.arange(0, BLOCK)
    grad_next = load_tokens(grad, token, end, channels, i)
    gate_next = load_tokens(gate, token, end, channels, i)
    ungated_next = load_tokens(ungated, token, end, channels, i)
    q_next = load_tokens(qk, token, end, 2 * channels, i)
    kv, mean_k = load_state(
        matrix, mean, tl.num_programs(0) * DIM * DIM, tl.num_programs(0) * DIM, head_index, parts, DIM
    )
    dtype = qk.dtype.element_ty
    kv = kv.to(dtype)
    total = tl.zeros((DIM, DIM), dtype=tl.float32)
    mean_total = tl.zeros((BLOCK, DIM), dtype=tl.float32)
    ones = tl.full((16, BLOCK), 1.0, dtype=dtype)
    q_sum = tl.zeros((16, DIM), dtype=tl.float32)
    gate_sum = tl.zeros((16, DIM), dtype=tl.float32)
    for first in range(part * tokens_per_part, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        ok = token < end
        mask = ok[:, None]
        upstream, g, before = grad_next.to(tl.float32), gate_next.to(tl.float32), ungated_next.to(tl.float32)
        q_before = q_next.to(tl.float32)
        grad_next = load_tokens(grad, token + BLOCK, end, channels, i)
        gate_next = load_tokens(gate, token + BLOCK, end, channels, i)
        ungated_next = load_tokens(ungated, token + BLOCK, end, channels, i)
        q_next = load_tokens(qk, token + BLOCK, end, 2 * channels, i)

        place = token[:, None] * channels + i[None, :]
        opened = sigmoid(g)
        g_gate = upstream * before * opened * (1.0 + g * (1.0 - opened))
        upstream *= g * opened
        gate_sum = tl.dot(ones, g_gate.to(dtype), gate_sum, input_precision=PRECISION)
        tl.store(gated + place, (before * g * opened).to(gated.dtype.element_ty), mask=mask)
        tl.store(grad_gate + place, g_gate.to(grad_gate.dtype.element_ty), mask=mask)
        tl.store(grad_ungated + place, upstream.to(grad_ungated.dtype.element_ty), mask=mask)

        q = positive(q_before)
        c, s = load_angles(cos, sin, token, ok, width, head, channels // 2, DIM // 2, MIXED)
        turned = turn(q, c, s, BLOCK, DIM).to(dtype)
        inverse = reciprocal(tl.sum(q * mean_k[None, :], 1, keep_dims=True) + NORMALIZER_EPS)
        scaled = (upstream * inverse).to(dtype)
        g_turned = tl.dot(scaled, tl.trans(kv), input_precision=PRECISION)
        # The normalizer divides the attention (turned kv) whose product with scaled is that of turned with g_turned.
        g_normalizer = -inverse * tl.sum(turned.to(tl.float32) * g_turned, 1, keep_dims=True)
        g_q = (turn(g_turned, c, -s, BLOCK, DIM) + g_normalizer * mean_k[None, :]) * positive_gradient(q_before, q)
        tl.store(grad_qk + token[:, None] * 2 * channels + i[None, :], g_q.to(grad_qk.dtype.element_ty), mask=mask)
        total = tl.dot(tl.trans(turned), scaled, total, input_precision=PRECISION)
        mean_total += g_normalizer * q
        q_sum = tl.dot(ones, tl.where(mask, g_q, 0.0).to(dtype), q_sum, input_precision=PRECISION)
    base = (part * tl.num_programs(0) + head_index) * DIM
    tl.store(grad_matrix + base * DIM + i[:, None] * DIM + i[None, :], total)
    tl.store(grad_mean + base + i, tl.sum(mean_total, 0))
    sums += (part * (tl.num_programs(0) // heads) + head_index // heads) * 3 * channels + head * DIM
    tl.store(sums + i, tl.sum(q_sum, 0) / 16)
    tl.store(sums + 2 * channels + i, tl.sum(gate_sum, 0) / 16)


@triton.jit
def key_value_backward_kernel(
    qk, v, cos, sin, grad_matrix, grad_mean, grad_qk, grad_v, sums, num_tokens, width, heads, parts, tokens_per_program,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Gradients of k and of v, the latter without its part through lepe; k's sum over tokens in row 1 of `sums`."""
    head_index = tl.program_id(0)
    image, head = head_index // heads, head_index % heads
    channels = heads * DIM
    i = tl.arange(0, DIM)
    image = image.to(tl.int64) * num_tokens
    k_offset = image * 2 * channels + channels + head * DIM
    qk, grad_qk = qk + k_offset, grad_qk + k_offset
    v, grad_v = v + image * channels + head * DIM, grad_v + image * channels + head * DIM
    start = tl.program_id(1) * tokens_per_program
    end = tl.minimum(start + tokens_per_program, num_tokens)
    k_next = load_tokens(qk, start + tl.arange(0, BLOCK), end, 2 * channels, i)
    value_next = load_tokens(v, start + tl.arange(0, BLOCK), end, channels, i)
    g_matrix, g_mean = load_state(
        grad_matrix, grad_mean, tl.num_programs(0) * DIM * DIM, tl.num_programs(0) * DIM, head_index, parts, DIM
    )
    dtype = v.dtype.element_ty
    g_matrix = (g_matrix / num_tokens).to(dtype)
    ones = tl.full((16, BLOCK), 1.0, dtype=dtype)
    k_sum = tl.zeros((16, DIM), dtype=tl.float32)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        ok = token < end
        mask = ok[:, None]
        k_before, value = k_next.to(tl.float32), value_next
        k_next = load_tokens(qk, token + BLOCK, end, 2 * channels, i)
        value_next = load_tokens(v, token + BLOCK, end, channels, i)
        k = positive(k_before)
        c, s = load_angles(cos, sin, token, ok, width, head, channels // 2, DIM // 2, MIXED)
        turned = turn(k, c, s, BLOCK, DIM).to(dtype)
        g_v = tl.dot(turned, g_matrix, input_precision=PRECISION)
        tl.store(grad_v + token[:, None] * channels + i[None, :], g_v.to(grad_v.dtype.element_ty), mask=mask)
        g_k = turn(tl.dot(value, tl.trans(g_matrix), input_precision=PRECISION), c, -s, BLOCK, DIM)
        g_k = (g_k + (g_mean / num_tokens)[None, :]) * positive_gradient(k_before, k)
        tl.store(grad_qk + token[:, None] * 2 * channels + i[None, :], g_k.to(grad_qk.dtype.element_ty), mask=mask)
        k_sum = tl.dot(ones, tl.where(mask, g_k, 0.0).to(dtype), k_sum, input_precision=PRECISION)
    sums += (tl.program_id(1) * (tl.num_programs(0) // heads) + head_index // heads) * 3 * channels + head * DIM
    tl.store(sums + channels + i, tl.sum(k_sum, 0) / 16)


TILES = Tile(32, 2), Tile(64, 4)  # of the pass over q, and of that over k and v


@on_its_device
def attention_backward(
    grad: Tensor, qk: Tensor, v: Tensor, gate: Tensor, ungated: Tensor, cos: Tensor, sin: Tensor,
    matrix: Tensor, mean: Tensor, heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qk, of v (without lepe's part), of gate, and of the output before the gate; the output once more;
    and float32 (3 C,): sums over tokens of the gradients of qk and of gate.
    """
    batch, height, width, channels = v.shape
    num_tokens, dim, head_count = height * width, channels // heads, batch * heads
    parts = num_parts(num_tokens, head_count, v.device, 4)
    grad_qk = torch.empty_like(qk)
    grad_v, grad_gate, grad_ungated, gated = (torch.empty_like(v) for _ in range(4))
    sums = torch.empty(parts * batch, 3, channels, dtype=torch.float32, device=v.device)
    grad_matrix = torch.empty(parts, *matrix.shape[1:], dtype=torch.float32, device=v.device)
    grad_mean = torch.empty(parts, *mean.shape[1:], dtype=torch.float32, device=v.device)
    options = {"DIM": dim, "PRECISION": precision_of(v.dtype), "MIXED": heads % 2 == 1, "num_stages": 1}
    query_backward_kernel[(head_count, parts)](
        *(grad, qk, gate, ungated, cos, sin, matrix, mean),
        *(grad_qk, grad_gate, grad_ungated, gated, grad_matrix, grad_mean, sums),
        *(num_tokens, width, heads, matrix.shape[0], triton.cdiv(num_tokens, parts)),
        BLOCK=TILES[0].tokens, num_warps=TILES[0].warps, **options,
    )  # fmt: skip
    grad_matrix, grad_mean = few_parts(grad_matrix), few_parts(grad_mean)
    key_value_backward_kernel[(head_count, parts)](
        *(qk, v, cos, sin, grad_matrix, grad_mean, grad_qk, grad_v, sums),
        *(num_tokens, width, heads, grad_matrix.shape[0], triton.cdiv(num_tokens, parts)),
        BLOCK=TILES[1].tokens, num_warps=TILES[1].warps, **options,
    )  # fmt: skip
    return grad_qk, grad_v, grad_gate, grad_ungated, gated, sum_parts(sums)
