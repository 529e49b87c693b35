"""Triton kernels of the forget gate's scan; the eager reference is models/unified/scan.py.

A program loops over the tokens with one head's state for BLOCK channels in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.launch import on_its_device

BLOCK = 32  # channels per program: with 32 state rows, one column of the state per thread of a warp


@triton.jit
def scan_kernel(
    q,
    k,
    v,
    delta,
    a,
    out,
    states,
    num_tokens,
    heads,
    rows,
    columns,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write out (B, heads, N, e) and the state before each chunk, states (chunks, B, heads, d, e).

    The next token is loaded while this one is computed.
    """
    head, row = tl.program_id(0), tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = row < rows, column < columns
    ok = row_ok[:, None] & column_ok[None, :]
    offset = row[:, None] * columns + column[None, :]
    rates = tl.load(a + (head % heads) * rows * columns + offset, mask=ok, other=0.0)
    start = head.to(tl.int64) * num_tokens
    states += head.to(tl.int64) * rows * columns
    stride = tl.num_programs(0).to(tl.int64) * rows * columns  # from a chunk's states to the next one's
    state = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    query = tl.load(q + start * rows + row, mask=row_ok, other=0.0)
    key = tl.load(k + start * rows + row, mask=row_ok, other=0.0)
    value = tl.load(v + start * columns + column, mask=column_ok, other=0.0)
    delta_t = tl.load(delta + start * columns + column, mask=column_ok, other=0.0)
    for t in range(num_tokens):
        if t % CHUNK == 0:
            tl.store(states + t // CHUNK * stride + offset, state, mask=ok)
        next_token = start + tl.minimum(t + 1, num_tokens - 1)
        next_query = tl.load(q + next_token * rows + row, mask=row_ok, other=0.0)
        next_key = tl.load(k + next_token * rows + row, mask=row_ok, other=0.0)
        next_value = tl.load(v + next_token * columns + column, mask=column_ok, other=0.0)
        next_delta = tl.load(delta + next_token * columns + column, mask=column_ok, other=0.0)
        state = tl.exp(rates * delta_t[None, :]) * state + key[:, None] * value[None, :]
        tl.store(out + (start + t) * columns + column, tl.sum(query[:, None] * state, axis=0), mask=column_ok)
        query, key, value, delta_t = next_query, next_key, next_value, next_delta


@triton.jit
def scan_backward_kernel(
    grad,
    q,
    k,
    v,
    delta,
    a,
    states,
    scratch,
    grad_q,
    grad_k,
    grad_v,
    grad_delta,
    grad_a,
    num_tokens,
    heads,
    rows,
    columns,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the gradients, from the last chunk to the first.

    For each chunk recompute its states into `scratch` (programs, CHUNK + 1, ROWS, COLUMNS), then go through its tokens
    backwards. Partial sums: grad_q and grad_k are (channel blocks, B, heads, N, d), grad_a is (B, heads, d, e).
    """
    head, block, row = tl.program_id(0), tl.program_id(1), tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = row < rows, column < columns
    ok = row_ok[:, None] & column_ok[None, :]
    offset = row[:, None] * columns + column[None, :]
    rates = tl.load(a + (head % heads) * rows * columns + offset, mask=ok, other=0.0)
    start = head.to(tl.int64) * num_tokens
    states += head.to(tl.int64) * rows * columns
    stride = tl.num_programs(0).to(tl.int64) * rows * columns  # from a chunk's states to the next one's
    part = block.to(tl.int64) * tl.num_programs(0) * num_tokens + start
    chunk_states = scratch + (head.to(tl.int64) * tl.num_programs(1) + block) * (CHUNK + 1) * ROWS * COLUMNS
    chunk_states += row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    carry = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    grad_rates = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    num_chunks = tl.cdiv(num_tokens, CHUNK)
    for index in range(num_chunks):
        chunk = num_chunks - 1 - index
        first = chunk * CHUNK
        length = tl.minimum(CHUNK, num_tokens - first)
        state = tl.load(states + chunk * stride + offset, mask=ok, other=0.0)
        tl.store(chunk_states, state)
        for j in range(length):
            t = start + first + j
            key = tl.load(k + t * rows + row, mask=row_ok, other=0.0)
            value = tl.load(v + t * columns + column, mask=column_ok, other=0.0)
            delta_t = tl.load(delta + t * columns + column, mask=column_ok, other=0.0)
            state = tl.exp(rates * delta_t[None, :]) * state + key[:, None] * value[None, :]
            tl.store(chunk_states + (j + 1) * ROWS * COLUMNS, state)
        tl.debug_barrier()
        for i in range(length):
            j = length - 1 - i
            t = start + first + j
            query = tl.load(q + t * rows + row, mask=row_ok, other=0.0)
            key = tl.load(k + t * rows + row, mask=row_ok, other=0.0)
            value = tl.load(v + t * columns + column, mask=column_ok, other=0.0)
            delta_t = tl.load(delta + t * columns + column, mask=column_ok, other=0.0)
            grad_out = tl.load(grad + t * columns + column, mask=column_ok, other=0.0)
            state_after = tl.load(chunk_states + (j + 1) * ROWS * COLUMNS)
            decay = tl.exp(rates * delta_t[None, :])
            grad_state = query[:, None] * grad_out[None, :] + carry
            tl.store(
                grad_q + (part + first + j) * rows + row,
                tl.sum(state_after * grad_out[None, :], axis=1),
                mask=row_ok,
            )
            tl.store(grad_k + (part + first + j) * rows + row, tl.sum(grad_state * value[None, :], axis=1), mask=row_ok)
            tl.store(grad_v + t * columns + column, tl.sum(grad_state * key[:, None], axis=0), mask=column_ok)
            carry = decay * grad_state
            grad_log_decay = carry * tl.load(chunk_states + j * ROWS * COLUMNS)
            tl.store(grad_delta + t * columns + column, tl.sum(grad_log_decay * rates, axis=0), mask=column_ok)
            grad_rates += grad_log_decay * delta_t[None, :]
        tl.debug_barrier()
    tl.store(grad_a + head.to(tl.int64) * rows * columns + offset, grad_rates, mask=ok)


@on_its_device
def scan(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Compute `models.unified.scan.chunked_scan` with chunks of `chunk` tokens."""
    q, k, v, delta, a = (x.contiguous() for x in (q, k, v, delta, a))
    batch, heads, num_tokens, columns = v.shape
    rows = k.shape[3]
    out = torch.empty_like(v)
    states = v.new_empty(triton.cdiv(num_tokens, chunk), batch, heads, rows, columns)
    height = triton.next_power_of_2(rows)
    grid = (batch * heads, triton.cdiv(columns, BLOCK))
    scan_kernel[grid](
        *(q, k, v, delta, a, out, states, num_tokens, heads, rows, columns),
        CHUNK=chunk,
        ROWS=height,
        COLUMNS=BLOCK,
        num_warps=1,
    )
    return out, states


@on_its_device
def scan_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor, states: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `models.unified.scan.chunked_scan_backward`; `states` are those of `scan`."""
    grad, q, k, v, delta, a = (x.contiguous() for x in (grad, q, k, v, delta, a))
    batch, heads, num_tokens, columns = v.shape
    rows = k.shape[3]
    height = triton.next_power_of_2(rows)
    grid = (batch * heads, triton.cdiv(columns, BLOCK))
    grad_q, grad_k = q.new_empty(grid[1], *q.shape), k.new_empty(grid[1], *k.shape)
    grad_v, grad_delta = torch.empty_like(v), torch.empty_like(delta)
    grad_a = a.new_empty(batch, *a.shape)
    scratch = v.new_empty(*grid, chunk + 1, height, BLOCK)
    scan_backward_kernel[grid](
        *(grad, q, k, v, delta, a, states, scratch, grad_q, grad_k, grad_v, grad_delta, grad_a),
        *(num_tokens, heads, rows, columns),
        CHUNK=chunk,
        ROWS=height,
        COLUMNS=BLOCK,
        num_warps=1,
    )
    return grad_q.sum(dim=0), grad_k.sum(dim=0), grad_v, grad_delta, grad_a.sum(dim=0)
