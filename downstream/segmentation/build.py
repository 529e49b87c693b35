"""From a configuration to segmentation's data and model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.workers import RestartingDataLoader
from downstream.build import build_backbone
from downstream.segmentation.data.dataset import MaskedImages
from downstream.segmentation.data.samplers import EndlessBatches, EvalSample, EvalSamples, TrainSamples
from downstream.segmentation.data.transforms import EvalTransform, TrainTransform
from downstream.segmentation.model.inference import Inference
from downstream.segmentation.model.sync_norm import synchronize_norms
from downstream.segmentation.model.upernet import UperNet
from downstream.workers import set_up_worker
from utils.distributed.process import Process


@dataclass
class SegmentationData:
    """Loaders; train gives (images (B, 3, S, S), labels (B, S, S)), val one `EvalSample` at a time.

    train is None where only evaluation is asked.
    """

    train: DataLoader | None
    val: DataLoader[EvalSample]
    val_images: MaskedImages
    classes: list[str]
    num_train_images: int
    num_val_images: int


def build_data(config: CfgNode, process: Process) -> SegmentationData:
    """Open the data set and make this process's loaders.

    Raises:
        DataError: files are missing or do not fit each other.
        ValueError: MODEL.NUM_CLASSES is not the data set's.
    """
    val_images = open_images(config, "val")
    train_images = None if config.EVAL_MODE else open_images(config, "train")
    classes = val_images.classes
    if config.MODEL.NUM_CLASSES not in (None, len(classes)):
        raise ValueError(
            f"MODEL.NUM_CLASSES {config.MODEL.NUM_CLASSES}: the data set has {len(classes)} classes; "
            f"leave the key out, or point --data-path to the data set that is meant"
        )
    return SegmentationData(
        train=None if train_images is None else train_loader(config, train_images, process),
        val=val_loader(config, val_images, process),
        val_images=val_images,
        classes=classes,
        num_train_images=0 if train_images is None else len(train_images),
        num_val_images=len(val_images),
    )


def open_images(config: CfgNode, split: str) -> MaskedImages:
    return MaskedImages(
        config.DATA.DATA_PATH, split, layout=config.DATA.DATASET, reduce_zero_label=reduces_zero_label(config)
    )


def reduces_zero_label(config: CfgNode) -> bool:
    chosen = config.DATA.REDUCE_ZERO_LABEL
    return config.DATA.DATASET == "ade20k" if chosen is None else chosen


def train_loader(config: CfgNode, images: MaskedImages, process: Process) -> DataLoader[tuple[Tensor, Tensor]]:
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
    return RestartingDataLoader(
        TrainSamples(images, transform, config.SEED),
        batch_sampler=batches,
        persistent_workers=config.DATA.NUM_WORKERS > 0,
        **shared_options(config),
    )


def val_loader(config: CfgNode, images: MaskedImages, process: Process) -> DataLoader[EvalSample]:
    """Every P-th image from the r-th on, for process r of P: each image once over all processes."""
    factors = tuple(config.TEST.FACTORS) if config.TEST.MULTI_SCALE else (1.0,)
    samples = EvalSamples(images, EvalTransform(tuple(config.DATA.SCALE), factors))
    numbers = range(process.rank, len(images), process.num_processes)
    return RestartingDataLoader(samples, sampler=numbers, batch_size=None, **shared_options(config))


def shared_options(config: CfgNode) -> dict[str, Any]:
    return {
        "num_workers": config.DATA.NUM_WORKERS,
        "pin_memory": config.DATA.PIN_MEMORY and torch.cuda.is_available(),
        "set_up_worker": set_up_worker,
        "generator": torch.Generator(),  # else each start of an epoch draws from the one that dropout draws from
    }


def build_model(config: CfgNode, num_classes: int, process: Process | None = None) -> UperNet:
    """The segmentor that MODEL.* describes, with fresh weights; with a process, its heads' norms fit several.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown timm model.
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
