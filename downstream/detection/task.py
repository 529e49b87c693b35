"""Detection as a task of downstream/run.py."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.samplers import SampleKey
from downstream.detection.build import DetectionData, build_data, build_detector
from downstream.detection.data.coco import Record, decode_mask
from downstream.detection.data.dataset import Batch, collate
from downstream.detection.data.transforms import normalize
from downstream.detection.metrics import CocoEvaluator, Result, coco_results, metrics_table, write_results
from downstream.detection.pictures import LabeledObjects, objects_of_results, save_comparison
from downstream.run import Run, Task
from utils.config.errors import ConfigError
from utils.distributed.process import Process, gather_objects
from utils.logs.logger import logger
from utils.logs.plots import STEP_PANELS, Panel
from utils.training.recipe import WarmupSchedule

LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask")
PREVIEWS = 12


class Detection(Task):
    metric = "box_AP"
    best_name = "box_ap"
    panels = (
        Panel("training loss", {"train_loss": "all terms", **{f"train_{name}": name[5:] for name in LOSSES}}),
        Panel(
            "validation AP, %", {f"{who}{kind}_AP": f"{who}{kind}" for who in ("", "ema_") for kind in ("box", "mask")}
        ),
        *STEP_PANELS,
    )

    def __init__(self) -> None:
        self.evaluator: CocoEvaluator | None = None  # read once, by the first process

    def open_data(self, config: Any, process: Process) -> DetectionData:
        return build_data(config, process)

    def build_model(self, config: Any, num_classes: int) -> nn.Module:
        return build_detector(config, num_classes)

    def lengths(self, config: Any, num_train_images: int, images_per_step: int) -> tuple[int, int]:
        """Whole passes over the data."""
        steps_per_epoch = num_train_images // images_per_step
        if not steps_per_epoch:
            raise ConfigError(
                f"DATA.BATCH_SIZE {config.DATA.BATCH_SIZE}: a step takes {images_per_step} images over all processes "
                f"and micro-batches, more than the {num_train_images} training images; lower --batch-size"
            )
        return config.TRAIN.EPOCHS, steps_per_epoch

    def schedule(self, config: Any, base_lr: float, epochs: int, steps_per_epoch: int) -> WarmupSchedule:
        return WarmupSchedule(
            name="step",
            base_lr=base_lr,
            total_steps=epochs * steps_per_epoch,
            warmup_steps=config.TRAIN.WARMUP_STEPS,
            warmup_factor=config.TRAIN.WARMUP_FACTOR,
            milestones=[epoch * steps_per_epoch for epoch in config.TRAIN.DECAY_EPOCHS],
            decay_rate=config.TRAIN.DECAY_RATE,
        )

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        """Images normalized, float32, channels_last."""
        images = normalize(batch.images.to(device, non_blocking=True), batch.frames)
        return batch._replace(images=images, targets=[target.to(device) for target in batch.targets])

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return model(batch.images, batch.frames, batch.targets)

    def evaluate(self, run: Run, model: nn.Module, name: str) -> dict[str, float]:
        """COCO's 24 figures over all processes' images; the results go to results_<name>.json."""
        own = [result for found in self.find(run, model, run.data.val) for result in found]
        results = sorted((r for part in gather_objects(own) for r in part), key=lambda result: result["image_id"])
        figures: dict[str, float] = {}
        if run.process.is_main:
            if self.evaluator is None:
                self.evaluator = CocoEvaluator(run.data.val_images.annotations)
            write_results(results, run.folder / f"results_{name.lower()}.json")
            figures = self.evaluator.compute(results, per_class=run.config.TEST.PER_CLASS)
            logger.info("%s on %d images, %d detections:", name, run.data.num_val_images, len(results))
            for line in metrics_table(figures):
                logger.info(" * %s", line)
            for key in (key for key in figures if "/" in key):
                logger.info(" * %s %.2f", key, figures[key])
        return gather_objects(figures)[0]

    def find(self, run: Run, model: nn.Module, batches: Iterable[Batch]) -> Iterator[list[Result]]:
        """The results of each image, in the batches' order."""
        was_training = model.training
        model.eval()
        images = run.data.val_images
        for batch in batches:
            moved = self.to_device(batch, run.process.device)
            with run.precision.autocast():
                found = model.detect(moved.images, moved.frames)  # type: ignore[operator]
            for own, frame, image_id in zip(found, batch.frames, batch.image_ids, strict=True):
                yield coco_results(own, image_id=image_id, size=frame.original, category_ids=images.category_ids)
        model.train(was_training)

    def illustrate(self, run: Run, model: nn.Module) -> Path:
        """predictions.jpg: validation images, the truth on the left and what the model finds on the right."""
        images = run.data.val_images
        indices = np.linspace(0, len(images) - 1, min(PREVIEWS, len(images))).astype(int)
        batches = (collate([run.data.val.dataset[SampleKey(0, int(index))]]) for index in indices)
        pairs = []
        for index, results in zip(indices, self.find(run, model, batches), strict=True):
            record = images[int(index)]
            pairs.append(
                (
                    images.read_image(record),
                    truth_of(record, images.classes),
                    objects_of_results(results, images.categories),
                )
            )
        picture = run.folder / "predictions.jpg"
        save_comparison(pairs, picture)
        return picture


def truth_of(record: Record, classes: Sequence[str]) -> LabeledObjects:
    """A record's objects, to draw."""
    masks = [decode_mask(item, record.height, record.width) for item in record.segmentations]
    stacked = np.stack(masks).astype(bool) if masks else np.zeros((0, record.height, record.width), dtype=bool)
    return LabeledObjects(record.boxes, stacked, record.labels, [classes[label] for label in record.labels])
