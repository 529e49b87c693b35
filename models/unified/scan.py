"""The causal recurrence with a forget gate (paper eq. 10): token by token, and in chunks.

For each image, head, state row i and channel c, over the tokens t:

    S_t[i, c] = exp(a[i, c] delta_t[c]) S_(t-1)[i, c] + k_t[i] v_t[c]        y_t[c] = sum over i of q_t[i] S_t[i, c]

with a <= 0 and delta >= 0. In Mamba's letters: q is C, k is B, v is the gated input, a is diag(A), S is h.
"""

import contextlib
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

CHUNK_CPU, CHUNK_GPU = 8, 32  # tokens: what stays in a CPU's cache; what keeps a GPU busy between kernel launches
LARGEST_STATE = 64  # rows, in a kernel
MACS_PER_STATE = 9  # of a token: how papers on selective scans count it, discretisation and read-out included


def step_scan(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor) -> Tensor:
    """The definition, one token after the other; arguments and result are those of `gated_scan`."""
    state = v.new_zeros(*v.shape[:2], *a.shape[1:])  # (B, heads, d, e)
    outputs = []
    for t in range(v.shape[2]):
        decay = torch.exp(a * delta[:, :, t, None, :])  # (B, heads, d, e)
        state = decay * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, :, None] * state).sum(dim=-2))  # (B, heads, e)
    return torch.stack(outputs, dim=2)  # (B, heads, N, e)


def gated_scan(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor, *, kernels: str = "torch") -> Tensor:
    """The recurrence in chunks of tokens: time linear in N, memory for one chunk of states and one state a chunk.

    Every exponent is a sum of a * delta over a stretch of tokens, so never positive: nothing overflows, whatever the
    gates are, and a decay that underflows is a state forgotten. Under autocast it computes in float32.

    Args:
        q, k: (B, heads, N, d).
        v: (B, heads, N, e).
        delta: (B, heads, N, e), not negative.
        a: (heads, d, e), not positive.
        kernels: "torch"; "auto" for Triton where it can; "triton".

    Returns:
        (B, heads, N, e), in float32 under autocast, else in the dtype of v.

    Raises:
        ValueError: `kernels` is "triton", and it cannot.
    """
    with without_autocast(v.device):
        if v.dtype in (torch.float16, torch.bfloat16):
            q, k, v, delta, a = (x.float() for x in (q, k, v, delta, a))
        return chunked_scan(q, k, v, delta, a, kernels_take(kernels, v, a))[0]


def kernels_take(choice: str, v: Tensor, a: Tensor) -> bool:
    """Whether the Triton kernels compute this: float32 on a GPU, with a state that fits the registers."""
    if choice == "torch" or v.device.type == "meta":
        return False
    can = v.device.type == "cuda" and v.dtype == torch.float32 and a.shape[1] <= LARGEST_STATE
    can = can and importlib.util.find_spec("triton") is not None
    if choice == "triton" and not can:
        raise ValueError(
            f"MODEL.KERNELS triton: the forget gate's kernels need CUDA, Triton, states up to {LARGEST_STATE}; "
            "use auto or torch"
        )
    return can


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Turns autocast off, on devices that have it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def chunk_size(v: Tensor) -> int:
    return CHUNK_CPU if v.device.type == "cpu" else CHUNK_GPU


def tokens_first(x: Tensor) -> Tensor:
    """(B, heads, N, width) -> (N, B, heads, width), contiguous: a stretch of tokens is one piece of memory."""
    return x.permute(2, 0, 1, 3).contiguous()


def heads_first(x: Tensor) -> Tensor:
    """(N, B, heads, width) -> (B, heads, N, width)."""
    return x.permute(1, 2, 0, 3).contiguous()


def accumulate(values: Tensor, log_decay: Tensor) -> Tensor:
    """In place: values[t] <- values[t] + exp(log_decay[t]) values[t - 1], for all tokens t of a chunk (L, ...) at once.

    By doubling: after a pass with reach r, values[t] holds the last 2 r tokens' share and log_decay[t] their sum, so
    ceil(log2 L) passes do. Sums of logarithms, not differences of running sums: nothing cancels or overflows.
    """
    reach, length = 1, values.shape[0]
    while reach < length:
        values[reach:] += log_decay[reach:].exp() * values[:-reach]
        if 2 * reach < length:
            log_decay[reach:] += log_decay[:-reach].clone()
        reach *= 2
    return values


