"""Causal scan with a forget gate (paper eq. 10): the token-by-token reference, and the chunked form for models.

For each image and head, state row i and channel c, over tokens t:

    S_t[i, c] = exp(a[i, c] delta_t[c]) S_(t-1)[i, c] + k_t[i] v_t[c]        y_t[c] = sum over i of q_t[i] S_t[i, c]

with a <= 0 and delta >= 0. In Mamba's notation: q is C, k is B, v is the gated input, a is diag(A), S is h.
Shapes: B images, N tokens, d state rows (the width of q and k), e channels per head. models/kernels/scan.py is the same
with Triton.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula

CHUNK_CPU, CHUNK_GPU = 8, 32  # tokens: fits a CPU's cache; keeps a GPU busy between kernel launches
MACS_PER_STATE = 9  # per token: the usual count for selective scans, discretization and output included

ScanOperator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def step_scan(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor) -> Tensor:
    """Reference: equation 10 token by token; arguments and result are those of `gated_scan`."""
    state = v.new_zeros(*v.shape[:2], *a.shape[1:])  # (B, heads, d, e)
    outputs = []
    for t in range(v.shape[2]):
        decay = torch.exp(a * delta[:, :, t, None, :])  # (B, heads, d, e)
        state = decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, :, None] * state).sum(dim=-2))  # (B, heads, e)
    return torch.stack(outputs, dim=2)  # (B, heads, N, e)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which autocast is off, also for devices that have none."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def chunk_size(v: Tensor) -> int:
    """Return the number of tokens per chunk on the device of v."""
    return CHUNK_CPU if v.device.type == "cpu" else CHUNK_GPU


def tokens_first(x: Tensor) -> Tensor:
    """(B, heads, N, width) -> (N, B, heads, width), contiguous, so that a chunk is one piece of memory."""
    return x.permute(2, 0, 1, 3).contiguous()


def heads_first(x: Tensor) -> Tensor:
    """(N, B, heads, width) -> (B, heads, N, width)."""
    return x.permute(1, 2, 0, 3).contiguous()


def accumulate(values: Tensor, log_decay: Tensor) -> Tensor:
    """In place: values[t] <- values[t] + exp(log_decay[t]) values[t - 1], for all tokens t of a chunk (L, ...) at once.

    Prefix scan by doubling, in ceil(log2 L) passes: after the pass with reach r, values[t] holds the contributions of
    the last 2 r tokens and log_decay[t] the sum of their logarithms. Sums, not differences of running sums, so that
    nothing cancels or overflows.
    """
    reach, length = 1, values.shape[0]
    while reach < length:
        values[reach:] += log_decay[reach:].exp() * values[:-reach]
        if 2 * reach < length:
            log_decay[reach:] += log_decay[:-reach].clone()
        reach *= 2
    return values


def chunk_states(k: Tensor, v: Tensor, delta: Tensor, a: Tensor, state: Tensor) -> Tensor:
    """Return the states after each token of a chunk, (L, B, heads, d, e), given the `state` before its first token."""
    log_decay = a * delta.unsqueeze(-2)  # (L, B, heads, d, e)
    values = k.unsqueeze(-1) * v.unsqueeze(-2)  # (L, B, heads, d, e)
    values[0] += log_decay[0].exp() * state
    return accumulate(values, log_decay)


@torch.library.custom_op("mlla::chunked_scan", mutates_args=())
def chunked_scan(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of `gated_scan` and the states before each chunk, (chunks, B, heads, d, e)."""
    q, k, v, delta = (tokens_first(x) for x in (q, k, v, delta))
    length = chunk_size(v)
    state = v.new_zeros(*v.shape[1:3], *a.shape[1:])  # (B, heads, d, e)
    outputs, states = torch.empty_like(v), []
    for start in range(0, v.shape[0], length):
        part = slice(start, start + length)
        states.append(state)
        chunk = chunk_states(k[part], v[part], delta[part], a, state)  # (L, B, heads, d, e)
        outputs[part] = torch.matmul(q[part].unsqueeze(-2), chunk).squeeze(-2)  # (L, B, heads, e)
        state = chunk[-1].clone()
    return heads_first(outputs), torch.stack(states)


