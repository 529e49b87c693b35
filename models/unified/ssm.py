"""Mamba and linear attention as one operator (paper eq. 11 and 12), each difference between them a switch."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.attention import NORMALIZER_EPS
from models.unified.scan import gated_scan, without_autocast


class ForgetGate(NamedTuple):
    """A_t = exp(a delta_t): delta (B, heads, N, e), not negative; a (heads, d, e), not positive."""

    delta: Tensor
    a: Tensor


def unified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    input_gate: Tensor | None = None,
    forget_gate: ForgetGate | None = None,
    shortcut: Tensor | None = None,
    normalize: bool = True,
    causal: bool = False,
    rotated: tuple[Tensor, Tensor] | None = None,
    kernels: str = "torch",
) -> Tensor:
    """S_t = A_t * S_(t-1) + k_t^T (gate_t * v_t), Z_t = Z_(t-1) + k_t; y_t = q_t S_t / (q_t Z_t) + D * v_t.

    Linear in N. Without causality every token reads S_N and Z_N; a forget gate makes it causal. The normalizer's Z_t
    has no decay: equation 12 gives it none, and a decayed one would need a second scan, which the paper's FLOPs have no
    room for. Where the division is dropped, q_t S_t is left, and q_t S_N / N without causality, lest it grow with the
    image. Everything is computed in float32 or better.

    Args:
        q, k: (B, heads, N, d), not negative where normalized.
        v: (B, heads, N, e). One head with e = C is Mamba's way: all channels share q and k.
        input_gate: (B, heads, N, e), multiplies v; Mamba's Delta. None: 1.
        forget_gate: None: nothing is forgotten, A = 1.
        shortcut: D, broadcast over (B, heads, N, e). None: 0.
        normalize: divide by q_t Z_t.
        causal: a token sees itself and earlier ones only.
        rotated: q and k for the numerator where they differ from those for the normalizer.
        kernels: what computes the recurrence, see `gated_scan`.

    Returns:
        (B, heads, N, e) in the dtype of v; what float16 cannot hold is its largest number.
    """
    dtype = v.dtype
    with without_autocast(v.device):
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        values = v if input_gate is None else input_gate * v
        q_rotated, k_rotated = (q, k) if rotated is None else rotated
        causal = causal or forget_gate is not None
        if causal:
            delta, a = forget_gate or remember_everything(k, v)
            out = gated_scan(q_rotated, k_rotated, values, delta, a, kernels=kernels)  # (B, heads, N, e)
        else:
            scale = v.shape[2] ** -0.5
            out = q_rotated @ ((k_rotated * scale).transpose(-2, -1) @ (values * scale))  # (B, heads, N, e)
        if normalize:
            keys = k.cumsum(dim=2) if causal else k.mean(dim=2, keepdim=True)  # (B, heads, N or 1, d)
            out = out / ((q * keys).sum(dim=-1, keepdim=True) + NORMALIZER_EPS)
        if shortcut is not None:
            out = out + shortcut * v
        return saturated(out, dtype)


def remember_everything(k: Tensor, v: Tensor) -> ForgetGate:
    return ForgetGate(torch.zeros_like(v), v.new_zeros(v.shape[1], k.shape[3], v.shape[3]))


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; beyond float16's range its largest number, since infinity would end in NaN."""
    if dtype == torch.float16:
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)


def unified_attention_stepwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    input_gate: Tensor | None = None,
    forget_gate: ForgetGate | None = None,
    shortcut: Tensor | None = None,
    normalize: bool = True,
    causal: bool = False,
) -> Tensor:
    """The definition of `unified_attention`, token after token in float64: the slow reference."""
    q, k, v = q.double(), k.double(), v.double()
    num_tokens = v.shape[2]
    state = v.new_zeros(*v.shape[:2], k.shape[3], v.shape[3])  # S, (B, heads, d, e)
    keys = k.new_zeros(*k.shape[:2], k.shape[3])  # Z, (B, heads, d)
    states, sums = [], []
    for t in range(num_tokens):
        value = v[:, :, t] if input_gate is None else input_gate[:, :, t] * v[:, :, t]
        if forget_gate is not None:
            state = torch.exp(forget_gate.a * forget_gate.delta[:, :, t, None, :]) * state
        state = state + k[:, :, t, :, None] * value[:, :, None, :]
        keys = keys + k[:, :, t]
        states.append(state)
        sums.append(keys)
    outputs = []
    for t in range(num_tokens):
        seen = t if causal or forget_gate is not None else num_tokens - 1
        output = (q[:, :, t, :, None] * states[seen]).sum(dim=2)  # (B, heads, e)
        if normalize:
            output = output / ((q[:, :, t] * sums[seen]).sum(dim=-1, keepdim=True) + NORMALIZER_EPS)
        elif not (causal or forget_gate is not None):
            output = output / num_tokens
        outputs.append(output)
    result = torch.stack(outputs, dim=2)  # (B, heads, N, e)
    return result if shortcut is None else result + shortcut * v
