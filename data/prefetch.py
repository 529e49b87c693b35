"""Batches on the device: copied while the former one is worked on, then normalized and erased there."""

import logging
from collections.abc import Iterator

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader

from data.dataset import Batch, ImageDataset
from data.errors import BrokenImageError
from data.samplers import TrainSampler

logger = logging.getLogger("mlla.data")


class DeviceLoader:
    """A loader of (normalized images (B, 3, H, W) in channels_last memory, labels (B,)), both on the device.

    Args:
        loader: of Batch.
        device: where the batches go.
        erase_mode: what erased parts are filled with: normal noise per value ("pixel"), one normal color ("rand"), or
            zeros, the mean color ("const").
        skips_broken: leave out images that cannot be used, and log each once, rather than to stop at the first.
        max_broken: stop once more than so many different images were left out.
    """

    def __init__(
        self,
        loader: DataLoader[Batch],
        device: torch.device,
        *,
        erase_mode: str = "pixel",
        skips_broken: bool = False,
        max_broken: int = 100,
    ) -> None:
        self.loader = loader
        self.device = device
        self.erase_mode = erase_mode
        self.skips_broken = skips_broken
        self.max_broken = max_broken
        self.broken: set[str] = set()
        self.normalizer = Normalizer(device)
        self.generator = torch.Generator(device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def dataset(self) -> ImageDataset:
        return self.loader.dataset  # type: ignore[return-value]

    @property
    def num_images(self) -> int:
        """Of the data set, over all processes."""
        return len(self.dataset)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """As TrainSampler.set_epoch: what the next iteration gives; `start` counts images of this process."""
        assert isinstance(self.loader.sampler, TrainSampler)
        self.loader.sampler.set_epoch(epoch, start)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Raises BrokenImageError where images cannot be used and are not, or too many are, left out."""
        batches = self.host_batches()
        if self.stream is None:
            yield from map(self.prepare, batches)
            return
        waiting = None
        for batch in batches:
            with torch.cuda.stream(self.stream):
                prepared, ready = self.prepare(batch), torch.cuda.Event()
                ready.record()
            if waiting is not None:
                yield hand_over(*waiting)
            waiting = prepared, ready
        if waiting is not None:
            yield hand_over(*waiting)

    def host_batches(self) -> Iterator[Batch]:
        """The loader's batches that have images, once their failures are dealt with."""
        for batch in self.loader:
            for failure in batch.failures:
                if not self.skips_broken:
                    raise BrokenImageError(f"{failure.name}: {failure.reason}; repair it, or set DATA.ON_ERROR to skip")
                if failure.name not in self.broken:
                    self.broken.add(failure.name)
                    logger.warning("left out %s: %s", failure.name, failure.reason)
            if len(self.broken) > self.max_broken:
                raise BrokenImageError(
                    f"DATA.MAX_BAD {self.max_broken}: {len(self.broken)} images of this process cannot be used, "
                    f"the last is {batch.failures[-1].name}; python -m data.verify lists all"
                )
            if len(batch.labels):
                yield batch
            elif isinstance(self.loader.sampler, TrainSampler):
                raise BrokenImageError(f"no image can be used in place of {batch.failures[0].name}: all are broken")

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch on the device, on the current stream, without waiting for it."""
        images = batch.images.to(self.device, non_blocking=True)
        normalized = self.normalizer(images.permute(0, 3, 1, 2))  # (B, 3, H, W)
        for index, top, left, height, width, seed in batch.erasures.tolist():
            part = normalized[index, :, top : top + height, left : left + width]
            self.erase(part, seed)
        return normalized, batch.labels.to(self.device, non_blocking=True)

    def erase(self, part: Tensor, seed: int) -> None:
        """Fill a part (3, H, W) in place, by its own seed and thus the same in any batch."""
        if self.erase_mode == "const":
            part.zero_()
        elif self.erase_mode == "rand":
            part.copy_(
                torch.randn(3, 1, 1, generator=self.generator.manual_seed(seed), device=self.device).expand_as(part)
            )
        else:
            part.normal_(generator=self.generator.manual_seed(seed))


class Normalizer:
    """ImageNet's normalization of uint8 images, with the roundings of torchvision's ToTensor and Normalize.

    The constants are tensors: GPUs would turn a division by a number into another product.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.full = torch.tensor(255.0, device=device).view(1, 1, 1, 1)
        self.mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(IMAGENET_DEFAULT_STD, device=device).view(1, 3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8, as float32, in the same memory order."""
        return images.float().div_(self.full).sub_(self.mean).div_(self.std)


def hand_over(prepared: tuple[Tensor, Tensor], ready: torch.cuda.Event) -> tuple[Tensor, Tensor]:
    """Let the current stream wait for a batch, and keep its memory until that stream is done with it."""
    stream = torch.cuda.current_stream(prepared[0].device)
    stream.wait_event(ready)
    for tensor in prepared:
        tensor.record_stream(stream)
    return prepared
