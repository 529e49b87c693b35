"""The kernels' self-test at set-up: each solves a small problem, forward and backward, and is compared with float64.

A verdict counts for one kernel, device, dtype, width, head dim and class of grids. `dispatch` has this process's table
of verdicts and runs a missing test at the first call; `verdicts` keeps them on disk. The problems are in `problems.py`.

Other packages have kernels too, named "module:name". Such a module has find_error(name, device), which returns what is
wrong with a kernel or "", and set_verdict(name, device, error), after which it does not test that kernel any more.
"""

import os
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from importlib import import_module

import torch
from torch import nn
from tqdm import tqdm

from models.kernels import dispatch, verdicts
from models.kernels.fused_modules import (
    WIDEST_FUSED_MLP,
    WIDEST_STEM,
    WIDEST_STEM_LAYER,
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
from models.kernels.inference import are_few_tokens
from models.kernels.self_test_pool import passed_in_workers, start_server, stop_server
from models.kernels.verdicts import Case
from models.mlla import MLLA

# Seconds that a core takes to compile and solve a case, roughly: on the machine of README.md, 90 for training MLLA-T.
SECONDS = {
    **{"mixer": 12, "mlp_branch": 6, "inference_mixer": 7, "wide_conv": 4},
    **{"few_tokens_mixer": 6, "few_tokens_mlp": 4},
    **{"inference_mlp": 2, "mlp": 2, "stem_conv": 2, "stem_conv_relu": 2, "stem_layer": 4},
}
# What may be done with a model: "prepared" is inference of its `prepare_for_inference` copy, for "one_image" with more
# kernels; "inference" is its own.
KERNELS = {
    "training": ("mixer", "mlp_branch", "wide_conv", "stem_conv"),
    "inference": ("mixer", "mlp_branch", "mlp", "wide_conv", "stem_conv"),
    "prepared": ("inference_mixer", "inference_mlp", "wide_conv", "stem_conv_relu", "stem_layer"),
    "one_image": ("few_tokens_mixer", "few_tokens_mlp"),
}
ONLY_16_BITS = ("stem_layer", "few_tokens_mixer", "few_tokens_mlp")
START_SECONDS = 14  # of 16 workers at once: imports and CUDA contexts
OTHER_SECONDS = 4  # for kernels of other packages
MOST_WORKERS = 16
WORKER_BYTES = 2**31  # of GPU memory, with its CUDA context
FEWEST_CASES = 3  # for which workers are worth their start


def expect_self_test(mode: str, device: torch.device) -> None:
    """Check MODEL.KERNELS; at the first start on a machine, let imports for the self-test's workers begin.

    Raises:
        KernelsUnavailableError: `mode` is "triton", and there is no Triton for the device.
    """
    dispatch.check_mode(mode, device)
    is_tested = mode == "auto" and verdicts.local_rank() == 0 and not dispatch.missing_triton(device.type)
    if is_tested and verdicts.describe(device) not in verdicts.read_file():
        verdicts.fix_triton_cache_dir()  # which the workers inherit from the server
        with suppress(OSError):  # the self-test tries again
            start_server()


def run_self_test(
    model: nn.Module,
    dtype: torch.dtype,
    image_size: int | tuple[int, int],
    uses: Collection[str],
    meanwhile: Callable[[], object] | None = None,
    others: Collection[str] = (),
) -> None:
    """Test the kernels that a run uses, and log that they passed or what falls back to eager PyTorch.

    Args:
        model: a network on its device, after `use_kernels`; only its modules with kernels "auto" are tested.
        dtype: what it computes in, autocast's where there is autocast.
        image_size: height and width of its images in pixels, or the side of square ones.
        uses: what will be done with the model, of KERNELS; only kernels that this needs are tested.
        meanwhile: called while other processes test, if they do, to compile code with kernels. These count as passed
            then, and do nothing; if one fails after all, the code is compiled again when it is next called.
        others: names of kernels of other packages that the run uses; tested on a GPU.

    Raises:
        KernelsUnavailableError: a module has kernels "triton", and there is no Triton for the device.
    """
    try:
        log_self_test(model, dtype, image_size, uses, meanwhile, others)
    finally:
        stop_server()


def log_self_test(
    model: nn.Module,
    dtype: torch.dtype,
    image_size: int | tuple[int, int],
    uses: Collection[str],
    meanwhile: Callable[[], object] | None,
    others: Collection[str],
) -> None:
    """Test the kernels that a run uses, as `run_self_test`."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    reason = dispatch.missing_triton(device.type)
    if reason and any(getattr(module, "kernels", "") == "triton" for module in model.modules()):
        dispatch.fall_back("triton", reason)
    dispatch.SET_UP.add(device)
    cases = kernel_cases(model, image_size, uses, dtype)
    other_cases = [] if reason else [verdicts.other_case(name) for name in others]
    if not (cases or other_cases) or (reason and device.type == "cpu"):
        return
    if dtype not in dispatch.DTYPES:
        reason = reason or f"{dtype} is not supported"
    if device.type == "cuda" and not reason:
        verdicts.fix_triton_cache_dir()
    start = time.monotonic()
    tested = cases + other_cases
    is_remembered = not reason and len(dispatch.known_verdicts(tested, device, dtype)) == len(tested)
    assumed: set[dispatch.Problem] = set()
    compile_code = partial(compile_untested, meanwhile, assumed) if meanwhile else None
    results = {} if reason else find_verdicts(tested, device, dtype, compile_code)
    for name, case in zip(others, other_cases, strict=False):
        module, _, kernel = name.partition(":")
        import_module(module).set_verdict(kernel, device, results[case])
    reasons = {reason} if reason else {results[case] for case in cases}
    found = [
        dispatch.self_test_verdict(kernel, at, of, channels, head_dim, rows)
        for at, of, (kernel, channels, head_dim, rows) in assumed
    ]
    if any(found):
        torch._dynamo.reset()  # compile again, without the kernels that have failed
    for reason in sorted(filter(None, reasons)):
        dispatch.log_fallback(reason)
    if reasons == {""}:
        names = sorted({case[0] for case in cases} | {name.partition(":")[2] for name in others})
        widths = sorted({case[1] for case in cases})
        dispatch.logger.info(
            "Triton kernels passed their self-test: %s; widths %s; %s (%s)",
            *(", ".join(names), ", ".join(map(str, widths)), str(dtype).removeprefix("torch.")),
            "remembered" if is_remembered else f"{time.monotonic() - start:.0f} s",
            extra={"is_detail": True},  # a long line, for the log file
        )


def find_verdicts(
    cases: list[Case], device: torch.device, dtype: torch.dtype, meanwhile: Callable[[], object] | None = None
) -> dict[Case, str]:
    """Return the verdicts on all cases: known ones, those of this machine's first process, or by testing."""
    known = dispatch.known_verdicts(cases, device, dtype)
    missing = sorted(set(cases) - set(known), key=lambda case: (-seconds_of(case), case))
    if not missing:
        return known
    workers = num_workers(missing, device)
    seconds = estimate_seconds(missing, workers)
    if verdicts.local_rank() > 0:
        if meanwhile and verdicts.can_save(device):
            meanwhile()
            meanwhile = None
        deadline = time.monotonic() + 60 + 2 * seconds
        while len(known) < len(cases) and time.monotonic() < deadline and verdicts.can_save(device):
            time.sleep(0.2)
            known = dispatch.known_verdicts(cases, device, dtype)
        missing = [case for case in missing if case not in known]
    if missing:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        start = "" if known else "first start on this machine, "
        dispatch.logger.info("Compiling kernels for %s (%sabout %.0f s)", name, start, seconds)
        dispatch.add_verdicts(run_cases(missing, device, dtype, workers, meanwhile), device, dtype)
    return dispatch.known_verdicts(cases, device, dtype)


def compile_untested(compile_code: Callable[[], object], assumed: set[dispatch.Problem]) -> None:
    """Call what compiles code with kernels: those without a verdict count as passed, see `assumed`, and none runs."""
    from models.kernels.triton.launch import without_launches

    dispatch.ASSUMED.append(assumed)
    try:
        with without_launches():
            compile_code()
    finally:
        dispatch.ASSUMED.pop()


def run_cases(
    cases: list[Case],
    device: torch.device,
    dtype: torch.dtype,
    workers: int,
    meanwhile: Callable[[], object] | None = None,
) -> dict[Case, str]:
    """Test cases in so many worker processes, or here; what does not pass in a worker is tested here."""
    is_shown = verdicts.local_rank() == 0 and sys.stderr.isatty()
    passed: set[Case] = set()
    with tqdm(total=len(cases), desc="compiling kernels", leave=False, dynamic_ncols=True, disable=not is_shown) as bar:
        if workers > 1:
            solve = partial(dispatch.solve, device=device, dtype=dtype)
            settings = {"num_workers": workers, "advance": bar.update, "meanwhile": meanwhile or (lambda: None)}
            try:
                passed = passed_in_workers(solve, cases, device=device, **settings)
            except Exception as error:  # for whatever reason the system has
                text = f"{type(error).__name__}: {error}"
                dispatch.logger.info("Compiling kernels in this process, since the workers failed (%s)", text)
                bar.reset()
        results = {}
        for case in cases:
            results[case] = "" if case in passed else dispatch.solve(case, device, dtype)
            if not passed:
                bar.update()
    return results


def num_workers(cases: list[Case], device: torch.device) -> int:
    """Return in how many processes to test the cases: 1 means here."""
    if device.type != "cuda" or len(cases) < FEWEST_CASES:
        return 1
    cores = len(os.sched_getaffinity(0))
    if verdicts.local_rank() > 0:  # else the others wait
        cores //= verdicts.num_local_processes()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return max(1, min(len(cases), cores, MOST_WORKERS, free_bytes // WORKER_BYTES))


def estimate_seconds(cases: list[Case], workers: int) -> float:
    """Return about how long so many processes take for the cases, when nothing is in Triton's cache."""
    seconds = [seconds_of(case) for case in cases]
    return sum(seconds) if workers == 1 else START_SECONDS + max(max(seconds), sum(seconds) / workers)


def seconds_of(case: Case) -> int:
    """Return about how long a core takes for a case."""
    return SECONDS.get(case[0], OTHER_SECONDS)


def kernel_cases(
    model: nn.Module, image_size: int | tuple[int, int], uses: Collection[str], dtype: torch.dtype = torch.bfloat16
) -> list[Case]:
    """List what the kernels of the networks inside a model have to solve for images of this size, each case once."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    cases: list[Case] = []
    for network in model.modules():
        if isinstance(network, MLLA):
            cases += module_cases(network.patch_embed, network.in_chans)
            rows, columns = -(-height // 4), -(-width // 4)
            for stage in network.stages:
                for module in (*stage.blocks, stage.downsample):
                    cases += module_cases(module, rows, columns)
                rows, columns = -(-rows // 2), -(-columns // 2)
    used = {kernel for use in uses for kernel in KERNELS[use]}
    used -= set(ONLY_16_BITS) if dtype == torch.float32 else set()
    return sorted({case for case in cases if case[0] in used})


def module_cases(module: nn.Module | None, rows: int, columns: int = 0) -> list[Case]:
    """List a module's cases in all uses, for inputs of so many rows (for a stem: channels, its second dimension)."""
    if not isinstance(module, FusedModule) or module.kernels != "auto":
        return []
    num_tokens = rows * columns
    rows = dispatch.self_test_rows(rows)
    if isinstance(module, FusedStem):
        width = module.conv1.conv.out_channels
        is_supported = width <= WIDEST_STEM and not module.unsupported(stem_parts)
        kernels = ("stem_conv", "stem_conv_relu", *(("stem_layer",) if width <= WIDEST_STEM_LAYER else ()))
        return [(kernel, width, 32, rows) for kernel in kernels if is_supported]
    if isinstance(module, FusedDownsample):
        width = layers_of(module)[0].conv.out_channels
        return [] if module.unsupported(downsample_parts) else [("wide_conv", width, 32, rows)]
    assert isinstance(module, FusedMLLABlock)
    attention, cases = module.attn, []
    is_few = are_few_tokens(num_tokens, attention.dim, attention.num_heads)
    if not module.unsupported(mixer_parts):
        head_dim = attention.dim // attention.num_heads
        kernels = ("mixer", "inference_mixer", *(("few_tokens_mixer",) if is_few else ()))
        cases += [(kernel, attention.dim, head_dim, rows) for kernel in kernels]
    if not module.unsupported(mlp_parts):
        kernels = ("mlp_branch", "inference_mlp", *(("mlp",) if attention.dim <= WIDEST_FUSED_MLP else ()))
        kernels += ("few_tokens_mlp",) if is_few else ()
        cases += [(kernel, attention.dim, 32, rows) for kernel in kernels]
    return cases
