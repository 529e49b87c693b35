"""Training loss: soft-target cross-entropy, with MESA's second term."""

import torch
import torch.nn.functional as F
from torch import Tensor


def training_loss(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None, ratio: float = 0.0) -> Tensor:
    """CE(logits, targets) + ratio * CE(logits, softmax(teacher_logits)), in float32 or wider, as a scalar.

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
