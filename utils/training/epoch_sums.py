"""Sums over an epoch's steps, kept on the device, and their means over steps and processes."""

from collections.abc import Mapping

import torch

from utils.distributed.process import sum_over_processes
from utils.training.train_step import StepResult


class EpochSums:
    """Sums over an epoch's steps, on the device: terms of the loss, and gradient norms where they were finite."""

    def __init__(self, device: torch.device, start: Mapping[str, float]) -> None:
        self.sums = {name: torch.tensor(v, dtype=torch.float64, device=device) for name, v in start.items()}

    def add(self, result: StepResult) -> None:
        is_finite = torch.isfinite(result.grad_norm)  # not when float16 overflowed and the scaler skipped the step
        items = {**result.terms, "loss": result.loss}
        items |= {"grad_norm": torch.where(is_finite, result.grad_norm, 0), "num_norms": is_finite}
        self.sums = {name: self.sums.get(name, 0) + value.double() for name, value in items.items()}

    def local(self) -> dict[str, float]:
        """Return this process's sums. Waits for the device."""
        return {name: value.item() for name, value in self.sums.items()}

    def means(self, *, steps: int, num_processes: int) -> tuple[dict[str, float], float]:
        """Return the means over steps and processes, the same on each process.

        Returns:
            The loss, followed by its terms where it has several; and the gradient norm.
        """
        totals = sum_over_processes(torch.stack(list(self.sums.values()))).tolist()
        sums = dict(zip(self.sums, totals, strict=True))
        grad_norm = sums.pop("grad_norm") / max(sums.pop("num_norms"), 1)
        loss = sums.pop("loss")
        terms = {"loss": loss, **(sums if len(sums) > 1 else {})}
        return {name: value / steps / num_processes for name, value in terms.items()}, grad_norm
