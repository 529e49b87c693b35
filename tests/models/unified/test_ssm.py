"""Unified operator: every option against the reference, and its two special cases, Mamba and linear attention."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from models.rope import rotary_tables, rotate_pairs
from models.unified.ssm import ForgetGate, unified_attention, unified_attention_stepwise

HEADS, TOKENS, KEYS, VALUES = 2, 13, 4, 6


def make(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    width = HEADS * VALUES // heads
    q, k = make(3, heads, TOKENS, KEYS), make(3, heads, TOKENS, KEYS, seed=1)
    return q, k, make(3, heads, TOKENS, width, seed=2) - 0.5


def all_options(heads: int = HEADS) -> dict[str, Any]:
    width = HEADS * VALUES // heads
    delta = 0.1 + make(3, heads, TOKENS, width, seed=3)
    return {
        "input_gate": delta,
        "forget_gate": ForgetGate(delta, -make(heads, KEYS, width, seed=4)),
        "shortcut": make(heads, 1, width, seed=5),
        "normalize": False,
        "causal": True,
    }


SUBSETS = [subset for n in range(6) for subset in itertools.combinations(all_options(), n)]


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@pytest.mark.parametrize("heads", [1, HEADS])
def test_every_subset_of_options_equals_the_reference(subset: tuple[str, ...], heads: int) -> None:
    chosen = {name: all_options(heads)[name] for name in subset}
    fast = unified_attention(*qkv(heads), **chosen)
    torch.testing.assert_close(fast, unified_attention_stepwise(*qkv(heads), **chosen), rtol=1e-5, atol=1e-6)


def selective_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Compute equation 10 one channel at a time, in Mamba's notation and shapes, independently of the project's code.

    x, delta (B, N, channels); a (channels, states); b, c (B, N, states); d (channels).
    """
    y = torch.zeros_like(x)
    for image in range(x.shape[0]):
        for channel in range(x.shape[2]):
            h = torch.zeros(a.shape[1], dtype=x.dtype)
            for i in range(x.shape[1]):
                step = delta[image, i, channel]
                h = torch.exp(step * a[channel]) * h + b[image, i] * (step * x[image, i, channel])
                y[image, i, channel] = torch.dot(c[image, i], h) + d[channel] * x[image, i, channel]
    return y


def test_all_options_on_is_mambas_selective_scan() -> None:
    c, b, x = qkv(heads=1)
    gates = all_options(heads=1)
    ours = unified_attention(c, b, x, **gates)
    delta, a = gates["forget_gate"]
    theirs = selective_scan(x[:, 0], delta[:, 0], a[0].T, b[:, 0], c[:, 0], gates["shortcut"].flatten())
    torch.testing.assert_close(ours[:, 0], theirs)


def test_all_options_off_is_linear_attention() -> None:
    q, k, v = qkv()
    weights = q @ k.transpose(-2, -1)  # (B, heads, N, N)
    expected = weights / weights.sum(dim=-1, keepdim=True) @ v
    torch.testing.assert_close(unified_attention(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_causal_is_masked_linear_attention() -> None:
    q, k, v = qkv()
    weights = (q @ k.transpose(-2, -1)).tril()
    expected = weights / weights.sum(dim=-1, keepdim=True) @ v
    torch.testing.assert_close(unified_attention(q, k, v, causal=True), expected, rtol=1e-4, atol=1e-5)


def test_effect_of_each_option() -> None:
    q, k, v = qkv()
    options = all_options()
    baseline = unified_attention(q, k, v)
    gate = options["input_gate"]
    torch.testing.assert_close(unified_attention(q, k, v, input_gate=gate), unified_attention(q, k, gate * v))
    shortcut = unified_attention(q, k, v, shortcut=options["shortcut"])
    torch.testing.assert_close(shortcut - baseline, options["shortcut"] * v)
    normalizer = q @ k.mean(dim=2, keepdim=True).transpose(-2, -1)  # (B, heads, N, 1)
    torch.testing.assert_close(unified_attention(q, k, v, normalize=False) / normalizer, baseline, rtol=1e-4, atol=1e-5)
    gated = unified_attention(q, k, v, forget_gate=options["forget_gate"])
    first = unified_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1])
    torch.testing.assert_close(gated[:, :, :1], first)  # no earlier state to decay
    no_decay = ForgetGate(torch.zeros_like(v), -torch.ones(HEADS, KEYS, VALUES, dtype=v.dtype))
    torch.testing.assert_close(
        unified_attention(q, k, v, forget_gate=no_decay), unified_attention(q, k, v, causal=True)
    )


def test_only_the_numerator_is_rotated() -> None:
    q, k, v = qkv(heads=1)
    cos, sin = rotary_tables(1, TOKENS, KEYS, q.device)
    rotated = rotate_pairs(q, cos[0], sin[0]), rotate_pairs(k, cos[0], sin[0])
    weights = rotated[0] @ rotated[1].transpose(-2, -1)
    expected = weights / (q @ k.transpose(-2, -1)).sum(dim=-1, keepdim=True) @ v
    torch.testing.assert_close(unified_attention(q, k, v, rotated=rotated), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_extreme_gates_stay_finite(dtype: torch.dtype, normalize: bool) -> None:
    """Gates and values from 0 to the range of float16, forward and backward under autocast."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.rand(1, 2, 200, 8, generator=generator) * 1e3 for _ in range(2))
    v = torch.randn(1, 2, 200, 8, generator=generator) * 1e4
    delta = torch.tensor([0.0, 1e-7, 1.0, 6e4]).repeat(50)[:, None].expand(1, 2, 200, 8)
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    gates = delta.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        for forget_gate in (None, ForgetGate(gates, -torch.full((2, 8, 8), 32.0))):
            out = unified_attention(*inputs, input_gate=gates, forget_gate=forget_gate, normalize=normalize)
            assert out.dtype == dtype
            assert torch.isfinite(out).all()
            grads = torch.autograd.grad(out.float().mean() * 1e-6, [gates], retain_graph=True)
            assert torch.isfinite(grads[0]).all()
