"""Training loss of a classifier: cross-entropy with soft targets, and MESA's second term."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.speed.streams import start_on_side_stream


def training_loss(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None, ratio: float = 0.0) -> Tensor:
    """Return CE(logits, targets) + ratio * CE(logits, softmax(teacher_logits)), a scalar in float32 or wider.

    The second term is MESA's (Du et al. 2022, arXiv 2205.14083): the teacher is the EMA model on the same batch.

    Args:
        logits: (B, classes).
        targets: probabilities (B, classes).
        teacher_logits: (B, classes) without gradient, or None to leave the second term out.
        ratio: weight of the second term.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets)
    if teacher_logits is not None:
        loss = loss + ratio * F.cross_entropy(logits, teacher_logits.to(logits.dtype).softmax(dim=1))
    return loss


class ClassificationLoss:
    """Loss of a classifier's training step: `training_loss`, with MESA's teacher from a given step on.

    On a GPU the teacher runs concurrently with the model, on its own stream.

    Args:
        model: images (B, 3, H, W) to logits (B, classes).
        teacher: the EMA model, in evaluation mode; None without MESA.
        mesa_ratio: weight of MESA's term.
        mesa_start_step: first step that may use the teacher.
        is_ready: whether the teacher may be used now; the same on all processes, without waiting for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        *,
        mesa_ratio: float = 0.0,
        mesa_start_step: int = 0,
        is_ready: Callable[[], bool] = lambda: True,
    ) -> None:
        self.model = model
        self.teacher = teacher if mesa_ratio else None
        self.mesa_ratio = mesa_ratio
        self.mesa_start_step = mesa_start_step
        self.is_ready = is_ready

    def variant(self, step: int) -> bool:
        """Return whether a step uses the teacher; its work depends on nothing else but the batch."""
        return self.teacher is not None and step >= self.mesa_start_step and self.is_ready()

    def __call__(self, batch: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor]:
        """Return the loss of (images (B, 3, H, W), targets (B, classes)) in step `step` of the run."""
        images, targets = batch
        if not self.variant(step):
            return {"loss": training_loss(self.model(images), targets)}
        wait_for_teacher = start_on_side_stream(lambda: self.teacher_logits(images), images.device, "teacher")
        logits = self.model(images)
        return {"loss": training_loss(logits, targets, wait_for_teacher(), self.mesa_ratio)}

    @torch.no_grad()
    def teacher_logits(self, images: Tensor) -> Tensor:
        """Return the teacher's logits (B, classes)."""
        assert self.teacher is not None
        return self.teacher(images)
