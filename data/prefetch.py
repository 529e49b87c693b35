"""Prefetching of batches to the device, with decoding, augmentation, normalization and random erasing there."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from data.dataset import STAGES, Batch, ImageDataset
from data.errors import BrokenImageError
from data.kernel_dispatch import augment_on_device, erase_on_gpu, resize_on_device
from data.samplers import SampleKey, TrainSampler
from data.workers import RestartingDataLoader, more_workers

logger = logging.getLogger("mlla.data")


class Prepared(NamedTuple):
    """A batch on the device, and the event after which it is ready, None if it is."""

    images: Tensor  # (B, 3, H, W) float32
    labels: Tensor  # (B,) int64
    ready: torch.cuda.Event | None


class SameThread(Executor):
    """Calls functions at once, in the thread that submits them."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # raised by `result`
            future.set_exception(error)
        return future


class DeviceLoader:
    """Loader of (normalized images (B, 3, H, W) in channels_last memory, labels (B,)) on the device.

    On a GPU, the next batch is copied and prepared on a stream of its own while the model works on the current one. If
    JPEGs are decoded there, which waits for the GPU, a thread does that.

    Args:
        loader: loader of `Batch`.
        device: target device.
        erase_mode: content of erased boxes: normal noise per value ("pixel"), one normal color ("rand"), or zeros, the
            mean color ("const").
        skip_broken: skip images that cannot be used and log each once, instead of stopping at the first.
        max_broken: stop when more different images than this were skipped.
    """

    def __init__(
        self,
        loader: RestartingDataLoader,
        device: torch.device,
        *,
        erase_mode: str = "pixel",
        skip_broken: bool = False,
        max_broken: int = 100,
    ) -> None:
        self.loader = loader
        self.device = device
        self.erase_mode = erase_mode
        self.skip_broken = skip_broken
        self.max_broken = max_broken
        self.broken: set[str] = set()
        self.stage_seconds = np.zeros(len(STAGES))  # of all workers together
        self.worker_seconds = self.device_seconds = 0.0  # for which the next batch was waited for, by what is late
        self.normalizer = Normalizer(device)
        self.generator = torch.Generator(device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def dataset(self) -> ImageDataset:
        return self.loader.dataset  # type: ignore[return-value]

    @property
    def num_images(self) -> int:
        """Number of images in the dataset, over all processes."""
        return len(self.dataset)

    def advice(self) -> str:
        """Return what limits loading in the epoch so far, and how it may become faster, for a log line."""
        share = self.dataset.device_share
        if share and self.device_seconds > self.worker_seconds:
            return (
                "loading is limited by the GPU, which decodes beside the steps; "
                f"lower DATA.GPU_DECODE_SHARE, which is {share:g}, or set DATA.DECODE_ON cpu"
            )
        slowest = STAGES[int(self.stage_seconds.argmax())]
        transform = self.dataset.transform
        may_augment = self.device.type == "cuda" and getattr(transform, "may_move_to_device", False)
        augments = getattr(transform, "recorded_policy", None) is not None
        decode_there = ["DATA.DECODE_ON gpu" + " with DATA.AUGMENT_ON gpu" * may_augment] * (may_augment or augments)
        if share:
            decode_there = [f"a higher DATA.GPU_DECODE_SHARE, which is {share:g}"] * (share < 1)
        remedies = {
            "reading": ["faster storage, or --zip with --cache-mode"],
            "decoding": [*decode_there, "smaller images"],
            "transforming": ["DATA.AUGMENT_ON gpu"] * may_augment,
        }
        more = more_workers(self.loader.num_workers)
        return ", or ".join([f"loading is {self.stage_shares()}; {more}", *remedies[slowest]])

    def stage_shares(self) -> str:
        """Return the shares of the workers' time in the epoch so far that each stage takes, the largest first."""
        shares = self.stage_seconds / max(self.stage_seconds.sum(), 1e-9)
        stages = sorted(zip(shares, STAGES, strict=True), reverse=True)
        return ", ".join(f"{share:.0%} {stage}" for share, stage in stages)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch for the next iteration, as TrainSampler.set_epoch; `start` counts images of this process."""
        sampler = self.loader.sampler
        assert isinstance(sampler, TrainSampler)
        if (epoch, start) != (sampler.epoch, sampler.start):
            self.loader.started_iterator = None  # of another epoch, if any
        sampler.set_epoch(epoch, start)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Start the workers, and return an iterator over the batches.

        Raises:
            BrokenImageError: an image cannot be used and is not skipped, or too many were skipped.
        """
        self.loader.start()
        return self.prepared_batches()

    def prepared_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches, as `__iter__`.

        While the device works, the batch after the next one is prepared too. A device that has nothing to do, as after
        each log line of training, gets the next one first.
        """
        num_ahead = 0 if self.stream is None else 1
        batches = self.host_batches()
        with ThreadPoolExecutor(1) if num_ahead and self.dataset.device_share else SameThread() as executor:
            prepared: deque[tuple[Batch, Future[Prepared]]] = deque()
            while True:
                while len(prepared) <= num_ahead and not (prepared and prepared[0][1].done() and self.is_idle()):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    prepared.append((batch, executor.submit(self.prepare_ahead, batch)))
                if not prepared:
                    return
                yield self.result(*prepared.popleft(), executor)

    def is_idle(self) -> bool:
        """Return whether a GPU has finished the work of the current stream."""
        return self.stream is not None and torch.cuda.current_stream(self.device).query()

    def host_batches(self) -> Iterator[Batch]:
        """Yield the loader's batches that have images, after handling their failures."""
        self.stage_seconds[:] = 0
        self.worker_seconds = self.device_seconds = 0.0
        start = time.perf_counter()
        for batch in self.loader:
            self.worker_seconds += time.perf_counter() - start
            self.stage_seconds += batch.seconds
            self.handle_failures(batch)
            if len(batch.labels):
                yield batch
            start = time.perf_counter()

    def handle_failures(self, batch: Batch) -> None:
        """Log the images of a batch that could not be used.

        Raises:
            BrokenImageError: as `__iter__`.
        """
        for failure in batch.failures:
            if not self.skip_broken:
                raise BrokenImageError(f"{failure.name}: {failure.reason}; repair it, or set DATA.ON_ERROR to skip")
            if failure.name not in self.broken:
                self.broken.add(failure.name)
                logger.warning("skipped %s: %s", failure.name, failure.reason)
        if len(self.broken) > self.max_broken:
            raise BrokenImageError(
                f"DATA.MAX_BAD {self.max_broken}: {len(self.broken)} images of this process cannot be used, "
                f"the last is {batch.failures[-1].name}; raise it, or repair them: python -m data.verify lists all"
            )
        if not len(batch.labels) and isinstance(self.loader.sampler, TrainSampler):
            raise BrokenImageError(f"{batch.failures[0].name}: no image can replace it, all are broken")

    def result(self, batch: Batch, future: Future[Prepared], executor: Executor) -> tuple[Tensor, Tensor]:
        """Return a prepared batch, for which the current stream waits.

        Where the device finds a broken JPEG, the batch is loaded again here: decoding all images on the CPU finds the
        name of the broken one, and its replacement, as a worker would.
        """
        start = time.perf_counter()
        try:
            prepared = future.result()
        except BrokenImageError:
            batch = self.dataset.without_device().__getitems__([SampleKey(*key) for key in batch.keys.tolist()])
            self.handle_failures(batch)
            prepared = executor.submit(self.prepare_ahead, batch).result()
        self.device_seconds += time.perf_counter() - start
        if prepared.ready is not None:
            wait_for_batch(prepared[:2], prepared.ready)
        return prepared.images, prepared.labels

    def prepare_ahead(self, batch: Batch) -> Prepared:
        """Prepare a batch on the device, on a GPU on its own stream."""
        if self.stream is None:
            return Prepared(*self.prepare(batch), None)
        ready = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            prepared = Prepared(*self.prepare(batch), ready)
            ready.record()
        return prepared

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Copy a batch to the device and finish it there, on the current stream.

        It waits for the device only to decode JPEGs, and to check the kernels before their first use.

        Raises:
            BrokenImageError: the device found a broken JPEG.
        """
        if len(batch.crops):
            images = resize_on_device(batch.images, batch.crops, self.device)
        else:
            images = batch.images.to(self.device, non_blocking=True)
        images = augment_on_device(images, batch.operations)  # (B, H, W, 3)
        normalized = self.normalizer(images.permute(0, 3, 1, 2))  # (B, 3, H, W)
        if not erase_on_gpu(normalized, batch.erasures, self.erase_mode):
            for index, top, left, height, width, seed in batch.erasures.tolist():
                self.erase(normalized[index, :, top : top + height, left : left + width], seed)
        return normalized, batch.labels.to(self.device, non_blocking=True)

    def erase(self, box: Tensor, seed: int) -> None:
        """Fill a box (3, H, W) in place. The noise depends on its seed only, and is thus the same in any batch."""
        if self.erase_mode == "const":
            box.zero_()
        elif self.erase_mode == "rand":
            color = torch.randn(3, 1, 1, generator=self.generator.manual_seed(seed), device=self.device)
            box.copy_(color.expand_as(box))
        else:
            box.normal_(generator=self.generator.manual_seed(seed))


class Normalizer:
    """ImageNet's normalization of uint8 images, rounded as in torchvision's ToTensor and Normalize.

    The constants are tensors because GPUs turn a division by a number into a multiplication, which rounds differently.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.full = torch.tensor(255.0, device=device).view(1, 1, 1, 1)
        self.mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(IMAGENET_DEFAULT_STD, device=device).view(1, 3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize images (B, 3, H, W), uint8, to float32 in the same memory order."""
        return images.float().div_(self.full).sub_(self.mean).div_(self.std)


def wait_for_batch(tensors: tuple[Tensor, Tensor], ready: torch.cuda.Event) -> None:
    """Make the current stream wait for a batch, and keep the batch's memory until that stream is done with it."""
    stream = torch.cuda.current_stream(tensors[0].device)
    stream.wait_event(ready)
    for tensor in tensors:
        tensor.record_stream(stream)
