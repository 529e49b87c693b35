"""Choice between Triton's kernels and PyTorch's operations for what a device does with a batch."""

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor

from data.batch_augmentation import Kind, augment, rotation
from data.batch_crops import Crop, pack_bytes, resize_crops
from data.exact_crops import ExactCrop
from data.transforms import EvalTransform

Check = Callable[[torch.device], Tensor]  # returns where the results of a kernel are wrong
VERDICTS: dict[tuple[Check, torch.device], str] = {}  # from other processes: how a kernel fails its check, or ""

logger = logging.getLogger("mlla.data")


def resize_on_device(packed: Tensor, crops: Tensor, device: torch.device) -> Tensor:
    """Resize and flip crops as `resize_crops`; on a GPU with a kernel, if it works there. ExactCrops need a kernel."""
    if crops.shape[1] == len(ExactCrop._fields):
        from data.crop_kernels import resize_exactly

        return resize_exactly(packed, crops, device)
    if kernel_works(check_resizing, device):
        from data.crop_kernels import resize_with_kernel

        return resize_with_kernel(packed, crops, device)
    return resize_crops(packed, crops, device)


def augment_on_device(images: Tensor, operations: Tensor) -> Tensor:
    """Apply operations as `augment`, perhaps in place; on a GPU with kernels, if they work there."""
    if len(operations) and kernel_works(check_augmenting, images.device):
        from data.augmentation_kernels import augment_with_kernels

        return augment_with_kernels(images, operations)
    return augment(images, operations)


def erase_on_gpu(images: Tensor, erasures: Tensor, mode: str) -> bool:
    """Erase boxes as `erase_with_kernel`, on a GPU where that works; return whether it did.

    If an image has several, which may overlap, each box takes a launch. Its noise is the same in any batch.
    """
    if not len(erasures) or not kernel_works(check_erasing, images.device):
        return False
    from data.crop_kernels import erase_with_kernel

    has_several = bool((erasures[1:, 0] == erasures[:-1, 0]).any())
    for boxes in erasures.split(1 if has_several else len(erasures)):
        erase_with_kernel(images, boxes, mode)
    return True


@lru_cache
def kernel_works(check: Check, device: torch.device, instead: str = "PyTorch, which is slower") -> bool:
    """Return whether a kernel runs on a device, which a CPU is not, and passes its check; else log why not, and what
    is used instead.
    """
    if device.type != "cuda":
        return False
    reason = verdict(check, device)
    if reason:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        logger.warning("%s images on the GPU falls back to %s: Triton's kernel: %s", name, instead, reason)
    return not reason


def find_error(name: str, device: torch.device) -> str:
    """Return what is wrong with a kernel, named as its check below without "check_", or an empty string."""
    return failure(globals()[f"check_{name}"], device)


def set_verdict(name: str, device: torch.device, error: str) -> None:
    """Take the result of `find_error` from elsewhere, such as another process."""
    VERDICTS[globals()[f"check_{name}"], device] = error


def verdict(check: Check, device: torch.device) -> str:
    """Return how a kernel fails its check, which is called if there is no verdict yet, or an empty string."""
    return VERDICTS[check, device] if (check, device) in VERDICTS else failure(check, device)


def failure(check: Check, device: torch.device) -> str:
    """Return how a kernel fails its check, or an empty string."""
    try:
        is_wrong = check(device)
    except Exception as error:  # Triton's compiler and launcher raise many types
        return " ".join(str(error).split()) or type(error).__name__
    return f"{int(is_wrong.sum())} of {is_wrong.numel()} values differ" if is_wrong.any() else ""


def check_resizing(device: torch.device) -> Tensor:
    """Return where the kernel's results differ from PyTorch's by more than rounding."""
    from data.crop_kernels import resize_with_kernel

    shapes = ((16, 16), (5, 40), (33, 7))
    crops = [Crop(3 * h * w, 0, 0, 0, h, w, 16, i != 1, i == 2) for i, (h, w) in enumerate(shapes)]
    rows = torch.tensor(crops, dtype=torch.int64)
    packed = random_bytes(int(rows[:, 0].sum()))
    result = resize_with_kernel(packed, rows, device).cpu()
    return (result.int() - resize_crops(packed, rows, torch.device("cpu")).int()).abs() > 1


def check_exactly_resizing(device: torch.device) -> Tensor:
    """Return where the kernel's results differ from Pillow's."""
    images = [Image.fromarray(random_bytes(*shape, 3).numpy()) for shape in ((40, 30), (31, 90), (20, 20), (9, 14))]
    results, expected = [], []
    for mode in ("bicubic", "bilinear"):
        transform = EvalTransform(24, crop=True, interpolation=mode)
        expected += [transform(image).pixels for image in images]
        transform.on_device = True
        samples = [transform(image) for image in images]
        rows = torch.tensor([sample.crop for sample in samples], dtype=torch.int64)
        results.append(resize_on_device(pack_bytes([sample.pixels for sample in samples]), rows, device).cpu())
    return torch.cat(results) != torch.stack(expected)


def check_augmenting(device: torch.device) -> Tensor:
    """Return where the kernels' results differ from PyTorch's by more than rounding."""
    from data.augmentation_kernels import augment_with_kernels

    kinds = [*Kind, *Kind]  # each on an image of its own, as the first operation or as the second
    levels = [4.0 if kind == Kind.POSTERIZE else 0.7 for kind in kinds]
    rows = [(i, i // len(Kind), kind, levels[i], *rotation(9.0, 32, 16)) for i, kind in enumerate(kinds)]
    operations = torch.tensor(rows, dtype=torch.float64)
    images = random_bytes(len(kinds), 16, 32, 3)
    result = augment_with_kernels(images.to(device), operations).cpu()
    return (result.int() - augment(images, operations).int()).abs() > 1


def check_erasing(device: torch.device) -> Tensor:
    """Return where the kernel has not filled a box, or something else."""
    from data.crop_kernels import erase_with_kernel

    images = torch.full((2, 3, 16, 32), 99.0, device=device).contiguous(memory_format=torch.channels_last)
    erase_with_kernel(images, torch.tensor([[1, 2, 3, 9, 20, 2**61]]), "pixel")
    is_box = torch.zeros(2, 3, 16, 32, dtype=torch.bool)
    is_box[1, :, 2:11, 3:23] = True
    return (images.cpu().abs() < 10) != is_box


def random_bytes(*shape: int) -> Tensor:
    """Return values from 10 to 199, which leave room for contrasts, the same ones always."""
    return torch.randint(10, 200, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
