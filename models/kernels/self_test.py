"""The kernels' self-test at set-up: each solves a small problem, forward and backward, and is compared with float64.

A verdict counts for one kernel, device, dtype, width, head dim and class of grids. `dispatch` has the table of verdicts
and runs a missing test at the first call. The problems are in `problems.py`.
"""

import torch
from torch import nn

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
