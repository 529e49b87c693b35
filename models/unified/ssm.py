"""Mamba and linear attention as one operator (paper eq. 11 and 12), with each difference between them as an option."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.attention import NORMALIZER_EPS
from models.unified.scan import gated_scan, without_autocast

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class ForgetGate(NamedTuple):
    """Decay A_t = exp(a delta_t) of the state: delta (B, heads, N, e), not negative; a (heads, d, e), not positive."""

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
    scan: Scan = gated_scan,
) -> Tensor:
    """S_t = A_t * S_(t-1) + k_t^T (gate_t * v_t), Z_t = Z_(t-1) + k_t; y_t = q_t S_t / (q_t Z_t) + D * v_t.

    With every option on, and one head, this is Mamba's selective state space (eq. 11); with all off, linear attention
    (eq. 12). Linear in N. Without causality every token uses S_N and Z_N; a forget gate makes it causal. Z_t does not
    decay: equation 12 has no decay there, and it would take a second scan, more than the paper's FLOPs. Without
    normalization the output is q_t S_t, or if not causal q_t S_N / N, which does not grow with the image. Computed in
    float32 or better.

    Args:
        q, k: (B, heads, N, d), not negative if normalized.
        v: (B, heads, N, e). Mamba has one head with e = C: all channels share q and k.
        input_gate: (B, heads, N, e), multiplies v; Mamba's Delta. None: 1.
        forget_gate: None: no decay, A = 1.
        shortcut: D, broadcast over (B, heads, N, e). None: 0.
        normalize: divide by q_t Z_t.
        causal: a token uses itself and earlier tokens only.
        rotated: q and k after rotary embedding, for the numerator; the normalizer uses q and k.
        scan: computes the causal recurrence, with the arguments of `gated_scan`.

    Returns:
        (B, heads, N, e) in the dtype of v, clamped to its range if that is float16.
    """
    dtype = v.dtype
    with without_autocast(v.device):
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        values = v if input_gate is None else input_gate * v
        q_rotated, k_rotated = (q, k) if rotated is None else rotated
        causal = causal or forget_gate is not None
        if causal:
            delta, a = forget_gate or no_decay(k, v)
            out = scan(q_rotated, k_rotated, values, delta, a)  # (B, heads, N, e)
        else:
            scale = v.shape[2] ** -0.5
            out = q_rotated @ ((k_rotated * scale).transpose(-2, -1) @ (values * scale))  # (B, heads, N, e)
        if normalize:
            keys = k.cumsum(dim=2) if causal else k.mean(dim=2, keepdim=True)  # (B, heads, N or 1, d)
            out = out / ((q * keys).sum(dim=-1, keepdim=True) + NORMALIZER_EPS)
        if shortcut is not None:
            out = out + shortcut * v
        return saturating_cast(out, dtype)


def no_decay(k: Tensor, v: Tensor) -> ForgetGate:
    """Return the forget gate with A = 1, for k (B, heads, N, d) and v (B, heads, N, e)."""
    return ForgetGate(torch.zeros_like(v), v.new_zeros(v.shape[1], k.shape[3], v.shape[3]))


def saturating_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast x to `dtype`, clamped to the range of float16, since infinity would lead to NaN."""
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
    """Reference for `unified_attention`: token by token, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    num_tokens = v.shape[2]
    state = v.new_zeros(*v.shape[:2], k.shape[3], v.shape[3])  # S, (B, heads, d, e)
    key_sum = k.new_zeros(*k.shape[:2], k.shape[3])  # Z, (B, heads, d)
    states, key_sums = [], []
    for t in range(num_tokens):
        value = v[:, :, t] if input_gate is None else input_gate[:, :, t] * v[:, :, t]
        if forget_gate is not None:
            state = torch.exp(forget_gate.a * forget_gate.delta[:, :, t, None, :]) * state
        state = state + k[:, :, t, :, None] * value[:, :, None, :]
        key_sum = key_sum + k[:, :, t]
        states.append(state)
        key_sums.append(key_sum)
    outputs = []
    for t in range(num_tokens):
        last = t if causal or forget_gate is not None else num_tokens - 1
        output = (q[:, :, t, :, None] * states[last]).sum(dim=2)  # (B, heads, e)
        if normalize:
            output = output / ((q[:, :, t] * key_sums[last]).sum(dim=-1, keepdim=True) + NORMALIZER_EPS)
        elif not (causal or forget_gate is not None):
            output = output / num_tokens
        outputs.append(output)
    result = torch.stack(outputs, dim=2)  # (B, heads, N, e)
    return result if shortcut is None else result + shortcut * v
