"""The stem's first convolution: images in any memory, few programs, autocast, compiled, folded, gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import prepare_for_inference, use_kernels
from models.kernels import inference
from models.layers import Stem

ops = pytest.importorskip("models.kernels.ops", exc_type=ImportError)
stem_kernels = pytest.importorskip("models.kernels.triton.stem", exc_type=ImportError)


@pytest.fixture
def packed(device: torch.device) -> Tensor:
    """Images as a loader returns them."""
    torch.manual_seed(0)
    return torch.randn(2, 3, 12, 16, device=device).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def stems(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """(fused, eager) with the same weights."""
    torch.manual_seed(1)
    eager, fused = Stem(3, 16).to(device).eval(), use_kernels(Stem(3, 16), "triton").to(device).eval()
    fused.load_state_dict(eager.state_dict())
    return fused, eager


def test_few_programs_sum_over_many_blocks(packed: Tensor) -> None:
    weight = torch.randn(24, 3, 3, 3, device=packed.device).contiguous(memory_format=torch.channels_last)
    weight.requires_grad_()
    expected = F.conv2d(packed, weight, stride=2, padding=1)
    few = {"tile": (16, 4, 1), "programs_per_multiprocessor": 1}
    torch.testing.assert_close(stem_kernels.stem_forward(packed, weight, None, torch.float32, **few), expected)
    upstream = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, weight, upstream)
    found = stem_kernels.stem_backward(upstream, packed, weight, **few)
    torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("memory", ["packed", "planes", "strided", "odd"])
def test_images_in_any_memory(
    packed: Tensor, stems: tuple[nn.Module, nn.Module], memory: str, dtype: torch.dtype
) -> None:
    device, (fused, eager) = packed.device.type, stems
    compiled = torch.compile(fused, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    images = {
        "packed": packed,
        "planes": packed.contiguous(),
        "strided": torch.randn(2, 24, 3, 20, device=device).permute(0, 2, 3, 1)[..., 1::2],  # (2, 3, 20, 12)
        "odd": packed[..., 1:],
    }[memory]
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        outputs = [model(images) for model in (eager, fused, compiled)]
        with torch.no_grad():
            folded = prepare_for_inference(fused, dtype)(images)
    weights = [model.conv1.conv.weight for model in (eager, fused, fused)]  # type: ignore[union-attr]
    gradients = [torch.autograd.grad(o.float().sum(), w)[0] for o, w in zip(outputs, weights, strict=True)]
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 1e-2}
    for output in (*outputs[1:], folded):
        torch.testing.assert_close(output, outputs[0], **close)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < close["rtol"] * gradients[0].norm()


@pytest.mark.parametrize("case", ["kernel", "few pixels", "float32", "a hook", "wide"])
def test_prepared_layers(packed: Tensor, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The layers with stride 1 are a kernel where they are what it computes, in 16 bits, for many pixels."""
    device, dtype = packed.device.type, torch.float32 if case == "float32" else torch.float16
    torch.manual_seed(1)
    eager = Stem(3, 112 if case == "wide" else 16).to(packed.device).eval()
    for module in eager.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    expected = eager(packed).detach()
    if case == "a hook":
        eager.conv2[1].register_forward_hook(lambda *_: None)  # type: ignore[operator]
    launched = []
    layer = ops.stem_layer
    monkeypatch.setattr(inference, "MANY_PIXELS", packed.shape[0] * 6 * 8 + (case == "few pixels"))
    monkeypatch.setattr(ops, "stem_layer", lambda *args: launched.append(1) or layer(*args))
    prepared = prepare_for_inference(use_kernels(eager, "triton"), dtype)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32), torch.no_grad():
        tokens = prepared(packed)
    torch.testing.assert_close(tokens.float(), expected, atol=3e-2, rtol=3e-2)
    assert len(launched) == 2 * (case == "kernel")


def test_images_that_need_a_gradient_get_it(packed: Tensor, stems: tuple[nn.Module, nn.Module]) -> None:
    packed.requires_grad_()
    by_fused, by_eager = (torch.autograd.grad(stem(packed).sum(), packed)[0] for stem in stems)
    torch.testing.assert_close(by_fused, by_eager)


def test_a_residual_may_be_the_input(device: torch.device) -> None:
    torch.manual_seed(1)
    shapes = (1, 8, 6, 8), (8, 8, 3, 3), (8,)
    x, weight, bias = (torch.randn(*shape, device=device, dtype=torch.float16) for shape in shapes)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = x.double() + nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    torch.testing.assert_close(ops.stem_layer(x, weight, bias, x).double(), expected, atol=1e-2, rtol=1e-2)
