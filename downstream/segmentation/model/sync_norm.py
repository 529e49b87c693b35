"""Batch norm with statistics over the images of all processes."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.distributed.process import Process


class SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; its gradient is the sum of all gradients."""

    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """nn.SyncBatchNorm in PyTorch operations, for processes on CPUs. Maps (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32 = x.float()
        sums = torch.cat([x32.sum(dim=(0, 2, 3)), x32.new_tensor([x.numel() / x.shape[1]])])  # (C + 1,)
        sums = SumOverProcesses.apply(sums)
        count = sums[-1].detach()
        mean = (sums[:-1] / count)[:, None, None]  # (C, 1, 1)
        squares = SumOverProcesses.apply((x32 - mean).square().sum(dim=(0, 2, 3)))  # (C,)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten().detach(), self.momentum or 0.0)
            self.running_var.lerp_(squares.detach() / (count - 1), self.momentum or 0.0)
        scale = self.weight * torch.rsqrt(squares / count + self.eps)
        return ((x32 - mean) * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronize_norms(head: nn.Module, process: Process) -> nn.Module:
    """Return the head with synchronized batch norms if there are several processes; weights and names stay."""
    if process.num_processes == 1:
        return head
    if process.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(head)
    for module in head.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CpuSyncBatchNorm
    return head
