"""Build the segmentor and its data from a configuration."""

from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from data.workers import RestartingDataLoader, more_workers
from downstream.build import build_backbone, make_loader
from downstream.segmentation.data.dataset import EvalImages, TrainImages
from downstream.segmentation.data.masked_images import MaskedImages
from downstream.segmentation.data.samplers import EndlessBatches
from downstream.segmentation.data.transforms import EvalTransform, TrainTransform
from downstream.segmentation.model.inference import Inference
from downstream.segmentation.model.sync_norm import synchronize_norms
from downstream.segmentation.model.upernet import UperNet
from utils.config.errors import ConfigError
from utils.distributed.process import Process
from utils.logs.logger import logger

MAX_CHECKED_MASKS = 500  # read when training starts, in seconds


@dataclass
class SegmentationData:
    """Loaders, and the validation images; `train` is None if the run only evaluates.

    `train` yields (images (B, 3, S, S), labels (B, S, S)), `val` one `EvalItem` at a time.
    """

    train: RestartingDataLoader | None
    val: RestartingDataLoader
    val_images: MaskedImages
    classes: list[str]
    num_train_images: int
    num_val_images: int

    def loading_advice(self) -> str:
        """Return how training images may be loaded faster, for a log line."""
        return "" if self.train is None else more_workers(self.train.num_workers)

    @property
    def example_image(self) -> Path:
        """Path of a validation image."""
        return self.val_images.image_paths[0]


def build_data(config: CfgNode, process: Process) -> SegmentationData:
    """Open the dataset and make this process's loaders.

    Raises:
        ConfigError: DATA.DATA_PATH is empty, or MODEL.NUM_CLASSES is not the dataset's.
        MissingFileError: a folder is missing.
        DataError: files are missing or do not fit each other.
    """
    if not config.DATA.DATA_PATH:
        raise ConfigError("DATA.DATA_PATH is empty: name the dataset's folder with --data-path", key="DATA.DATA_PATH")
    val_images = open_images(config, "val")
    train_images = None if config.EVAL_MODE else open_images(config, "train")
    if train_images is not None:
        log_classes_without_pixels(train_images)
    classes = val_images.classes
    if config.MODEL.NUM_CLASSES not in (None, len(classes)):
        raise ConfigError(
            f"MODEL.NUM_CLASSES {config.MODEL.NUM_CLASSES}: the dataset has {len(classes)} classes; "
            f"leave the key out, or name the right dataset with --data-path",
            key="MODEL.NUM_CLASSES",
        )
    train, val = None, val_loader(config, val_images, process)
    if train_images is not None:
        train = train_loader(config, train_images, process)
        train.next_loader = val
    return SegmentationData(
        train=train,
        val=val,
        val_images=val_images,
        classes=classes,
        num_train_images=0 if train_images is None else len(train_images),
        num_val_images=len(val_images),
    )


def log_classes_without_pixels(images: MaskedImages) -> None:
    """Warn of classes that no training mask has, if there are so few masks that all can be read now."""
    absent = images.classes_without_pixels() if len(images) <= MAX_CHECKED_MASKS else []
    if absent:
        logger.warning(
            "%d of %d classes have no pixel in the %d training masks: %s; classes count from 0, and 255 is ignored",
            *(len(absent), len(images.classes), len(images), ", ".join(absent[:5])),
        )


def open_images(config: CfgNode, split: str) -> MaskedImages:
    return MaskedImages(
        config.DATA.DATA_PATH, split, layout=config.DATA.DATASET, reduce_zero_label=reduces_zero_label(config)
    )


def reduces_zero_label(config: CfgNode) -> bool:
    chosen = config.DATA.REDUCE_ZERO_LABEL
    return config.DATA.DATASET == "ade20k" if chosen is None else chosen


def train_loader(config: CfgNode, images: MaskedImages, process: Process) -> RestartingDataLoader:
    aug = config.AUG
    transform = TrainTransform(
        scale=tuple(config.DATA.SCALE),
        ratio=tuple(aug.RATIO),
        crop_size=aug.CROP_SIZE,
        max_category_share=aug.MAX_CATEGORY_SHARE,
        hflip=aug.HFLIP,
        colors=aug.COLOURS,
    )
    batches = EndlessBatches(
        len(images),
        batch_size=config.DATA.BATCH_SIZE,
        batches_per_epoch=config.TRAIN.EVAL_STEPS * config.TRAIN.ACCUMULATION_STEPS,
        rank=process.rank,
        num_processes=process.num_processes,
        seed=config.SEED,
    )
    return make_loader(config, TrainImages(images, transform, config.SEED), batch_sampler=batches)


def val_loader(config: CfgNode, images: MaskedImages, process: Process) -> RestartingDataLoader:
    """Return a loader of every P-th image from the r-th on, for process r of P: each image once over all processes."""
    factors = tuple(config.TEST.FACTORS) if config.TEST.MULTI_SCALE else (1.0,)
    dataset = EvalImages(images, EvalTransform(tuple(config.DATA.SCALE), factors))
    indices = range(process.rank, len(images), process.num_processes)
    return make_loader(config, dataset, sampler=indices, batch_size=None)


def build_model(config: CfgNode, num_classes: int, process: Process | None = None) -> UperNet:
    """Return the segmentor that MODEL.* describes, newly initialized.

    Args:
        process: synchronize the heads' batch norms over its group if MODEL.HEAD.SYNC_NORM says so; None: do not.

    Raises:
        ConfigError: MODEL.TYPE names an unknown timm model.
    """
    backbone = build_backbone(config)
    head = config.MODEL.HEAD
    model = UperNet(
        backbone,
        backbone.widths,  # type: ignore[arg-type]
        num_classes,
        channels=head.CHANNELS,
        auxiliary_channels=head.AUXILIARY_CHANNELS,
        dropout=head.DROPOUT,
    )
    if process is not None and head.SYNC_NORM:
        model.decode_head = synchronize_norms(model.decode_head, process)  # type: ignore[assignment]
        if model.auxiliary_head is not None:
            model.auxiliary_head = synchronize_norms(model.auxiliary_head, process)  # type: ignore[assignment]
    return model


def build_inference(config: CfgNode) -> Inference:
    test = config.TEST
    return Inference(flip=test.MULTI_SCALE, window=test.WINDOW if test.SLIDE else 0, stride=test.STRIDE)