@torch.library.custom_op("mlla::chunked_scan_backward", mutates_args=())
def chunked_scan_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, delta and a, given `grad` (B, heads, N, e) of the output.

    The gradient of a state, G_t = q_t grad_t + exp(a delta_(t+1)) G_(t+1), is the same scan from the last token to the
    first. The states within a chunk are recomputed from the one before it.
    """
    grad, q, k, v, delta = (tokens_first(x) for x in (grad, q, k, v, delta))
    grad_q, grad_k, grad_v, grad_delta = (torch.empty_like(x) for x in (q, k, v, delta))
    grad_a = torch.zeros_like(a)
    length = chunk_size(v)
    carry = torch.zeros_like(states[0])  # gradient of the chunk's last state from later tokens, (B, heads, d, e)
    for index in reversed(range(states.shape[0])):
        part = slice(index * length, (index + 1) * length)
        chunk = chunk_states(k[part], v[part], delta[part], a, states[index])  # (L, B, heads, d, e)
        log_decay = a * delta[part].unsqueeze(-2)
        decay = log_decay.exp()

        grad_states = (q[part].unsqueeze(-1) * grad[part].unsqueeze(-2)).flip(0)  # (L, B, heads, d, e), reversed
        grad_states[0] += carry
        shifted = log_decay.flip(0).roll(1, dims=0)  # the next token's gate decays a token's state
        grad_states = accumulate(grad_states, shifted).flip(0)
        carry = decay[0] * grad_states[0]

        grad_q[part] = torch.matmul(chunk, grad[part].unsqueeze(-1)).squeeze(-1)
        grad_k[part] = torch.matmul(grad_states, v[part].unsqueeze(-1)).squeeze(-1)
        grad_v[part] = torch.matmul(k[part].unsqueeze(-2), grad_states).squeeze(-2)
        grad_log_decay = decay.mul_(grad_states)
        grad_log_decay[0] *= states[index]
        grad_log_decay[1:] *= chunk[:-1]
        grad_delta[part] = (grad_log_decay * a).sum(dim=-2)
        grad_a += (grad_log_decay * delta[part].unsqueeze(-2)).sum(dim=(0, 1))
    return heads_first(grad_q), heads_first(grad_k), heads_first(grad_v), heads_first(grad_delta), grad_a


def register_scan(forward: CustomOpDef, backward: CustomOpDef, *, name: str) -> None:
    """Give a scan and its backward operator, mlla::`name` and mlla::`name`_backward, shapes, autograd and FLOP counts.

    FLOPs are counted as 9 N C d multiply-accumulates, whatever implementation runs, and twice as many backward.
    """

    @forward.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        num_chunks = -(-v.shape[2] // chunk_size(v))
        return v.new_empty(v.shape), v.new_empty(num_chunks, *v.shape[:2], *a.shape[1:])

    @backward.register_fake
    def _(_grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape) for x in inputs[:5])

    def keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])

    def compute_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return backward(grad, *ctx.saved_tensors)

    forward.register_autograd(compute_gradients, setup_context=keep_for_backward)

    @register_flop_formula(getattr(torch.ops.mlla, name))
    def _(*shapes: Sequence[int], **_shapes_of_results: object) -> int:
        _, k, v, *_ = shapes
        return 2 * MACS_PER_STATE * math.prod(v) * k[-1]

    @register_flop_formula(getattr(torch.ops.mlla, f"{name}_backward"))
    def _(*shapes: Sequence[int], **_shapes_of_results: object) -> int:
        _, _, k, v, *_ = shapes
        return 2 * 2 * MACS_PER_STATE * math.prod(v) * k[-1]


register_scan(chunked_scan, chunked_scan_backward, name="chunked_scan")


def gated_scan(
    q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor, *, operator: ScanOperator = chunked_scan
) -> Tensor:
    """Compute the scan in chunks: time linear in N, memory for the states of one chunk and one state per chunk.

    Every exponent is a sum of a * delta over consecutive tokens, so never positive: nothing overflows, whatever the
    gates are, and a decay that underflows is a state that is forgotten. Under autocast it computes in float32.

    Args:
        q, k: (B, heads, N, d).
        v: (B, heads, N, e).
        delta: (B, heads, N, e), not negative.
        a: (heads, d, e), not positive.
        operator: what computes it, with the arguments and results of `chunked_scan`.

    Returns:
        (B, heads, N, e), in float32 under autocast or for 16-bit inputs, else in the dtype of v.
    """
    with without_autocast(v.device):
        if v.dtype in (torch.float16, torch.bfloat16):
            q, k, v, delta, a = (x.float() for x in (q, k, v, delta, a))
        return operator(q, k, v, delta, a)[0]
