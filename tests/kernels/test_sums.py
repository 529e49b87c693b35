"""Sums over parts: several buffers in one launch, and the buffers that kernels leave."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

sums = pytest.importorskip("models.kernels.triton.sums", exc_type=ImportError)
ops = pytest.importorskip("models.kernels.ops", exc_type=ImportError)
launch = pytest.importorskip("models.kernels.triton.launch", exc_type=ImportError)
crop_kernels = pytest.importorskip("data.crop_kernels", exc_type=ImportError)

SHAPES = [(300, 1, 48), (7, 3, 16), (1, 11, 20), (256, 10, 32), (513, 9, 4)]  # parts, rows, channels


@pytest.fixture
def draw(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def reference_sum(buffer: Tensor) -> Tensor:
    """Sum over parts in float64; the taps of a depthwise weight by channel."""
    total = buffer.double().sum(0)  # (rows, C)
    num_taps = 9 if len(total) >= 9 else 0
    return torch.cat([total[:num_taps].t().flatten(), total[num_taps:].flatten()])


@pytest.mark.parametrize("count", range(1, len(SHAPES) + 1))
def test_buffers_in_one_launch(draw: Callable[..., Tensor], count: int) -> None:
    """Odd sizes beside each other, in a fixed order: a launch gives the same bits each time.

    A buffer alone may give others, since the compiler shares out a tile by what divides the sizes of all buffers.
    """
    buffers = [draw(*shape) for shape in SHAPES[:count]]
    total = sums.sum_parts(*buffers)
    torch.testing.assert_close(total.double(), torch.cat([reference_sum(b) for b in buffers]), atol=1e-4, rtol=1e-5)
    assert total.equal(sums.sum_parts(*buffers))


def test_programs_without_tokens_store_zeros(draw: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers' sizes do not depend on the number of tokens, so that some programs have none."""
    monkeypatch.setattr(sums, "num_multiprocessors", lambda _: 8)
    x, taps, bias, scale = draw(1, 2, 4, 16), draw(16, 1, 3, 3), draw(16), draw(1, 1, 1, 1)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
    try:
        buffers = [
            ops.conv_backward(x, x, taps, None, True, False)[1],
            ops.wide_conv_backward(draw(1, 1, 2, 16), x, taps, draw(1, 1, 2, 16))[1],
            ops.norm_backward(x, x, x, scale, bias, bias, 1e-5)[1],
            ops.gelu_backward(x, scale, x)[2],
        ]
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
    assert [tuple(buffer.shape) for buffer in buffers] == [(32, rows, 16) for rows in (10, 11, 3, 1)]
    for buffer in buffers:
        assert buffer[0].any()
        assert not buffer[-1].any()
        assert buffer.isfinite().all()


@pytest.mark.usefixtures("replaceable_launches")
def test_only_the_networks_kernels_can_be_left_out(draw: Callable[..., Tensor], device: torch.device) -> None:
    """While a step is compiled ahead, another thread may prepare images with kernels."""
    buffer = draw(*SHAPES[0])
    images = torch.ones(1, 3, 16, 16).to(device, memory_format=torch.channels_last)
    total = sums.sum_parts(buffer)
    with launch.without_launches():
        left_out = sums.sum_parts(buffer.clone() + 1)
        crop_kernels.erase_with_kernel(images, torch.tensor([[0, 2, 3, 4, 5, 7]]), "const")
    assert images.sum() == 3 * (16 * 16 - 4 * 5)
    assert not left_out.equal(sums.sum_parts(buffer + 1))
    assert sums.sum_parts(buffer).equal(total)
