"""The kernels' self-test: each solves a small problem, forward and backward, and is compared with float64.

A verdict counts for one kernel, device, dtype, width, head dim and class of grids. `run_self_test` obtains those that a
model needs when it is set up; `dispatch` asks for one that is missing at the first call.
"""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from models.kernels import dispatch
from models.kernels.fused_modules import (
    WIDEST_FUSED_MLP,
    WIDEST_STEM,
    FusedDownsample,
    FusedMLLABlock,
    FusedModule,
    FusedStem,
    downsample_parts,
    layers_of,
    mixer_parts,
    mlp_parts,
    stem_parts,
)
from models.kernels.inference import InferenceBlock, InferenceStem
from models.mlla import MLLA

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the norm of each result
COLUMNS = 6
FULL_SIZE = 2**14 + 2**13  # images times channels that keep a GPU busy: kernels take the tiles that training takes
INFERENCE_ONLY = ("mlp", "stem_conv_relu")  # without gradient
Case = tuple[str, int, int, int]  # kernel, channels, head dim, rows of tokens


def run_self_test(model: nn.Module, dtype: torch.dtype, image_size: int | tuple[int, int]) -> None:
    """Test the kernels that a model uses, and log that they passed or what falls back to eager PyTorch.

    Args:
        model: a network on its device, after `use_kernels`; only its modules with kernels "auto" are of interest.
        dtype: what it computes in, autocast's where there is autocast.
        image_size: height and width of its images in pixels, or the side of square ones.
    """
    device = next(model.parameters()).device
    cases = kernel_cases(model, image_size)
    if not cases or device.type == "meta":
        return
    reason = dispatch.missing_triton(device.type) or ("" if dtype in dispatch.DTYPES else f"{dtype} is not supported")
    reasons = (
        {reason} if reason else {dispatch.self_test_verdict(name, device, dtype, *sizes) for name, *sizes in cases}
    )
    for reason in sorted(filter(None, reasons)):
        dispatch.log_fallback(reason)
    if reasons == {""}:
        names, widths = sorted({case[0] for case in cases}), sorted({case[1] for case in cases})
        dispatch.logger.info(
            "Triton kernels passed their self-test: %s; widths %s; %s",
            *(", ".join(names), ", ".join(map(str, widths)), str(dtype).removeprefix("torch.")),
        )


def kernel_cases(model: nn.Module, image_size: int | tuple[int, int]) -> list[Case]:
    """List what the kernels of the networks inside a model have to solve for images of this size, each case once."""
    height = image_size if isinstance(image_size, int) else image_size[0]
    cases: list[Case] = []
    for network in model.modules():
        if isinstance(network, MLLA):
            cases += module_cases(network.patch_embed, network.in_chans)
            rows = -(-height // 4)
            for stage in network.stages:
                for module in (*stage.blocks, stage.downsample):
                    cases += module_cases(module, rows)
                rows = -(-rows // 2)
    return sorted(set(cases))


def module_cases(module: nn.Module | None, rows: int) -> list[Case]:
    """List the cases of one module whose input has so many rows (for a stem: channels, its second dimension)."""
    fused = FusedModule | InferenceBlock | InferenceStem
    if not isinstance(module, fused) or module.kernels != "auto":
        return []
    rows = dispatch.self_test_rows(rows)
    if isinstance(module, FusedStem | InferenceStem):
        kernel, width = "stem_conv_relu", module.conv1.conv.out_channels
        if isinstance(module, FusedStem):
            kernel = "" if module.unsupported(stem_parts) else "stem_conv"
        return [(kernel, width, 32, rows)] if kernel and width <= WIDEST_STEM else []
    if isinstance(module, FusedDownsample):
        width = layers_of(module)[0].conv.out_channels
        return [] if module.unsupported(downsample_parts) else [("wide_conv", width, 32, rows)]
    assert isinstance(module, FusedMLLABlock | InferenceBlock)
    if isinstance(module, FusedMLLABlock):
        reasons = module.unsupported(mixer_parts), module.unsupported(mlp_parts)
    else:
        reasons = module.unsupported_mixer, module.unsupported_mlp
    attention, cases = module.attn, []
    if not reasons[0]:
        cases.append(("mixer", attention.dim, attention.dim // attention.num_heads, rows))
    if not reasons[1]:
        kernels = ("mlp_branch", "mlp") if attention.dim <= WIDEST_FUSED_MLP else ("mlp_branch",)
        cases += [(kernel, attention.dim, 32, rows) for kernel in kernels]
    return cases


def full_batch(device: torch.device, channels: int) -> int:
    """Return the batch size of the self-test: on a GPU large enough for the tiles of training."""
    return max(2, FULL_SIZE // channels) if device.type == "cuda" else 2


def find_error(
    kernel: str, device: torch.device, dtype: torch.dtype, channels: int, head_dim: int, *, rows: int, batch: int
) -> str:
    """Return what is wrong with a kernel at (batch, rows, 6, channels), forward or backward, or an empty string.

    It raises nothing but torch.OutOfMemoryError, and leaves the random number generators as they are.
    """
    precision = None
    try:
        precision = torch.get_float32_matmul_precision()  # an error where it was set by torch's newer names
        torch.set_float32_matmul_precision("highest")  # TF32 is not the kernel's fault
        # A checkpoint around the block must not see what is saved here: hooks of our own hide it.
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        no_autocast = torch.autocast(device.type, enabled=False)
        with _disable_current_modes(), torch.inference_mode(False), no_autocast, hooks:
            worst = largest_error(kernel, device, dtype, channels, head_dim, rows=rows, batch=batch)
    except torch.OutOfMemoryError:  # not the kernel's fault
        raise
    except Exception as error:  # whatever a compiler may say
        last_line = " ".join(str(error).strip().splitlines()[-1:])
        return f"the {kernel} kernel fails here, {type(error).__name__}: {last_line}"
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
    tolerance = TOLERANCES[dtype]
    return "" if worst < tolerance else f"the {kernel} kernel's result is off by {worst:.1e} in {dtype}"


def largest_error(
    kernel: str, device: torch.device, dtype: torch.dtype, channels: int, head_dim: int, *, rows: int, batch: int
) -> float:
    """Return the largest of `relative_errors`."""
    return max(relative_errors(kernel, device, dtype, channels, head_dim, rows=rows, batch=batch))


def relative_errors(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    head_dim: int,
    *,
    rows: int,
    batch: int,
    eager: bool = False,
) -> list[float]:
    """Return the errors of results and gradients by norm, relative to float64; infinite where there is a NaN.

    With `eager`, return those of eager PyTorch under autocast of this dtype instead of the kernel's.
    """
    from models.kernels.problems import problem  # which needs Triton

    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device) * scale
        return values.to(of).requires_grad_(kernel not in INFERENCE_ONLY)

    fused, reference, inputs = problem(kernel, draw, (batch, rows, COLUMNS, channels), head_dim)
    doubled = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    trained, doubled_trained = ([tensor for tensor in t if tensor.requires_grad] for t in (inputs, doubled))
    with torch.set_grad_enabled(bool(trained)):
        with torch.autocast(device.type, dtype, enabled=eager and dtype != torch.float32):
            results = list((reference if eager else fused)(*inputs))
        expected = list(reference(*doubled))
    if trained:
        upstream = [torch.randn(o.shape, generator=generator, device=device).to(o.dtype) for o in results]
        expected += torch.autograd.grad(expected, doubled_trained, [u.double() for u in upstream])
        results += torch.autograd.grad(results, trained, upstream)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, expected, strict=True)]
    return [error if error == error else float("inf") for error in errors]
