"""Whether the fused update can be used: what it supports, and its self-test."""

import math
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from utils.distributed.process import gather_objects
from utils.logs.logger import logger
from utils.training.ema import ModelEma
from utils.training.fused_update import FusedUpdate, ema_tensors

VERDICTS: dict[torch.device, str] = {}  # of this process: what is wrong with the kernels, or ""
UPDATE = f"{__name__}:update"  # their name for the self-test at set-up


def make_fused_update(
    optimizer: torch.optim.Optimizer, ema: ModelEma | None, scaler: torch.amp.GradScaler, *, is_alone: bool
) -> FusedUpdate | None:
    """Return the update by kernels where they support it and pass their self-test; otherwise None.

    Unless a process is alone in the step, the kernels must pass on all processes, which then round in the same way.
    """
    device = next(p.device for group in optimizer.param_groups for p in group["params"])
    if device.type != "cuda":
        return None
    reason = unsupported_reason(optimizer, ema) or ("float16 scales gradients" if scaler.is_enabled() else "")
    reason = reason or self_test_error(device)
    reason = next(filter(None, [reason] if is_alone else gather_objects(reason)), "")
    if reason:
        logger.info("Clipping, optimizer and EMA run without the fused kernel: %s", reason)
        return None
    return FusedUpdate(optimizer, ema)


def unsupported_reason(optimizer: torch.optim.Optimizer, ema: ModelEma | None) -> str:
    """Return why the kernels do not support an optimizer and its tensors, or an empty string."""
    groups = optimizer.param_groups
    if type(optimizer) is not torch.optim.AdamW or any(g["amsgrad"] or g["maximize"] for g in groups):
        return f"it is for AdamW, not {type(optimizer).__name__}, amsgrad or maximize"
    if any((group["betas"], group["eps"]) != (groups[0]["betas"], groups[0]["eps"]) for group in groups):
        return "betas or eps differ between parameter groups"
    parameters = [p for group in groups for p in group["params"]]
    if ema is not None and ema.ema_tensors[0].device != parameters[0].device:
        return "the EMA is on another device"
    for p, average in zip(parameters, ema_tensors(parameters, ema), strict=True):
        if not (p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)):
            return "a parameter is neither contiguous nor channels_last"
        others = [average, *(optimizer.state.get(p, {}).get(name) for name in ("exp_avg", "exp_avg_sq"))]
        if any(is_laid_out_otherwise(tensor, p) for tensor in (p, *others) if tensor is not None):
            return "parameters, moments and EMA are not float32 tensors of the same strides on one device"
    return "" if find_spec("triton") is not None else "Triton is not installed"


def is_laid_out_otherwise(tensor: Tensor, parameter: Tensor) -> bool:
    is_equal = tensor.device == parameter.device and tensor.stride() == parameter.stride()
    return tensor.dtype != torch.float32 or not is_equal


def self_test_error(device: torch.device) -> str:
    """Return what is wrong with the kernels on a device, or an empty string; tested once in a process."""
    if device not in VERDICTS:
        set_verdict("update", device, find_error("update", device))
    return VERDICTS[device]


def set_verdict(_: str, device: torch.device, error: str) -> None:
    """Take the result of `find_error` from elsewhere, such as another process."""
    VERDICTS[device] = error


def find_error(_: str, device: torch.device) -> str:
    """Return what is wrong with the kernels on a device, or an empty string."""
    try:
        return "" if all(passes_self_test(device, offset) for offset in (0, 1)) else "its result differs from torch's"
    except torch.OutOfMemoryError:  # not the kernels' fault
        raise
    except Exception as error:  # whatever a compiler may say
        return f"{type(error).__name__}: {' '.join(str(error).strip().splitlines()[-1:])}"


def passes_self_test(device: torch.device, offset: int) -> bool:
    """Return whether the kernels agree with torch in four steps; an `offset` of 1 element leaves gradients unaligned.

    Random number generators stay as they are.
    """
    by_kernels, by_torch = (self_test_results(device, offset, use_kernels=choice) for choice in (True, False))
    return all(torch.allclose(*pair, rtol=1e-4, atol=1e-6) for pair in zip(by_kernels, by_torch, strict=True))


def self_test_results(device: torch.device, offset: int, *, use_kernels: bool) -> list[Tensor]:
    """Return norm, weights, EMA and moments after steps with a large gradient, a small one, and `found_inf`."""
    shapes = ((130, 70), (37,), (8, 6, 3, 3), (5,))
    model = nn.ParameterList([wave(shape, i, device) for i, shape in enumerate(shapes)])
    model[2].data = model[2].data.to(memory_format=torch.channels_last)
    model.register_buffer("statistics", wave((3,), 0, device))
    ema, parameters = ModelEma(model, 0.9), list(model.parameters())
    for tensor in ema.ema_tensors:
        tensor.zero_()
    groups = [{"params": parameters[::2], "weight_decay": 0.1}, {"params": parameters[1::2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)  # type: ignore[arg-type]
    fused = FusedUpdate(optimizer, ema)
    for step, (scale, found_inf) in enumerate(((1.0, 0.0), (1e-3, 0.0), (1.0, 1.0), (1.0, 0.0))):
        flag = torch.tensor(found_inf, dtype=torch.float32, device=device)
        for i, p in enumerate(parameters[:3]):  # the last one has no gradient
            values = scale * wave((p.numel() + offset,), step + i, device)
            p.grad = values.as_strided(p.shape, p.stride(), offset)
        if use_kernels:
            fused.set_learning_rates()
            norm = fused.grad_norm()
            fused(norm, flag, max_norm=1.0)
        else:
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.found_inf = flag  # type: ignore[attr-defined]
            optimizer.step()
            ema.update()
    state = [optimizer.state[p][name] for p in parameters[:3] for name in ("step", "exp_avg", "exp_avg_sq")]
    return [norm, *model.state_dict().values(), *ema.module.state_dict().values(), *state]


def wave(shape: tuple[int, ...], phase: int, device: torch.device) -> Tensor:
    """Return values between -1 and 1 that are not random."""
    return torch.arange(math.prod(shape), dtype=torch.float32, device=device).add(phase).sin().view(shape)
