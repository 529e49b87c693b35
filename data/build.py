"""Build loaders, class names and training targets from a configuration."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor
from yacs.config import CfgNode

from data import kernel_dispatch
from data.batch_crops import LARGE_SIDE, SMALL_SIDE
from data.batch_decoding import check_support
from data.dataset import ImageDataset, ImageSource, keep_batch
from data.errors import DataError
from data.kernel_dispatch import check_exactly_resizing, kernel_works
from data.prefetch import DeviceLoader, Normalizer
from data.samplers import EvalSampler, SampleKey, TrainSampler
from data.sources.digits import Digits
from data.sources.hugging_face import HuggingFaceImages
from data.sources.idx import IdxImages
from data.sources.image_folder import ImageFolder
from data.sources.webdataset_shards import WebDatasetShards
from data.sources.zip_folder import ZipFolder, cache_archives
from data.transforms import EvalTransform, TrainTransform
from data.workers import RestartingDataLoader, choose_num_workers

logger = logging.getLogger("mlla.data")
MAX_KEPT_BYTES = 2**27  # of a process's evaluation images, which then are loaded once in a run
TargetMaker = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Data:
    """Loaders of (normalized images (B, 3, H, W), labels (B,)) on the device, and class names; `train` is None in
    evaluation mode.
    """

    train: DeviceLoader | None
    val: DeviceLoader
    classes: list[str]

    @property
    def num_train_images(self) -> int:
        return 0 if self.train is None else self.train.num_images

    @property
    def num_val_images(self) -> int:
        return self.val.num_images

    @property
    def example_image(self) -> Path | None:
        """Path of a validation image, or None if the images are no files."""
        path = Path(self.val.dataset.source.name(0))
        return path if path.is_file() else None

    def loading_advice(self) -> str:
        """Return how training images may be loaded faster, for a log line."""
        return "" if self.train is None else self.train.advice()

    def expect_epoch(self, epoch: int) -> None:
        """Let the workers begin an epoch of training when those of the evaluation run out of work."""
        assert self.train is not None
        self.train.set_epoch(epoch)
        self.train.loader.start_after(self.val.loader)

    def loading_stages(self) -> str:
        """Return what takes the time of the training loader's workers."""
        return "" if self.train is None else self.train.stage_shares()

    @property
    def num_workers(self) -> int:
        """Number of loader workers of this process."""
        return self.val.loader.num_workers

    def preview(self, count: int) -> tuple[Tensor, list[int]]:
        """Return up to `count` evenly spaced validation images (N, 3, H, W), normalized, on the CPU, and labels."""
        return next(self.previews(count, batch_size=count))

    def previews(self, count: int, *, batch_size: int) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield the images of `preview` in batches, each of which is evenly spaced itself."""
        indices = np.linspace(0, self.num_val_images - 1, min(count, self.num_val_images)).astype(int)
        num_batches = -(-len(indices) // batch_size)
        for first in range(num_batches):
            batch = self.val.dataset.without_device().__getitems__(
                [SampleKey(0, int(i)) for i in indices[first::num_batches]]
            )
            yield Normalizer()(batch.images.permute(0, 3, 1, 2)), batch.labels.tolist()


def build_data(config: CfgNode, *, rank: int = 0, num_processes: int = 1, device: torch.device | str = "cpu") -> Data:
    """Open the dataset, check it against MODEL.NUM_CLASSES, and build this process's loaders.

    Raises:
        MissingFileError: folders, archives or images are missing.
        DataError: classes differ between splits or from MODEL.NUM_CLASSES, an archive or map is damaged, an optional
            library is missing, or there is too little memory for the cache.
    """
    val_source = open_split(config, "val")
    train_source = None if config.EVAL_MODE else open_split(config, "train")
    if train_source is not None:
        number_same_classes(train_source, val_source)
    classes = val_source.classes
    if train_source is not None and train_source.classes != classes:
        different = sorted(set(train_source.classes) ^ set(classes))
        raise DataError(
            f"DATA.DATA_PATH {config.DATA.DATA_PATH!r}: train/ has {len(train_source.classes)} classes, val/ has "
            f"{len(classes)}; only in one of them: {', '.join(different[:5])}; both must have the same class folders"
        )
    if train_source is not None and len(unseen := np.setdiff1d(val_source.labels, train_source.labels)):
        raise DataError(
            f"DATA.DATA_PATH {config.DATA.DATA_PATH!r}: the validation split has images of {len(unseen)} classes that "
            f"the training split has none of, such as {classes[unseen[0]]}; add some, or remove those classes"
        )
    if train_source is not None:
        check_training_classes(config, classes, train_source.labels)
    check_num_classes(config, len(classes))
    archives: list[ZipFolder] = [source for source in (train_source, val_source) if isinstance(source, ZipFolder)]
    if archives and config.DATA.CACHE_MODE != "no":
        cache_archives(archives, config.DATA.CACHE_MODE, rank, num_processes)
    device = torch.device(device)
    train, val = None, eval_loader(config, val_source, rank, num_processes, device)
    if train_source is not None:
        train = train_loader(config, train_source, rank, num_processes, device)
        train.loader.next_loader = val.loader
    return Data(train, val, classes)


def check_num_classes(config: CfgNode, num_classes: int) -> None:
    """Compare MODEL.NUM_CLASSES with the dataset; in evaluation the model may have more outputs, which is a warning.

    Raises:
        DataError: they differ.
    """
    asked = config.MODEL.NUM_CLASSES
    if asked in (None, num_classes):
        return
    if not config.EVAL_MODE or asked < num_classes:
        raise DataError(
            f"MODEL.NUM_CLASSES {asked}: the dataset has {num_classes} classes; "
            "leave the key out, or name the right dataset with --data-path"
        )
    logger.warning(
        "MODEL.NUM_CLASSES %d: the dataset has %d classes, which stand for the first outputs in the order of their "
        "names; predictions of the other outputs count as wrong",
        *(asked, num_classes),
    )


def number_same_classes(*splits: ImageSource) -> None:
    """Give splits whose classes are numbers the same ones, since a split may lack images of the last classes."""
    most = max((split.classes for split in splits), key=len)
    if most == [str(label) for label in range(len(most))]:
        for split in splits:
            if split.classes == most[: len(split.classes)]:
                split.classes = most


def check_training_classes(config: CfgNode, classes: Sequence[str], labels: Sequence[int] | np.ndarray) -> None:
    """Log how many classes have no training image.

    Raises:
        DataError: there is only one class.
    """
    if len(classes) < 2:
        raise DataError(
            f"DATA.DATA_PATH {config.DATA.DATA_PATH!r}: only one class, {', '.join(classes)}; a classifier needs two. "
            "Does the path name the folder that holds train/ and val/, with a folder per class in each?"
        )
    if len(absent := np.setdiff1d(np.arange(len(classes)), labels)):
        logger.warning(
            "%d of %d classes have no image in the training split: %s; labels count from 0",
            *(len(absent), len(classes), ", ".join(classes[label] for label in absent[:5])),
        )


def open_split(config: CfgNode, split: str) -> ImageSource:
    """Open the source that DATA.DATASET names."""
    data = config.DATA
    if data.DATASET == "digits":
        return Digits(split, data.IMG_SIZE, data.CLASSES)
    kind, _, name = data.DATASET.partition("/")
    if kind == "hfds":
        return HuggingFaceImages(name, data.DATA_PATH, split)
    if kind == "idx":
        return IdxImages(str(Path(data.DATA_PATH) / name), split)
    if kind == "wds":
        return WebDatasetShards(str(Path(data.DATA_PATH) / name), split)
    if data.ZIP_MODE:
        return ZipFolder(data.DATA_PATH, split)
    return ImageFolder(data.DATA_PATH, split)


def train_loader(
    config: CfgNode, source: ImageSource, rank: int, num_processes: int, device: torch.device
) -> DeviceLoader:
    decodes_on_device = config.DATA.DECODE_ON == "gpu"
    if decodes_on_device:
        check_support(device)
    transform = train_transform(config, device)
    if decodes_on_device and transform.pads:
        raise DataError(
            f"DATA.DECODE_ON gpu: images of DATA.IMG_SIZE {config.DATA.IMG_SIZE} are padded by the workers; "
            "set it to cpu, or set AUG.SCALE"
        )
    sampler = TrainSampler(
        len(source),
        rank=rank,
        num_processes=num_processes,
        seed=config.SEED,
        keeps_shard=config.DATA.ZIP_MODE and config.DATA.CACHE_MODE == "part",
    )
    dataset = ImageDataset(
        source,
        transform,
        config.SEED,
        device_share=config.DATA.GPU_DECODE_SHARE if decodes_on_device else 0.0,
        replacements=sampler.order,
        max_failures=config.DATA.MAX_BAD,
    )
    return make_loader(config, dataset, sampler, device, drop_last=True)


def train_transform(config: CfgNode, device: torch.device) -> TrainTransform:
    """Return the transform for where DATA.AUGMENT_ON says; "auto" leaves to the CPU what the GPU does not support.

    Images that the GPU decodes are augmented there in any case.
    """
    place, decodes_on_device = config.DATA.AUGMENT_ON, config.DATA.DECODE_ON == "gpu"
    if "gpu" in (place, config.DATA.DECODE_ON) and device.type != "cuda":
        key, others = ("AUGMENT_ON", "cpu or auto") if place == "gpu" else ("DECODE_ON", "cpu")
        raise DataError(f"DATA.{key} gpu: this process trains on {device.type}; set it to {others}")
    make = partial(
        TrainTransform,
        config.DATA.IMG_SIZE,
        interpolation=config.DATA.INTERPOLATION,
        scale=tuple(config.AUG.SCALE) if config.AUG.SCALE else None,
        ratio=tuple(config.AUG.RATIO),
        hflip=config.AUG.HFLIP,
        auto_augment=config.AUG.AUTO_AUGMENT,
        color_jitter=config.AUG.COLOR_JITTER,
        erase_prob=config.AUG.REPROB,
        erase_count=config.AUG.RECOUNT,
        device_side=LARGE_SIDE if decodes_on_device else SMALL_SIDE,
    )
    if place == "cpu" or device.type != "cuda":
        return make(on_device=False)
    try:
        return make(on_device=True)
    except DataError as error:
        if place == "gpu":
            raise
        if decodes_on_device:
            raise DataError(
                f"DATA.DECODE_ON gpu: set it to cpu, since a GPU that decodes augments ({error})"
            ) from error
        return make(on_device=False)


def kernels_in_use(config: CfgNode, device: torch.device) -> list[str]:
    """List the kernels for images of a training run on a GPU, as "module:name", see `kernel_dispatch`."""
    if device.type != "cuda":
        return []
    transform = train_transform(config, device)
    names = ["augmenting", "resizing"] if transform.recorded_policy is not None else []
    names += ["erasing"] if config.AUG.REPROB > 0 else []
    names += ["exactly_resizing"] if config.DATA.EXACT_EVAL else []
    return [f"{kernel_dispatch.__name__}:{name}" for name in names]


def eval_loader(
    config: CfgNode, source: ImageSource, rank: int, num_processes: int, device: torch.device
) -> DeviceLoader:
    transform = EvalTransform(config.DATA.IMG_SIZE, crop=config.TEST.CROP, interpolation=config.DATA.INTERPOLATION)
    dataset = ImageDataset(source, transform, config.SEED, is_exact=config.DATA.EXACT_EVAL)
    sampler = EvalSampler(len(source), rank=rank, num_processes=num_processes)
    keeps_batches = len(sampler) * 3 * config.DATA.IMG_SIZE**2 <= MAX_KEPT_BYTES

    def choose_place() -> None:
        if device.type == "cuda" and config.DATA.EXACT_EVAL and not keeps_batches:
            transform.on_device = kernel_works(check_exactly_resizing, device, "Pillow, which is slower")

    options = {"keeps_batches": keeps_batches, "before_start": choose_place}
    return make_loader(config, dataset, sampler, device, drop_last=False, **options)


def make_loader(
    config: CfgNode,
    dataset: ImageDataset,
    sampler: TrainSampler | EvalSampler,
    device: torch.device,
    *,
    drop_last: bool,
    **options: Any,
) -> DeviceLoader:
    """Return a loader of a dataset; `options` are those of RestartingDataLoader."""
    num_workers = choose_num_workers(config.DATA.NUM_WORKERS, device)
    loader = RestartingDataLoader(
        dataset,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=keep_batch,
        pin_memory=config.DATA.PIN_MEMORY and device.type == "cuda",
        drop_last=drop_last,
        persistent_workers=num_workers > 0,
        **options,
        generator=torch.Generator(),  # else each epoch's start draws from the generator of dropout
    )
    return DeviceLoader(
        loader,
        device,
        erase_mode=config.AUG.REMODE,
        skip_broken=config.DATA.ON_ERROR == "skip",
        max_broken=config.DATA.MAX_BAD,
    )


def build_targets(config: CfgNode, num_classes: int) -> TargetMaker:
    """Return a function from (images, labels (B,)) to (images, soft targets (B, num_classes)) that applies mixup and
    cutmix, if enabled, and label smoothing.
    """
    aug, smoothing = config.AUG, config.MODEL.LABEL_SMOOTHING
    if aug.MIXUP or aug.CUTMIX or aug.CUTMIX_MINMAX:
        return Mixup(
            mixup_alpha=aug.MIXUP,
            cutmix_alpha=aug.CUTMIX,
            cutmix_minmax=aug.CUTMIX_MINMAX,
            prob=aug.MIXUP_PROB,
            switch_prob=aug.MIXUP_SWITCH_PROB,
            mode=aug.MIXUP_MODE,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )
    return lambda images, labels: (images, mixup_target(labels, num_classes, smoothing=smoothing))
