"""The kernels beside float64 and the golden numbers; test_kernels.py runs it, with words of the checks' names if any:
`python tests/kernels/kernel_worker.py stem trial`.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from models import MLLA, prepare_for_inference
from models.kernels import autograd, dispatch, ops, self_test
from models.kernels.fused_modules import WIDEST_FUSED_MLP
from models.kernels.matmul import linear_again
from models.kernels.triton import attention, stem
from models.layers import WIDEST_STEM, Stem
from tests.helpers import GOLDEN, MICRO, fill_weights, random_values
from tests.kernels.kernel_process import DEVICE, run_checks

KERNELS = ("mixer", "mlp_branch", "mlp", "wide_conv", "stem_conv", "stem_conv_relu")
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# Triton's interpreter computes no products of bfloat16.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))


def check_against_float64() -> None:
    """Forward and backward, in odd sizes, widths that are no power of two, several head dims; in 16 bits each
    result is as near as that of plain PyTorch under autocast, but for one rounding.
    """
    shapes = {(48, 16, 6): DTYPES, (32, 32, 17): DTYPES[:1]}
    if DEVICE == "cuda":
        shapes |= {(512, 32, 7): DTYPES[2:], (256, 64, 14): DTYPES[:1], (192, 32, 56): DTYPES[2:]}
    device = torch.device(DEVICE)
    widest = {"mlp": WIDEST_FUSED_MLP, "stem_conv": WIDEST_STEM, "stem_conv_relu": WIDEST_STEM}
    for kernel in KERNELS:
        for (channels, head_width, rows), dtypes in shapes.items():
            if channels > widest.get(kernel, channels):
                continue
            for dtype in dtypes:
                batch = self_test.full_batch(device, channels) if channels == 512 else 2
                case = kernel, device, dtype, channels, head_width
                errors = self_test.relative_errors(*case, rows=rows, batch=batch)
                bounds = [1e-5] * len(errors)
                if dtype != torch.float32:
                    eager = self_test.relative_errors(*case, rows=rows, batch=batch, eager=True)
                    bounds = [ROUNDING[dtype] + 1.3 * error for error in eager]
                assert all(e < b for e, b in zip(errors, bounds, strict=True)), (*case, rows, errors, bounds)
    tokens, multiprocessors = attention.TOKENS_A_PART, attention.num_multiprocessors
    attention.TOKENS_A_PART, attention.num_multiprocessors = 4, lambda _: 64  # many parts of each image
    assert attention.forward_parts(17 * self_test.COLUMNS, 1, device) > attention.MOST_PARTS
    assert self_test.largest_error("mixer", device, torch.float32, 32, 32, rows=17, batch=1) < 1e-5
    attention.TOKENS_A_PART, attention.num_multiprocessors = tokens, multiprocessors
    widest, autograd.WIDEST_HIDDEN_AGAIN = autograd.WIDEST_HIDDEN_AGAIN, 0  # the hidden layer is kept
    assert self_test.largest_error("mlp_branch", device, torch.float32, 48, 16, rows=6, batch=1) < 1e-5
    autograd.WIDEST_HIDDEN_AGAIN = widest


def check_golden_gradients() -> None:
    """The official model's loss and gradients with the kernels on; too long for the interpreter."""
    if DEVICE == "cpu":
        return
    golden = np.load(GOLDEN / "mlla_micro_64_grad.npz")
    model = MLLA(**MICRO, num_classes=10, kernels="triton").train()
    fill_weights(model)
    model.to(DEVICE)
    images = random_values(1, 4, 3, 64, 64).to(DEVICE).requires_grad_()
    loss = F.cross_entropy(model(images), random_values(101, 4, 10).softmax(1).to(DEVICE))
    loss.backward()
    assert abs(loss.item() - golden["loss"].item()) < 1e-5
    assert images.grad is not None
    largest = np.abs(golden["grad_input"]).max()
    np.testing.assert_allclose(images.grad.cpu(), golden["grad_input"], atol=1e-3 * largest)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        np.testing.assert_allclose(
            parameter.grad.norm().item(), golden[f"gradnorm/{name}"].item(), rtol=1e-3, atol=1e-6, err_msg=name
        )


def check_golden_logits() -> None:
    model = MLLA(**MICRO, num_classes=10, kernels="triton").eval()
    fill_weights(model)
    with torch.no_grad():
        logits = model.to(DEVICE)(random_values(0, 2, 3, 64, 64).to(DEVICE))
    np.testing.assert_allclose(logits.cpu(), np.load(GOLDEN / "mlla_micro_64.npz")["logits"], atol=1e-4)


def check_prepared_model() -> None:
    """Joined products, sums inside of them, and on the GPU cuBLAS's GELU: in 16 bits no worse than the plain path."""
    config = {**MICRO, "embed_dim": 64, "num_heads": (2, 4, 8, 16)} if DEVICE == "cuda" else MICRO
    model = MLLA(**config, num_classes=10, kernels="triton").eval()
    fill_weights(model)
    model.to(DEVICE)
    without = MLLA(**config, num_classes=10, kernels="torch").eval().to(DEVICE)
    without.load_state_dict(model.state_dict())
    plain = MLLA(**config, num_classes=10, kernels="torch").eval().to(DEVICE)
    plain.load_state_dict(model.state_dict())
    side = 64 if DEVICE == "cuda" else 32  # the interpreter is slow
    images = random_values(0, 2, 3, side, side).to(DEVICE)
    with torch.no_grad():
        expected = plain.double()(images.double())
        plain.float()
        for dtype in (torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])):
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                prepared = [prepare_for_inference(m, dtype)(images) for m in (model, without)]
                logits = [*prepared, plain(images)]
            errors = [((x.double() - expected).norm() / expected.norm()).item() for x in logits]
            words = "{}, relative error of logits: kernels {:.2e}, plain path {:.2e}, as it was {:.2e}"
            print(words.format(dtype, *errors))
            assert max(errors[:2]) < 1.3 * errors[2] + 1e-6


