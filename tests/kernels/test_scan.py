"""The scan's kernels beside the token-by-token reference; tests/models/unified/test_scan.py has a GPU's."""

import pytest
import torch

from models.kernels.scan import triton_scan
from models.unified.scan import gated_scan, step_scan

kernels = pytest.importorskip("models.kernels.triton.scan", exc_type=ImportError)


@pytest.mark.parametrize(
    ("batch", "heads", "num_tokens", "d", "e", "chunk"),
    [(2, 2, 11, 3, 5, 4), (1, 1, 9, 4, 40, 16), (2, 3, 8, 8, 8, 8), (1, 1, 1, 4, 4, 8)],
)
def test_scan_in_the_interpreter(
    device: torch.device, batch: int, heads: int, num_tokens: int, d: int, e: int, chunk: int
) -> None:
    if device.type != "cpu":
        pytest.skip("for the interpreter")
    torch.manual_seed(0)
    q, k = (torch.rand(batch, heads, num_tokens, d, requires_grad=True) for _ in range(2))
    v = torch.randn(batch, heads, num_tokens, e, requires_grad=True)
    delta = (3 * torch.rand(batch, heads, num_tokens, e)).requires_grad_()
    inputs = [q, k, v, delta, (-torch.rand(heads, d, e)).requires_grad_()]
    exact = step_scan(*inputs)
    grad = torch.randn_like(exact)
    expected = torch.autograd.grad(exact, inputs, grad)
    close = {"rtol": 1e-4, "atol": 1e-5}
    values = [x.detach() for x in inputs]
    out, states = kernels.scan(*values, chunk)
    torch.testing.assert_close(out, exact.detach(), **close)
    torch.testing.assert_close(list(kernels.scan_backward(grad, *values, states, chunk)), list(expected), **close)
    out = gated_scan(*inputs, operator=triton_scan)
    torch.testing.assert_close([out, *torch.autograd.grad(out, inputs, grad)], [exact, *expected], **close)
