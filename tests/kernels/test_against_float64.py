"""Each kernel, forward and backward, beside float64: odd sizes, widths that are no power of two, several head dims."""

import pytest
import torch

from models.kernels.fused_modules import WIDEST_FUSED_MLP, WIDEST_STEM, WIDEST_STEM_LAYER
from models.kernels.self_test import ONLY_16_BITS, SECONDS

autograd = pytest.importorskip("models.kernels.autograd", exc_type=ImportError)
problems = pytest.importorskip("models.kernels.problems", exc_type=ImportError)
inference_halves = pytest.importorskip("models.kernels.inference_halves", exc_type=ImportError)
attention = pytest.importorskip("models.kernels.triton.attention", exc_type=ImportError)
depthwise = pytest.importorskip("models.kernels.triton.depthwise", exc_type=ImportError)

KERNELS = sorted(SECONDS)
WIDEST = {"mlp": WIDEST_FUSED_MLP, "stem_conv": WIDEST_STEM, "stem_conv_relu": WIDEST_STEM}
WIDEST |= {"stem_layer": WIDEST_STEM_LAYER}
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SHAPES = [  # channels, head dim, rows, dtype; bfloat16 and the larger ones on a GPU only
    (48, 16, 6, torch.float32),
    (48, 16, 6, torch.float16),
    (48, 16, 6, torch.bfloat16),
    (32, 32, 17, torch.float32),
    (512, 32, 7, torch.bfloat16),
    (256, 64, 14, torch.float32),
    (192, 32, 56, torch.bfloat16),
]
CASES = [
    (kernel, *shape)
    for kernel in KERNELS
    for shape in SHAPES
    if shape[0] <= WIDEST.get(kernel, shape[0]) and not (kernel in ONLY_16_BITS and shape[3] == torch.float32)
]


@pytest.mark.parametrize(("kernel", "channels", "head_dim", "rows", "dtype"), CASES, ids=lambda value: str(value))
def test_kernel(device: torch.device, kernel: str, channels: int, head_dim: int, rows: int, dtype: torch.dtype) -> None:
    """In 16 bits each result is as near as that of eager PyTorch under autocast, but for one rounding."""
    if device.type == "cpu" and (dtype == torch.bfloat16 or channels > 48):
        pytest.skip("Triton's interpreter computes no products of bfloat16, and is slow")
    batch = problems.full_batch(device, channels) if channels == 512 else 2
    case = kernel, device, dtype, channels, head_dim
    errors = problems.relative_errors(*case, rows=rows, batch=batch)
    bounds = [1e-5] * len(errors)
    if dtype != torch.float32:
        eager = problems.relative_errors(*case, rows=rows, batch=batch, eager=True)
        bounds = [ROUNDING[dtype] + 1.3 * error for error in eager]
    assert all(e < b for e, b in zip(errors, bounds, strict=True)), (errors, bounds)


def test_attention_in_many_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TOKENS_PER_PART", 4)
    monkeypatch.setattr(attention, "num_multiprocessors", lambda _: 64)
    assert attention.forward_parts(17 * problems.COLUMNS, 1, device) > attention.MAX_PARTS
    assert problems.largest_error("mixer", device, torch.float32, 32, 32, rows=17, batch=1) < 1e-5


@pytest.mark.parametrize("is_small", [False, True])
def test_attention_of_inference_in_one_launch_and_in_two(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, is_small: bool
) -> None:
    launched = []
    attend = attention.attend_small
    monkeypatch.setattr(attention, "SMALL_TOKENS", 10 * problems.COLUMNS - (not is_small))
    monkeypatch.setattr(attention, "attend_small", lambda *args: launched.append(1) or attend(*args))
    batch = 2 * attention.num_multiprocessors(device)
    assert problems.largest_error("inference_mixer", device, torch.float32, 48, 16, rows=10, batch=batch) < 1e-5
    assert bool(launched) is is_small


@pytest.mark.parametrize("has_later_bias", [False, True])
@pytest.mark.parametrize("rows", [5, 17])
def test_wide_tokens_are_normalized_in_a_launch_of_their_own(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, rows: int, has_later_bias: bool
) -> None:
    monkeypatch.setattr(depthwise, "WIDEST_NORM", 128)
    monkeypatch.setattr(depthwise, "MANY_TOKENS", rows)
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    channels = 160
    x, weight, bias, scale, shift = draw(1, rows, 5, channels), draw(channels, 1, 3, 3), *draw(3, channels)
    later = draw(channels) if has_later_bias else None
    launched = []
    norm = depthwise.norm_forward
    monkeypatch.setattr(depthwise, "norm_forward", lambda *args: launched.append(1) or norm(*args))
    out, normed = depthwise.conv_norm_forward(x, weight, bias, scale, shift, 1e-5, later)
    expected = x.double() + problems.conv(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(out.double(), expected if later is None else expected + later, rtol=1e-5, atol=1e-5)
    expected = torch.nn.functional.layer_norm(expected, (channels,), scale.double(), shift.double())
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-5)
    assert launched == [1]


def test_mlp_that_keeps_its_hidden_layer(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "WIDEST_HIDDEN_AGAIN", 0)
    assert problems.largest_error("mlp_branch", device, torch.float32, 48, 16, rows=6, batch=1) < 1e-5


def test_prepared_mlp_of_wide_tokens(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_halves, "WIDEST_FUSED_MLP", 0)
    assert problems.largest_error("inference_mlp", device, torch.float32, 48, 16, rows=6, batch=1) < 1e-5
