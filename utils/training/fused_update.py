"""Gradient clipping, AdamW and EMA in one pass over memory, in place of some forty launches and three passes."""

import math

import torch
from torch import Tensor, nn

from utils.training.ema import ModelEma

CHUNK = 4096  # elements of a parameter that one program of the kernel updates
GRADIENT = 1  # column of the table of addresses, see triton_update.py


class FusedUpdate:
    """One update of all parameters by Triton kernels, equal to torch's clipping, fused AdamW and EMA but for rounding.

    The optimizer keeps the state, as torch initializes it, and its groups the settings; its `step` is not called.
    Gradients are not changed. The kernels find all tensors by their addresses. Those of the gradients are sent to the
    device when they change; after the capture of a CUDA graph, which cannot record that, `send_addresses` must be
    called.

    Args:
        optimizer: an AdamW that `fused_update_support.unsupported_reason` has nothing against.
        ema: of a model with the optimizer's parameters.
        use_kernels: False for the plain-PyTorch reference, on any device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ema: ModelEma | None, *, use_kernels: bool = True) -> None:
        self.optimizer, self.ema, self.use_kernels = optimizer, ema, use_kernels
        groups = optimizer.param_groups
        pairs = [(p, i) for i, group in enumerate(groups) for p in group["params"]]
        self.parameters = [p for p, _ in pairs]
        self.betas, self.eps = groups[0]["betas"], groups[0]["eps"]
        self.averages = ema_tensors(self.parameters, ema)
        self.averaged = {p.data_ptr() for p in self.parameters}  # the others are left to the ModelEma
        device = self.device = self.parameters[0].device
        chunks = [
            (row, number, min(CHUNK, p.numel() - number * CHUNK), group)
            for row, (p, group) in enumerate(pairs)
            for number in range(math.ceil(p.numel() / CHUNK))
        ]
        self.chunks = torch.tensor(chunks, dtype=torch.int32, device=device)
        self.sums = torch.empty(len(chunks), dtype=torch.float32, device=device)
        self.corrections = torch.empty(len(pairs), 2, dtype=torch.float32, device=device)
        self.settings = torch.empty(len(groups), 2, dtype=torch.float32, device=device)  # learning rate, weight decay
        self.log_betas = torch.tensor(self.betas, dtype=torch.float64).log().to(device)
        self.gradients: list[int] = []  # addresses; 0 without gradient
        self.host_addresses = torch.zeros(len(pairs), 6, dtype=torch.int64)
        self.addresses = torch.zeros(len(pairs), 6, dtype=torch.int64, device=device)
        self.is_used: list[bool] = []  # whether a parameter has a gradient
        optimizer.register_load_state_dict_post_hook(lambda _: self.forget_tensors())

    def set_learning_rates(self) -> None:
        """Send the groups' learning rates and weight decays to the device; before the step, also of a CUDA graph."""
        values = [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        send(torch.tensor(values, dtype=torch.float32), self.settings)

    def grad_norm(self) -> Tensor:
        """Return the L2 norm of the gradients of all parameters, a scalar."""
        self.find_tensors()
        if not self.use_kernels:
            used = [p.grad for p in self.parameters if p.grad is not None]
            return torch.stack([grad.square().sum() for grad in used]).sum().sqrt()
        from utils.training import triton_update

        triton_update.sum_squares(self.chunks, self.addresses, self.sums, chunk=CHUNK)
        return self.sums.sum().sqrt()

    @torch.no_grad()
    def __call__(self, grad_norm: Tensor, found_inf: Tensor, max_norm: float) -> None:
        """Update once; if `found_inf` is 1, the EMA only.

        Args:
            grad_norm: result of `grad_norm` for the same gradients.
            found_inf: float32 scalar on the device, 0 or 1.
            max_norm: to which the gradient is clipped.
        """
        if not self.use_kernels:
            self.reference(grad_norm, found_inf, max_norm)
        else:
            from utils.training import triton_update

            triton_update.update(
                *(self.chunks, self.addresses, self.corrections, self.settings, grad_norm, found_inf, self.log_betas),
                max_norm=max_norm,
                betas=self.betas,
                eps=self.eps,
                ema_weight=None if self.ema is None else self.ema.weight,
                chunk=CHUNK,
            )
        if self.ema is not None:
            self.ema.update(done=self.averaged)

    def find_tensors(self) -> None:
        """Initialize the state of parameters that have a gradient, and send changed addresses to the device."""
        gradients = [0 if p.grad is None else p.grad.data_ptr() for p in self.parameters]
        if gradients == self.gradients:
            return
        is_used = [p.grad is not None for p in self.parameters]
        if is_used != self.is_used:
            rows = [self.row(p, average) for p, average in zip(self.parameters, self.averages, strict=True)]
            self.host_addresses = torch.tensor(rows, dtype=torch.int64)
        self.host_addresses[:, GRADIENT] = torch.tensor(gradients, dtype=torch.int64)
        self.gradients, self.is_used = gradients, is_used
        if self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            self.send_addresses()

    def forget_tensors(self) -> None:
        """Look for all tensors again in the next step; the optimizer has loaded other ones."""
        self.gradients, self.is_used = [], []

    def send_addresses(self) -> None:
        send(self.host_addresses, self.addresses)

    def row(self, parameter: nn.Parameter, average: Tensor | None) -> list[int]:
        """Return the addresses of a parameter and of its gradient (left out), moments, average and step."""
        state = self.optimizer.state[parameter] if parameter.grad is not None else {}
        if parameter.grad is not None and not state:  # as torch does
            state["step"] = torch.zeros((), dtype=torch.float32, device=self.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        tensors = (parameter, None, state.get("exp_avg"), state.get("exp_avg_sq"), average, state.get("step"))
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

    def reference(self, grad_norm: Tensor, found_inf: Tensor, max_norm: float) -> None:
        """Compute what the kernels compute in PyTorch's operations, parameter by parameter."""
        scale = (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        groups = [i for i, group in enumerate(self.optimizer.param_groups) for _ in group["params"]]
        for p, average, group in zip(self.parameters, self.averages, groups, strict=True):
            if p.grad is not None:
                state, (lr, weight_decay) = self.optimizer.state[p], self.settings[group]
                state["step"] += 1 - found_inf
                shares = 1 - torch.exp(state["step"].double() * self.log_betas)
                grad = p.grad * scale
                exp_avg = self.betas[0] * state["exp_avg"] + (1 - self.betas[0]) * grad
                exp_avg_sq = self.betas[1] * state["exp_avg_sq"] + (1 - self.betas[1]) * (grad * grad)
                step_size, correction = lr * (1 / shares[0]).float(), (1 / shares[1].sqrt()).float()
                new = p - lr * weight_decay * p - step_size * exp_avg / (exp_avg_sq.sqrt() * correction + self.eps)
                for target, value in ((p, new), (state["exp_avg"], exp_avg), (state["exp_avg_sq"], exp_avg_sq)):
                    target.copy_(torch.where(found_inf == 0, value, target))
            if average is not None and self.ema is not None:
                average.lerp_(p, self.ema.weight)


def send(values: Tensor, target: Tensor) -> None:
    """Copy values from the host to a tensor on the device, without waiting."""
    if target.device.type == "cuda":
        values = values.pin_memory()  # a copy, whose memory is not used again before it has been read
    target.copy_(values, non_blocking=True)


def ema_tensors(parameters: list[nn.Parameter], ema: ModelEma | None) -> list[Tensor | None]:
    """Return the average of each parameter; None without EMA.

    Raises:
        KeyError: the EMA is of another model.
    """
    if ema is None:
        return [None] * len(parameters)
    by_address = {source.data_ptr(): average for source, average in zip(ema.sources, ema.ema_tensors, strict=True)}
    return [by_address[p.data_ptr()] for p in parameters]