@torch.library.custom_op("mlla::chunked_scan", mutates_args=())
def chunked_scan(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor, use_kernels: bool) -> tuple[Tensor, Tensor]:
    """As `gated_scan`, without autocast; also gives the states before each chunk, (chunks, B, heads, d, e)."""
    if use_kernels:
        from models.kernels.triton import scan as kernels

        return kernels.scan(q, k, v, delta, a, chunk_size(v))
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


def chunk_states(k: Tensor, v: Tensor, delta: Tensor, a: Tensor, state: Tensor) -> Tensor:
    """The states after each token of a chunk, (L, B, heads, d, e), from `state` before its first."""
    log_decay = a * delta.unsqueeze(-2)  # (L, B, heads, d, e)
    values = k.unsqueeze(-1) * v.unsqueeze(-2)  # (L, B, heads, d, e)
    values[0] += log_decay[0].exp() * state
    return accumulate(values, log_decay)


@chunked_scan.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor, use_kernels: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    num_chunks = -(-v.shape[2] // chunk_size(v))
    return v.new_empty(v.shape), v.new_empty(num_chunks, *v.shape[:2], *a.shape[1:])


@torch.library.custom_op("mlla::chunked_scan_backward", mutates_args=())
def chunked_scan_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor, states: Tensor, use_kernels: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by q, k, v, delta and a, for `grad` (B, heads, N, e) by the output; the recurrence run backwards.

    The gradient by a state, G_t = q_t grad_t + exp(a delta_(t+1)) G_(t+1), is the same recurrence from the last token
    to the first. The states are computed again from those before each chunk.
    """
    if use_kernels:
        from models.kernels.triton import scan as kernels

        return kernels.scan_backward(grad, q, k, v, delta, a, states, chunk_size(v))
    grad, q, k, v, delta = (tokens_first(x) for x in (grad, q, k, v, delta))
    grad_q, grad_k, grad_v, grad_delta = (torch.empty_like(x) for x in (q, k, v, delta))
    grad_a = torch.zeros_like(a)
    length = chunk_size(v)
    later = torch.zeros_like(states[0])  # what the tokens after this chunk give its last state
    for index in reversed(range(states.shape[0])):
        part = slice(index * length, (index + 1) * length)
        chunk = chunk_states(k[part], v[part], delta[part], a, states[index])  # (L, B, heads, d, e)
        log_decay = a * delta[part].unsqueeze(-2)
        decay = log_decay.exp()

        by_state = (q[part].unsqueeze(-1) * grad[part].unsqueeze(-2)).flip(0)  # (L, B, heads, d, e), last token first
        by_state[0] += later
        shifted = log_decay.flip(0).roll(1, dims=0)  # a token's state decays by the next token's gate
        by_state = accumulate(by_state, shifted).flip(0)
        later = decay[0] * by_state[0]

        grad_q[part] = torch.matmul(chunk, grad[part].unsqueeze(-1)).squeeze(-1)
        grad_k[part] = torch.matmul(by_state, v[part].unsqueeze(-1)).squeeze(-1)
        grad_v[part] = torch.matmul(k[part].unsqueeze(-2), by_state).squeeze(-2)
        by_log = decay.mul_(by_state)
        by_log[0] *= states[index]
        by_log[1:] *= chunk[:-1]
        grad_delta[part] = (by_log * a).sum(dim=-2)
        grad_a += (by_log * delta[part].unsqueeze(-2)).sum(dim=(0, 1))
    return heads_first(grad_q), heads_first(grad_k), heads_first(grad_v), heads_first(grad_delta), grad_a


@chunked_scan_backward.register_fake
def _(_grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:5])


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.use_kernels = inputs
    ctx.save_for_backward(*tensors, output[1])


def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *chunked_scan_backward(grad, *ctx.saved_tensors, ctx.use_kernels), None


chunked_scan.register_autograd(backward, setup_context=keep_for_backward)


@register_flop_formula(torch.ops.mlla.chunked_scan)
def scan_flops(*shapes: Sequence[int], **_shapes_of_results: object) -> int:
    """Of the recurrence, not of its chunks: 9 N C d multiply-accumulates, whatever implementation runs."""
    _, k, v, *_ = shapes
    return 2 * MACS_PER_STATE * math.prod(v) * k[-1]


@register_flop_formula(torch.ops.mlla.chunked_scan_backward)
def scan_backward_flops(*shapes: Sequence[int], **_shapes_of_results: object) -> int:
    """Twice the forward pass, as for a matrix product."""
    _, _, k, v, *_ = shapes
    return 2 * 2 * MACS_PER_STATE * math.prod(v) * k[-1]
