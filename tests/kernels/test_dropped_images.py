"""Images whose branch stochastic depth drops: nothing of their gradient reaches the branch, and the rest passes by."""

import pytest
import torch
from torch import Tensor

problems = pytest.importorskip("models.kernels.problems", exc_type=ImportError)

SHAPE, DROPPED = (3, 4, 6, 32), 2  # the problems scale the branches of three images by 1, 2 and 0
OVERFLOWING = 6e4  # near float16's largest number, so that a product with it is infinite


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # of the interpreter
@pytest.mark.parametrize("kernel", ["mixer", "mlp_branch"])
def test_gradients_are_those_of_the_other_images(device: torch.device, kernel: str) -> None:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, of: torch.dtype = torch.float16) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(of).requires_grad_()

    fused, _, inputs = problems.problem(kernel, draw, SHAPE, 16)
    x, cpe, _, *weights = inputs
    cpe.data.zero_()  # the gradient of x is then that of the residual, plus the branch's
    upstream = draw(*SHAPE).detach()
    gradients = []
    for value in (0.0, OVERFLOWING):
        upstream[DROPPED] = value
        assert (upstream @ weights[-2].half()).isinf().any() == bool(value)
        gradients.append(torch.autograd.grad(fused(*inputs), [x, *weights], upstream))
    expected, actual = gradients
    assert actual[0][DROPPED].equal(upstream[DROPPED])
    torch.testing.assert_close(actual[0][:DROPPED], expected[0][:DROPPED])
    torch.testing.assert_close(actual[1:], expected[1:])
    assert all(gradient.any() for gradient in actual)
