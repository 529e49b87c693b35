"""Chunked scan: agreement with the token-by-token reference, gradients, extreme gates; Triton on a GPU."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.kernels.scan import supports_scan, triton_scan, use_scan_kernels
from models.unified import scan
from models.unified.block import Switches, UnifiedAttention
from models.unified.scan import chunked_scan, gated_scan, step_scan


def scan_inputs(
    num_tokens: int, *, heads: int = 2, d: int = 3, e: int = 4, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    q, k = (torch.rand(2, heads, num_tokens, d, generator=generator) for _ in range(2))
    v = torch.randn(2, heads, num_tokens, e, generator=generator)
    delta = torch.rand(2, heads, num_tokens, e, generator=generator)
    a = -torch.rand(heads, d, e, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, delta, a)]


def test_values_by_hand() -> None:
    """One state, halved at each token: 1, 1/2 + 2, 5/4 + 3; multiplied by q = 1, 10, 100."""
    q = torch.tensor([1.0, 10.0, 100.0]).reshape(1, 1, 3, 1)
    k = torch.ones(1, 1, 3, 1)
    v = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1)
    out = gated_scan(q, k, v, torch.full((1, 1, 3, 1), 2.0), torch.full((1, 1, 1), -0.34657359))
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 25.0, 425.0]))


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 37])
@pytest.mark.parametrize("chunk", [1, 5, 8, 64])
def test_chunked_scan_equals_reference(monkeypatch: pytest.MonkeyPatch, num_tokens: int, chunk: int) -> None:
    monkeypatch.setattr(scan, "CHUNK_CPU", chunk)
    inputs = scan_inputs(num_tokens)
    fast, slow = gated_scan(*inputs), step_scan(*inputs)
    torch.testing.assert_close(fast, slow)
    grad = torch.randn_like(slow)
    for one, other in zip(
        torch.autograd.grad(fast, inputs, grad), torch.autograd.grad(slow, inputs, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_gradients_pass_gradcheck() -> None:
    assert torch.autograd.gradcheck(gated_scan, scan_inputs(11, heads=2, d=2, e=2))


@pytest.mark.parametrize("log_decay", [0.0, -1e-7, -69.0, -1e4, -1e30])
def test_extreme_decays_stay_finite_and_exact(log_decay: float) -> None:
    """Decays between none, a factor of 1e-30 per token, and full decay."""
    inputs = [x.detach().float().requires_grad_() for x in scan_inputs(40)]
    with torch.no_grad():
        inputs[3].fill_(1.0)
        inputs[4].fill_(log_decay)
    fast, exact = gated_scan(*inputs), step_scan(*(x.double() for x in inputs))
    torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-5)
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(fast.sum(), inputs))


def test_gates_that_vary_by_token_stay_exact() -> None:
    """Zeros beside huge values: differences of running sums would lose the small ones."""
    q, k, v, delta, a = (x.detach().float() for x in scan_inputs(64))
    delta = delta * torch.tensor([0.0, 1e-6, 1.0, 1e4]).repeat(16)[:, None]
    exact = step_scan(*(x.double() for x in (q, k, v, delta, a)))
    torch.testing.assert_close(gated_scan(q, k, v, delta, a).double(), exact, rtol=1e-5, atol=1e-5)


def test_scan_is_causal() -> None:
    q, k, v, delta, a = (x.detach() for x in scan_inputs(20))
    before = gated_scan(q, k, v, delta, a)
    v[:, :, 13:] += 100.0
    delta[:, :, 13:] += 5.0
    after = gated_scan(q, k, v, delta, a)
    torch.testing.assert_close(before[:, :, :13], after[:, :, :13])
    assert not torch.allclose(before[:, :, 13:], after[:, :, 13:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_computes_in_float32(dtype: torch.dtype) -> None:
    inputs = [x.detach().float() for x in scan_inputs(30)]
    exact = gated_scan(*inputs)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(gated_scan(*inputs), exact)
        low = gated_scan(*(x.to(dtype) for x in inputs))
    assert low.dtype == torch.float32
    assert (low - exact).norm() / exact.norm() < 0.02


def test_flops_are_linear_in_tokens() -> None:
    """Nine multiply-accumulates per token, channel and state row; twice as many backward."""
    for num_tokens in (16, 32):
        inputs = scan_inputs(num_tokens, heads=2, d=3, e=4)
        with FlopCounterMode(display=False) as counter:
            out = gated_scan(*inputs)
            assert counter.get_total_flops() == 2 * 9 * 2 * num_tokens * 8 * 3
            out.sum().backward()
        assert counter.get_total_flops() == 3 * 2 * 9 * 2 * num_tokens * 8 * 3


@pytest.mark.slow
def test_operator_passes_opcheck() -> None:
    """Fake tensors, autograd and aliasing, as torch.compile needs them."""
    inputs = scan_inputs(9)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(scan.chunked_scan, tuple(inputs), test_utils=tests)


def test_without_triton_auto_falls_back_and_triton_raises() -> None:
    inputs = [torch.rand(1, 1, 4, 3) for _ in range(4)]
    a = -torch.rand(1, 3, 3)
    attention = UnifiedAttention(3, 1, 3, Switches(forget_gate=True))
    for mode in ("torch", "auto"):
        use_scan_kernels(attention, mode)
        assert torch.equal(attention.scan(*inputs, a), gated_scan(*inputs, a))
    use_scan_kernels(attention, "triton")
    with pytest.raises(ValueError, match=r"MODEL\.KERNELS triton: .* use auto or torch"):
        attention.scan(*inputs, a)
    empty = [x[:0] for x in inputs]
    assert attention.scan(*empty, a).shape == (0, 1, 4, 3)  # nothing to compute, for no kernel


@pytest.mark.parametrize(("dtype", "rows", "reason"), [(torch.float64, 3, "torch.float64"), (torch.float32, 65, "65")])
def test_triton_names_what_the_scan_does_not_support(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, reason: str
) -> None:
    monkeypatch.setattr("models.kernels.dispatch.missing_triton", lambda _device: "")
    v, a = torch.zeros(1, 1, 4, 3, dtype=dtype), -torch.ones(1, rows, 3, dtype=dtype)
    assert not supports_scan("auto", v, a)
    with pytest.raises(ValueError, match=reason):
        supports_scan("triton", v, a)
    assert supports_scan("triton", v.float(), a[:, :3].float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(2, 2, 100, 32, 32), (1, 1, 70, 32, 96), (3, 2, 33, 16, 16), (1, 1, 5, 3, 5)])
def test_triton_scan_on_a_gpu(shape: tuple[int, ...]) -> None:
    batch, heads, num_tokens, d, e = shape
    q, k = (torch.rand(batch, heads, num_tokens, d, device="cuda") for _ in range(2))
    v, delta = torch.randn(batch, heads, num_tokens, e, device="cuda"), torch.rand(batch, heads, num_tokens, e).cuda()
    inputs = [x.requires_grad_() for x in (q, k, v, delta, -torch.rand(heads, d, e, device="cuda"))]
    assert supports_scan("triton", v, inputs[4])
    exact = step_scan(*(x.double() for x in inputs))
    grad = torch.randn_like(v)
    expected = torch.autograd.grad(exact, inputs, grad.double())
    for operator in (triton_scan, chunked_scan):
        out = gated_scan(*inputs, operator=operator)
        torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-4)
        for actual, wanted in zip(torch.autograd.grad(out, inputs, grad), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)
