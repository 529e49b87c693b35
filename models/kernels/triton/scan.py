"""Triton kernels for the recurrence of models/unified/scan.py: a program keeps one head's states of a few channels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.triton.launch import on_its_device

BLOCK = 32  # channels of a program: with 32 state rows, a column of the state for each thread of a warp


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
    """out (B, heads, N, e), and the state before each chunk, states (chunks, B, heads, d, e); the next token is loaded
    while the present one is computed.
    """
    pair, row = tl.program_id(0), tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = row < rows, column < columns
    ok = row_ok[:, None] & column_ok[None, :]
    place = row[:, None] * columns + column[None, :]
    rates = tl.load(a + (pair % heads) * rows * columns + place, mask=ok, other=0.0)
    start = pair.to(tl.int64) * num_tokens
    states += pair.to(tl.int64) * rows * columns
    stride = tl.num_programs(0).to(tl.int64) * rows * columns  # from a chunk's states to the next one's
    state = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    reader = tl.load(q + start * rows + row, mask=row_ok, other=0.0)
    key = tl.load(k + start * rows + row, mask=row_ok, other=0.0)
    value = tl.load(v + start * columns + column, mask=column_ok, other=0.0)
    step = tl.load(delta + start * columns + column, mask=column_ok, other=0.0)
    for t in range(num_tokens):
        if t % CHUNK == 0:
            tl.store(states + t // CHUNK * stride + place, state, mask=ok)
        following = start + tl.minimum(t + 1, num_tokens - 1)
        next_reader = tl.load(q + following * rows + row, mask=row_ok, other=0.0)
        next_key = tl.load(k + following * rows + row, mask=row_ok, other=0.0)
        next_value = tl.load(v + following * columns + column, mask=column_ok, other=0.0)
        next_step = tl.load(delta + following * columns + column, mask=column_ok, other=0.0)
        state = tl.exp(rates * step[None, :]) * state + key[:, None] * value[None, :]
        tl.store(out + (start + t) * columns + column, tl.sum(reader[:, None] * state, axis=0), mask=column_ok)
        reader, key, value, step = next_reader, next_key, next_value, next_step


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
    """Chunk after chunk from the last: its states again, into `scratch` (programs, CHUNK + 1, ROWS, COLUMNS), then its
    tokens backwards. grad_q and grad_k are (channel blocks, B, heads, N, d), grad_a is (B, heads, d, e): parts of sums.
    """
    pair, block, row = tl.program_id(0), tl.program_id(1), tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = row < rows, column < columns
    ok = row_ok[:, None] & column_ok[None, :]
    place = row[:, None] * columns + column[None, :]
    rates = tl.load(a + (pair % heads) * rows * columns + place, mask=ok, other=0.0)
    start = pair.to(tl.int64) * num_tokens
    states += pair.to(tl.int64) * rows * columns
    stride = tl.num_programs(0).to(tl.int64) * rows * columns  # from a chunk's states to the next one's
    parts = block.to(tl.int64) * tl.num_programs(0) * num_tokens + start
    kept = scratch + (pair.to(tl.int64) * tl.num_programs(1) + block) * (CHUNK + 1) * ROWS * COLUMNS
    kept += row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    later = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    by_rates = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    num_chunks = tl.cdiv(num_tokens, CHUNK)
    for index in range(num_chunks):
        chunk = num_chunks - 1 - index
        first = chunk * CHUNK
        length = tl.minimum(CHUNK, num_tokens - first)
        state = tl.load(states + chunk * stride + place, mask=ok, other=0.0)
        tl.store(kept, state)
        for j in range(length):
            t = start + first + j
            key = tl.load(k + t * rows + row, mask=row_ok, other=0.0)
            value = tl.load(v + t * columns + column, mask=column_ok, other=0.0)
            step = tl.load(delta + t * columns + column, mask=column_ok, other=0.0)
            state = tl.exp(rates * step[None, :]) * state + key[:, None] * value[None, :]
            tl.store(kept + (j + 1) * ROWS * COLUMNS, state)
        tl.debug_barrier()
        for i in range(length):
            j = length - 1 - i
            t = start + first + j
            reader = tl.load(q + t * rows + row, mask=row_ok, other=0.0)
            key = tl.load(k + t * rows + row, mask=row_ok, other=0.0)
            value = tl.load(v + t * columns + column, mask=column_ok, other=0.0)
            step = tl.load(delta + t * columns + column, mask=column_ok, other=0.0)
            upstream = tl.load(grad + t * columns + column, mask=column_ok, other=0.0)
            after = tl.load(kept + (j + 1) * ROWS * COLUMNS)
            decayed = tl.exp(rates * step[None, :])
            by_state = reader[:, None] * upstream[None, :] + later
            tl.store(grad_q + (parts + first + j) * rows + row, tl.sum(after * upstream[None, :], axis=1), mask=row_ok)
            tl.store(grad_k + (parts + first + j) * rows + row, tl.sum(by_state * value[None, :], axis=1), mask=row_ok)
            tl.store(grad_v + t * columns + column, tl.sum(by_state * key[:, None], axis=0), mask=column_ok)
            later = decayed * by_state
            by_log = later * tl.load(kept + j * ROWS * COLUMNS)
            tl.store(grad_delta + t * columns + column, tl.sum(by_log * rates, axis=0), mask=column_ok)
            by_rates += by_log * step[None, :]
        tl.debug_barrier()
    tl.store(grad_a + pair.to(tl.int64) * rows * columns + place, by_rates, mask=ok)


@on_its_device
def scan(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """As `models.unified.scan.chunked_scan`."""
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
    """As `models.unified.scan.chunked_scan_backward`."""
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
