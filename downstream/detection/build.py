"""Build the detector and its data from a configuration."""

from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from data.errors import DataError
from data.samplers import EvalSampler
from data.workers import RestartingDataLoader, more_workers
from downstream.build import build_backbone, make_loader
from downstream.detection.data.coco import CocoImages
from downstream.detection.data.dataset import EvalImages, TrainImages, collate
from downstream.detection.data.samplers import AspectBatches
from downstream.detection.data.transforms import TrainTransform
from downstream.detection.model.mask_rcnn import MaskRCNN
from utils.config.errors import ConfigError
from utils.distributed.process import Process


@dataclass(frozen=True)
class DetectionData:
    """Loaders of `Batch`, and the validation images; `train` is None if the run only evaluates.

    Evaluation reads one image at a time: padding to the size of another image would change the detections.
    """

    train: RestartingDataLoader | None
    val: RestartingDataLoader
    val_images: CocoImages

    @property
    def classes(self) -> list[str]:
        return self.val_images.classes

    @property
    def num_train_images(self) -> int:
        return 0 if self.train is None else len(self.train.dataset)  # type: ignore[arg-type]

    @property
    def num_val_images(self) -> int:
        return len(self.val_images)

    def loading_advice(self) -> str:
        """Return how training images may be loaded faster, for a log line."""
        return "" if self.train is None else more_workers(self.train.num_workers)

    @property
    def example_image(self) -> Path:
        """Path of a validation image."""
        return self.val_images.folder / self.val_images[0].file_name


def build_detector(config: CfgNode, num_classes: int) -> MaskRCNN:
    """Return the detector that MODEL.* describes, newly initialized."""
    sizes = config.MODEL.DETECTOR
    return MaskRCNN(
        build_backbone(config),
        num_classes,
        width=sizes.WIDTH,
        hidden=sizes.HIDDEN,
        rpn_samples=sizes.RPN_SAMPLES,
        roi_samples=sizes.ROI_SAMPLES,
        max_proposals=sizes.MAX_PROPOSALS,
        kernels=config.MODEL.KERNELS,
    )


def build_data(config: CfgNode, process: Process) -> DetectionData:
    """Open the dataset and make this process's loaders.

    Raises:
        ConfigError: DATA.DATA_PATH is empty.
        MissingFileError: annotation files, folders or images are missing.
        DataError: an annotation file is not right, or training and validation have different classes.
    """
    data = config.DATA
    if not data.DATA_PATH:
        raise ConfigError("DATA.DATA_PATH is empty: name the dataset's folder with --data-path", key="DATA.DATA_PATH")
    root = Path(data.DATA_PATH)
    val_images = CocoImages(root / data.VAL_ANNOTATIONS, root / data.VAL_IMAGES, for_training=False)
    val = make_loader(
        config,
        EvalImages(val_images, short_side=config.TEST.SHORT_SIDE, long_side=config.TEST.LONG_SIDE),
        sampler=EvalSampler(len(val_images), rank=process.rank, num_processes=process.num_processes),
        collate_fn=collate,
    )
    if config.EVAL_MODE:
        return DetectionData(None, val, val_images)
    train_images = CocoImages(root / data.TRAIN_ANNOTATIONS, root / data.TRAIN_IMAGES, for_training=True)
    if train_images.classes != val_images.classes:
        different = sorted(set(train_images.classes) ^ set(val_images.classes)) or train_images.classes
        raise DataError(
            f"{train_images.annotations} and {val_images.annotations} have different categories, or in another order: "
            f"{', '.join(different[:5])}; both must list the same"
        )
    batches = AspectBatches(
        train_images.aspect_ratios,
        batch_size=data.BATCH_SIZE,
        micro_batches=config.TRAIN.ACCUMULATION_STEPS,
        rank=process.rank,
        num_processes=process.num_processes,
        seed=config.SEED,
    )
    dataset = TrainImages(train_images, build_transform(config), config.SEED)
    train = make_loader(config, dataset, batch_sampler=batches, collate_fn=collate)
    train.next_loader = val
    return DetectionData(train, val, val_images)


def build_transform(config: CfgNode) -> TrainTransform:
    aug = config.AUG
    return TrainTransform(
        short_sides=aug.SHORT_SIDES,
        long_side=aug.LONG_SIDE,
        flip=aug.HFLIP,
        crop=aug.CROP,
        crop_short_sides=aug.CROP_SHORT_SIDES,
        crop_size=aug.CROP_SIZE,
    )
