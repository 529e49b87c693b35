"""Choice between Triton's kernels and PyTorch's operations for augmentation policies on a device."""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from data.batch_augmentation import Kind, augment, rotation

logger = logging.getLogger("mlla.data")


def augment_on_device(images: Tensor, operations: Tensor) -> Tensor:
    """Apply operations as `augment`, perhaps in place; on a GPU with kernels, if they work there."""
    if not len(operations):
        return images
    if images.is_cuda and kernels_work(images.device):
        from data.augmentation_kernels import augment_with_kernels

        return augment_with_kernels(images, operations)
    return augment(images, operations)


@lru_cache
def kernels_work(device: torch.device) -> bool:
    """Return whether the kernels run on a device and agree with PyTorch's operations; else log why not."""
    kinds = [*Kind, *Kind]  # each on an image of its own, as the first operation or as the second
    levels = [4.0 if kind == Kind.POSTERIZE else 0.7 for kind in kinds]
    rows = [(i, i // len(Kind), kind, levels[i], *rotation(9.0, 32, 16)) for i, kind in enumerate(kinds)]
    operations = torch.tensor(rows, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(10, 200, (len(kinds), 16, 32, 3), dtype=torch.uint8, generator=generator)
    try:
        from data.augmentation_kernels import augment_with_kernels

        result = augment_with_kernels(images.to(device), operations).cpu()
        different = (result.int() - augment(images, operations).int()).abs() > 1
        reason = f"{int(different.sum())} of {different.numel()} values differ" if different.any() else ""
    except Exception as error:  # Triton's compiler and launcher raise many types
        reason = " ".join(str(error).split()) or type(error).__name__
    if reason:
        logger.warning("augmentation on the GPU falls back to PyTorch, which is slower: Triton's kernels: %s", reason)
    return not reason
