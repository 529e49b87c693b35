"""From a configuration to loaders, class names and training targets."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.digits import Digits
from data.image_folder import open_image_folder
from data.samplers import EvalSampler, LabelledImages, SampleKey, TrainSampler, TransformedImages
from data.transforms import eval_transform, train_transform
from data.workers import leave_process_group

TargetMaker = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Data:
    """Loaders of (normalised images (B, 3, H, W), labels (B,)); train is None where only evaluation is asked."""

    train: DataLoader | None
    val: DataLoader
    classes: list[str]

    @property
    def num_train_images(self) -> int:
        return 0 if self.train is None else len(self.train.dataset)  # type: ignore[arg-type]

    @property
    def num_val_images(self) -> int:
        return len(self.val.dataset)  # type: ignore[arg-type]

    def preview(self, count: int) -> tuple[Tensor, list[int]]:
        """Up to `count` evenly spaced validation images (N, 3, H, W), normalised, and their labels."""
        indices = np.linspace(0, self.num_val_images - 1, min(count, self.num_val_images)).astype(int)
        samples = [self.val.dataset[SampleKey(0, int(index))] for index in indices]
        return torch.stack([image for image, _ in samples]), [label for _, label in samples]


def build_data(config: CfgNode, *, rank: int, num_processes: int) -> Data:
    """Open the data set, check it against MODEL.NUM_CLASSES, and make this process's loaders.

    Raises:
        FileNotFoundError: folders or images are missing.
        ValueError: classes differ between splits, or from MODEL.NUM_CLASSES.
    """
    val_images = open_split(config, "val")
    train_images = None if config.EVAL_MODE else open_split(config, "train")
    classes = val_images.classes
    if train_images is not None and train_images.classes != classes:
        different = sorted(set(train_images.classes) ^ set(classes))
        raise ValueError(
            f"DATA.DATA_PATH {config.DATA.DATA_PATH!r}: train/ has {len(train_images.classes)} classes, val/ has "
            f"{len(classes)}; only in one of them: {', '.join(different[:5])}; both must have the same class folders"
        )
    if config.MODEL.NUM_CLASSES not in (None, len(classes)):
        raise ValueError(
            f"MODEL.NUM_CLASSES {config.MODEL.NUM_CLASSES}: the data set has {len(classes)} classes; "
            f"leave the key out, or point --data-path to the data set that is meant"
        )
    train = None if train_images is None else train_loader(config, train_images, rank, num_processes)
    return Data(train, eval_loader(config, val_images, rank, num_processes), classes)


def open_split(config: CfgNode, split: str) -> LabelledImages:
    if config.DATA.DATASET == "digits":
        return Digits(split, config.DATA.IMG_SIZE, config.DATA.CLASSES)
    return open_image_folder(config.DATA.DATA_PATH, split)


def train_loader(config: CfgNode, images: LabelledImages, rank: int, num_processes: int) -> DataLoader:
    transform = train_transform(
        config.DATA.IMG_SIZE,
        interpolation=config.DATA.INTERPOLATION,
        scale=tuple(config.AUG.SCALE),
        ratio=tuple(config.AUG.RATIO),
        hflip=config.AUG.HFLIP,
        auto_augment=config.AUG.AUTO_AUGMENT,
        color_jitter=config.AUG.COLOR_JITTER,
        erase_prob=config.AUG.REPROB,
        erase_mode=config.AUG.REMODE,
        erase_count=config.AUG.RECOUNT,
    )
    sampler = TrainSampler(len(images), rank=rank, num_processes=num_processes, seed=config.SEED)
    return make_loader(config, TransformedImages(images, transform, config.SEED), sampler, drop_last=True)


def eval_loader(config: CfgNode, images: LabelledImages, rank: int, num_processes: int) -> DataLoader:
    transform = eval_transform(config.DATA.IMG_SIZE, crop=config.TEST.CROP, interpolation=config.DATA.INTERPOLATION)
    sampler = EvalSampler(len(images), rank=rank, num_processes=num_processes)
    return make_loader(config, TransformedImages(images, transform, config.SEED), sampler, drop_last=False)


def make_loader(
    config: CfgNode, dataset: TransformedImages, sampler: TrainSampler | EvalSampler, *, drop_last: bool
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=sampler,
        num_workers=config.DATA.NUM_WORKERS,
        pin_memory=config.DATA.PIN_MEMORY and torch.cuda.is_available(),
        drop_last=drop_last,
        persistent_workers=config.DATA.NUM_WORKERS > 0,
        worker_init_fn=leave_process_group,
        generator=torch.Generator(),  # else each start of an epoch draws from the one that dropout draws from
    )


def build_targets(config: CfgNode, num_classes: int) -> TargetMaker:
    """What turns (images, labels (B,)) into (images, soft targets (B, num_classes)): mixup and cutmix where on,
    label smoothing always.
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