def check_operators() -> None:
    """Schemas, fake tensors and gradients' registration, as torch.compile relies on them."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    device = torch.device(DEVICE)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def check(operator: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        torch.library.opcheck(operator, arguments, test_utils=tests)
        return operator(*arguments)

    x, scale, taps, bias = draw(1, 4, 6, 32), draw(1, 1, 1, 1), draw(32, 1, 3, 3), draw(32)
    table, qk = draw(6, 8), draw(1, 4, 6, 64)
    check(ops.conv_norm, x, taps, bias, bias, bias, 1e-5)
    check(ops.norm_backward, x, x, x, bias, bias, 1e-5)
    check(ops.conv_silu, x, taps, bias, True)
    check(ops.conv_silu, x, taps, bias, False)
    check(ops.conv_backward, x, x, taps, None, True, False)
    check(ops.conv_backward, x, x, taps, x, False, True)
    wide = check(ops.strided_conv, x, taps, bias)
    check(ops.wide_conv_backward, wide, x, taps, wide)
    check(linear_again, x, draw(64, 32), draw(64))
    check(ops.gelu, x)
    check(ops.gelu_backward, x, x)
    check(ops.scale_and_sum, x, scale)
    _, ungated, *state = check(ops.linear_attention, qk, x, x, taps, bias, table, table, 2, True)
    check(ops.linear_attention_backward, x, qk, x, x, ungated, table, table, *state, 2)
    check(ops.mlp, x, draw(128, 32), draw(128), draw(32, 128), bias, x)
    images, weight = draw(1, 3, 4, 8), draw(8, 3, 3, 3).requires_grad_()
    packed = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for parameter in (weight, packed):
        torch.library.opcheck(ops.stem_conv, (images, parameter, torch.float16), test_utils=tests)
        gradient = images.new_ones(1, 8, 2, 4), images, parameter.detach()
        torch.library.opcheck(ops.stem_conv_backward, gradient, test_utils=tests)
    folded = images, weight.detach(), draw(8), torch.float16
    torch.library.opcheck(ops.stem_conv_relu, folded, test_utils=tests)


def check_stem() -> None:
    """Few programs sum over many blocks; autocast's dtype from float32 images in any memory, compiled, folded; and
    where images need a gradient, they get it.
    """
    torch.manual_seed(0)
    packed = torch.randn(3, 3, 20, 24, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(24, 3, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = F.conv2d(packed, weight, stride=2, padding=1)
    few = {"tile": (16, 4, 1), "programs_a_multiprocessor": 1}
    torch.testing.assert_close(stem.stem_forward(packed, weight, None, torch.float32, **few), expected)
    upstream = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, weight, upstream)
    torch.testing.assert_close(stem.stem_backward(upstream, packed, weight, **few), gradient, atol=1e-4, rtol=1e-4)

    fused, plain = Stem(3, 16, "triton").to(DEVICE).eval(), Stem(3, 16, "torch").to(DEVICE).eval()
    plain.load_state_dict(fused.state_dict())
    compiled = torch.compile(fused, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    strided = torch.randn(2, 40, 3, 52, device=DEVICE).permute(0, 2, 3, 1)[..., 1::2]  # (2, 3, 52, 20)
    for images in (packed, packed.contiguous(), strided, packed[..., 1:]):
        for dtype in (torch.float32, torch.float16):
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                outputs = [model(images) for model in (plain, fused, compiled)]
                with torch.no_grad():
                    outputs.append(prepare_for_inference(fused, dtype)(images))
            gradients = [torch.autograd.grad(out.float().sum(), model.conv1.conv.weight)[0]
                         for out, model in zip(outputs[:3], (plain, fused, fused), strict=True)]  # fmt: skip
            close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 1e-2}
            for output, found in zip(outputs[1:], [*gradients[1:], gradients[0]], strict=True):
                torch.testing.assert_close(output, outputs[0], **close)
                assert (found - gradients[0]).norm() < close["rtol"] * gradients[0].norm()
    packed.requires_grad_()
    (by_plain,) = torch.autograd.grad(plain(packed).sum(), packed)
    (by_fused,) = torch.autograd.grad(fused(packed).sum(), packed)
    torch.testing.assert_close(by_fused, by_plain)


def check_trial() -> None:
    """A kernel that does its small problem right is taken; one that computes something else, or fails, is not."""
    state = torch.get_rng_state()
    assert dispatch.failed_trial("mixer", torch.device(DEVICE), torch.float32, 32, 32, 6) == ""
    assert torch.equal(torch.get_rng_state(), state)
    right = ops.conv_silu

    def wrong(*arguments: object) -> tuple[torch.Tensor, ...]:
        active, before = right(*arguments)  # type: ignore[arg-type]
        return active * 1.01, before

    def failing(*_: object) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("a compiler's words\nin two lines")

    for replacement, words in ((wrong, "is off by"), (failing, "in two lines")):
        ops.conv_silu = replacement  # type: ignore[assignment]
        assert words in self_test.run("mixer", torch.device(DEVICE), torch.float32, 32, 32, rows=6, batch=2)
    ops.conv_silu = right


if __name__ == "__main__":
    run_checks(
        check_against_float64,
        check_golden_logits,
        check_golden_gradients,
        check_prepared_model,
        check_operators,
        check_trial,
        check_stem,
    )
