"""Triton kernels for the gradients of `attention.py`: one pass over q, gate and the gradient, and one over k and v.

Eager reference: autograd of `LinearAttention` in models/attention.py.
"""

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
    rotate,
)
from models.kernels.triton.launch import matmul_precision, on_its_device
from models.kernels.triton.math import positive, positive_gradient, reciprocal, rescale, sigmoid


@triton.jit(do_not_specialize=["num_tokens", "width", "parts", "tokens_per_part"])
def query_backward_kernel(
    grad, scale, qk, gate, ungated, cos, sin, matrix, mean,
    grad_qk, grad_gate, grad_ungated, gated, grad_matrix, grad_mean, sums,
    num_tokens, width, heads, parts, tokens_per_part,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Store the gradients of gate, of the ungated output, of q, of matrix and of mean; and the scaled gated output.

    `grad` is the gradient of the last, scale[image] gated. Sums over tokens of q's and gate's gradients go to rows 0
    and 2 of `sums` (parts, images, 3, channels). A product with ones computes them: its result takes fewer registers
    than the summands.
    """
    head_index = tl.program_id(0)
    part = tl.program_id(1)
    image, head = head_index // heads, head_index % heads
    channels = heads * DIM
    i = tl.arange(0, DIM)
    factor = tl.load(scale + image).to(tl.float32)
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
        upstream, g, ungated_value = grad_next.to(tl.float32), gate_next.to(tl.float32), ungated_next.to(tl.float32)
        upstream = rescale(upstream, factor)
        q_raw = q_next.to(tl.float32)
        grad_next = load_tokens(grad, token + BLOCK, end, channels, i)
        gate_next = load_tokens(gate, token + BLOCK, end, channels, i)
        ungated_next = load_tokens(ungated, token + BLOCK, end, channels, i)
        q_next = load_tokens(qk, token + BLOCK, end, 2 * channels, i)

        index = token[:, None] * channels + i[None, :]
        gate_sigmoid = sigmoid(g)
        g_gate = upstream * ungated_value * gate_sigmoid * (1.0 + g * (1.0 - gate_sigmoid))
        upstream *= g * gate_sigmoid
        gate_sum = tl.dot(ones, g_gate.to(dtype), gate_sum, input_precision=PRECISION)
        tl.store(gated + index, (factor * ungated_value * g * gate_sigmoid).to(gated.dtype.element_ty), mask=mask)
        tl.store(grad_gate + index, g_gate.to(grad_gate.dtype.element_ty), mask=mask)
        tl.store(grad_ungated + index, upstream.to(grad_ungated.dtype.element_ty), mask=mask)

        q = positive(q_raw)
        c, s = load_angles(cos, sin, token, ok, width, head, channels // 2, DIM // 2, MIXED)
        rotated = rotate(q, c, s, BLOCK, DIM).to(dtype)
        inverse = reciprocal(tl.sum(q * mean_k[None, :], 1, keep_dims=True) + NORMALIZER_EPS)
        scaled = (upstream * inverse).to(dtype)
        g_rotated = tl.dot(scaled, tl.trans(kv), input_precision=PRECISION)
        # The normalizer divides the attention (rotated kv) whose product with scaled is that of rotated with g_rotated.
        g_normalizer = -inverse * tl.sum(rotated.to(tl.float32) * g_rotated, 1, keep_dims=True)
        g_q = (rotate(g_rotated, c, -s, BLOCK, DIM) + g_normalizer * mean_k[None, :]) * positive_gradient(q_raw, q)
        tl.store(grad_qk + token[:, None] * 2 * channels + i[None, :], g_q.to(grad_qk.dtype.element_ty), mask=mask)
        total = tl.dot(tl.trans(rotated), scaled, total, input_precision=PRECISION)
        mean_total += g_normalizer * q
        q_sum = tl.dot(ones, tl.where(mask, g_q, 0.0).to(dtype), q_sum, input_precision=PRECISION)
    base = (part * tl.num_programs(0) + head_index) * DIM
    tl.store(grad_matrix + base * DIM + i[:, None] * DIM + i[None, :], total)
    tl.store(grad_mean + base + i, tl.sum(mean_total, 0))
    sums += (part * (tl.num_programs(0) // heads) + head_index // heads) * 3 * channels + head * DIM
    tl.store(sums + i, tl.sum(q_sum, 0) / 16)
    tl.store(sums + 2 * channels + i, tl.sum(gate_sum, 0) / 16)


@triton.jit(do_not_specialize=["num_tokens", "width", "parts", "tokens_per_program"])
def key_value_backward_kernel(
    qk, v, cos, sin, grad_matrix, grad_mean, grad_qk, grad_v, sums, num_tokens, width, heads, parts, tokens_per_program,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Store the gradients of k, and of v without its part through lepe; k's sum over tokens in row 1 of `sums`."""
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
        k_raw, value = k_next.to(tl.float32), value_next
        k_next = load_tokens(qk, token + BLOCK, end, 2 * channels, i)
        value_next = load_tokens(v, token + BLOCK, end, channels, i)
        k = positive(k_raw)
        c, s = load_angles(cos, sin, token, ok, width, head, channels // 2, DIM // 2, MIXED)
        rotated = rotate(k, c, s, BLOCK, DIM).to(dtype)
        g_v = tl.dot(rotated, g_matrix, input_precision=PRECISION)
        tl.store(grad_v + token[:, None] * channels + i[None, :], g_v.to(grad_v.dtype.element_ty), mask=mask)
        g_k = rotate(tl.dot(value, tl.trans(g_matrix), input_precision=PRECISION), c, -s, BLOCK, DIM)
        g_k = (g_k + (g_mean / num_tokens)[None, :]) * positive_gradient(k_raw, k)
        tl.store(grad_qk + token[:, None] * 2 * channels + i[None, :], g_k.to(grad_qk.dtype.element_ty), mask=mask)
        k_sum = tl.dot(ones, tl.where(mask, g_k, 0.0).to(dtype), k_sum, input_precision=PRECISION)
    sums += (tl.program_id(1) * (tl.num_programs(0) // heads) + head_index // heads) * 3 * channels + head * DIM
    tl.store(sums + channels + i, tl.sum(k_sum, 0) / 16)


TILES = Tile(32, 2), Tile(64, 4)  # of the passes over q, and over k and v


def empty_sums(v: Tensor, heads: int) -> Tensor:
    """Return a buffer for sums over the tokens of parts of an image, (parts, 3, C): of gradients of q, k and gate."""
    batch, height, width, channels = v.shape
    parts = num_parts(height * width, batch * heads, v.device, 4) * batch
    return torch.empty(parts, 3, channels, dtype=torch.float32, device=v.device)


@on_its_device
def attention_backward(
    grad: Tensor, scale: Tensor, qk: Tensor, v: Tensor, gate: Tensor, ungated: Tensor, cos: Tensor, sin: Tensor,
    matrix: Tensor, mean: Tensor, heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of qk, v (without lepe's part), gate and ungated output; scaled gated output; and bias sums.

    `grad` is the gradient of the gated output times the scale of its image (B), which is the fifth result. The sums,
    float32 (parts, 3, C), are the gradients of qk and of gate over the tokens of each part.
    """
    batch, height, width, channels = v.shape
    num_tokens, dim, head_count = height * width, channels // heads, batch * heads
    sums = empty_sums(v, heads)
    parts = sums.shape[0] // batch
    grad_qk = torch.empty_like(qk)
    grad_v, grad_gate, grad_ungated, gated = (torch.empty_like(v) for _ in range(4))
    grad_matrix = torch.empty(parts, *matrix.shape[1:], dtype=torch.float32, device=v.device)
    grad_mean = torch.empty(parts, *mean.shape[1:], dtype=torch.float32, device=v.device)
    constants = {"DIM": dim, "PRECISION": matmul_precision(v.dtype), "MIXED": heads % 2 == 1, "num_stages": 1}
    query_backward_kernel[(head_count, parts)](
        *(grad, scale, qk, gate, ungated, cos, sin, matrix, mean),
        *(grad_qk, grad_gate, grad_ungated, gated, grad_matrix, grad_mean, sums),
        *(num_tokens, width, heads, matrix.shape[0], triton.cdiv(num_tokens, parts)),
        BLOCK=TILES[0].tokens, num_warps=TILES[0].warps, **constants,
    )  # fmt: skip
    grad_matrix, grad_mean = few_parts(grad_matrix), few_parts(grad_mean)
    key_value_backward_kernel[(head_count, parts)](
        *(qk, v, cos, sin, grad_matrix, grad_mean, grad_qk, grad_v, sums),
        *(num_tokens, width, heads, grad_matrix.shape[0], triton.cdiv(num_tokens, parts)),
        BLOCK=TILES[1].tokens, num_warps=TILES[1].warps, **constants,
    )  # fmt: skip
    return grad_qk, grad_v, grad_gate, grad_ungated, gated, sums
