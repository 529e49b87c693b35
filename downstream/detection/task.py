"""Detection as a task: data, model, losses, COCO metrics and images of predictions."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data.samplers import SampleKey
from downstream.detection.build import DetectionData, build_data, build_detector
from downstream.detection.data.coco import CocoImages, Record
from downstream.detection.data.dataset import Batch, collate
from downstream.detection.data.transforms import normalize
from downstream.detection.metrics import (
    CocoEvaluator,
    Result,
    choose_scoring_workers,
    coco_results,
    metrics_table,
    write_results,
)
from downstream.detection.model.flops import HEIGHT, MASKS, PROPOSALS, PUBLISHED, WIDTH, profile_detector
from downstream.detection.model.kernel_dispatch import KERNELS
from downstream.detection.model.mask_rcnn import MaskRCNN
from downstream.detection.model.masks import paste_masks
from downstream.detection.model.structures import Frame, Target
from downstream.detection.pictures import LabeledObjects, objects_of_results, save_comparison
from downstream.detection.synthetic import NUM_CLASSES, FixedDetections, synthetic_inputs
from downstream.task import DenseLosses, DenseTask
from utils.benchmark.measure import synthetic_images
from utils.distributed.process import Process, gather_objects
from utils.logs.logger import errors_logged, logger, with_bar
from utils.logs.output_dir import output_errors
from utils.logs.plots import STEP_PANELS, Panel
from utils.speed.compile import GRAPHS
from utils.speed.flops import profile_table
from utils.speed.shape_graphs import Part
from utils.training.derived import Derived
from utils.training.lr_schedule import DenseSchedule
from utils.training.task import Run

LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask")
NUM_PREVIEWS = 12


class DetectionLosses(DenseLosses):
    """Losses of a micro-batch by name.

    Attributes:
        fixed_part: what the detector computes from the images alone; CUDA graphs may take its place.
    """

    network: MaskRCNN

    def __init__(self, task: DenseTask, config: CfgNode, network: nn.Module) -> None:
        super().__init__(task, config, network)
        self.fixed_part: Part = self.network.features

    def record_fixed_part(self, make: Callable[[Part, list[nn.Parameter]], Part]) -> None:
        """Replace `fixed_part` by what `make` makes of it and its parameters."""
        self.fixed_part = make(self.network.features, self.network.feature_parameters())

    def __call__(self, batch: Batch, _: int) -> Mapping[str, Tensor]:
        return self.task.batch_losses(self.config, self.compute, batch)

    def compute(self, images: Tensor, frames: Sequence[Frame], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return what calling the detector returns."""
        return self.network.losses(self.fixed_part(images), frames, targets)


class Detection(DenseTask):
    """Object detection and instance segmentation with Mask R-CNN, judged by box AP."""

    metric = "box_AP"
    metric_label = "box AP"
    best_name = "box_ap"
    predict_command = "python -m downstream.detection.predict"
    panels = (
        Panel("training loss", {"train_loss": "all terms", **{f"train_{name}": name[5:] for name in LOSSES}}),
        Panel(
            "validation AP, %",
            {"box_AP": "box", "mask_AP": "mask", "ema_box_AP": "EMA, box", "ema_mask_AP": "EMA, mask"},
            is_score=True,
        ),
        *STEP_PANELS,
    )

    losses_class = DetectionLosses
    kernels = KERNELS
    auto_training_mode = GRAPHS  # a compilation for each new image size would outlast many runs

    def __init__(self) -> None:
        self.evaluator: CocoEvaluator | None = None  # made once, on the first process

    def build_data(self, config: CfgNode, process: Process) -> DetectionData:
        return build_data(config, process)

    def build_model(self, config: CfgNode, process: Process, num_classes: int | None) -> nn.Module:  # noqa: ARG002
        return build_detector(config, num_classes or NUM_CLASSES)

    def schedule(self, config: CfgNode, derived: Derived) -> DenseSchedule:
        train = config.TRAIN
        return DenseSchedule(
            name="step",
            base_lr=train.BASE_LR * derived.lr_scale,
            total_steps=derived.total_steps,
            warmup_steps=train.WARMUP_STEPS,
            warmup_factor=train.WARMUP_FACTOR,
            milestones=[epoch * derived.steps_per_epoch for epoch in train.DECAY_EPOCHS],
            decay_rate=train.DECAY_RATE,
        )

    def training_forward(self, config: CfgNode, model: nn.Module, derived: Derived) -> object:  # noqa: ARG002
        """Run the backbone on the largest images: the rest, which depends on the data, takes a twentieth of it."""
        images = synthetic_images(
            config.DATA.BATCH_SIZE, self.image_size(config, training=True), next(model.parameters()).device
        )
        return model.backbone(images)  # type: ignore[operator]

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        """Return a batch on the device, with normalized images, float32, channels_last."""
        images = normalize(batch.images.to(device, non_blocking=True), batch.frames)
        return batch._replace(images=images, targets=[target.to(device) for target in batch.targets])

    def batch_losses(self, config: CfgNode, network: Callable[..., Any], batch: Batch) -> Mapping[str, Tensor]:  # noqa: ARG002
        return network(batch.images, batch.frames, batch.targets)

    def evaluate(self, run: Run, models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
        return {name: self.score(run, name, found) for name, found in self.find(run, models).items()}

    def find(self, run: Run, models: Mapping[str, nn.Module]) -> dict[str, list[Result]]:
        """Return the models' results on this process's validation images."""
        local: dict[str, list[Result]] = {name: [] for name in models}
        for batch in with_bar(run.data.val, models, is_main=run.process.is_main):
            moved = self.to_device(batch, run.process.device)
            for name, found in local.items():
                found += [result for results in self.detect(run, models[name], moved) for result in results]
        return local

    def score(self, run: Run, name: str, local: list[Result]) -> dict[str, float]:
        """Return COCO's 24 metrics of all processes' results, and write these to results_<name>.json."""
        results = sorted((r for part in gather_objects(local) for r in part), key=lambda result: result["image_id"])
        metrics: dict[str, float] = {}
        if run.process.is_main:
            if self.evaluator is None:
                self.evaluator = CocoEvaluator(run.data.val_images.annotations)
            metrics = self.evaluator.compute(
                results,
                per_class=run.config.TEST.PER_CLASS,
                num_workers=choose_scoring_workers(len(results)) if run.data.val.num_workers else 0,
                meanwhile=partial(self.write_results, run, name, results),
            )
            logger.info("%s on %d images, %d detections:", name, run.data.num_val_images, len(results))
            for line in metrics_table(metrics):
                logger.info(" * %s", line)
            for key in (key for key in metrics if "/" in key):
                logger.info(" * %s %.2f", key, metrics[key])
        return gather_objects(metrics)[0]

    def write_results(self, run: Run, name: str, results: Sequence[Result]) -> None:
        path = run.folder / f"results_{name.lower()}.json"
        is_result = run.config.EVAL_MODE  # which must be written; in training it is a record beside the metrics
        with output_errors(run.folder) if is_result else errors_logged(f"{path}: could not be written"):
            write_results(results, path)

    def detect(self, run: Run, model: nn.Module, batch: Batch) -> list[list[Result]]:
        """Return the results of each image of a batch on the device; the model is in evaluation mode."""
        with run.precision.autocast():
            detections = model.detect(batch.images, batch.frames)  # type: ignore[operator]
        options = {"category_ids": run.data.val_images.category_ids, "kernels": run.config.MODEL.KERNELS}
        return [
            coco_results(item, image_id=image_id, size=frame.original, **options)
            for item, frame, image_id in zip(detections, batch.frames, batch.image_ids, strict=True)
        ]

    def draw_predictions(self, run: Run, model: nn.Module, title: str) -> Path:
        """Write predictions.jpg: evenly spaced validation images, ground truth, and predictions."""
        images = run.data.val_images
        indices = np.linspace(0, len(images) - 1, min(NUM_PREVIEWS, len(images))).astype(int)
        pairs = []
        for index in indices:
            batch = self.to_device(collate([run.data.val.dataset[SampleKey(0, int(index))]]), run.process.device)
            (results,) = self.detect(run, model, batch)
            record = images[int(index)]
            pairs.append(
                (
                    images.read_image(record),
                    truth_of(record, images),
                    objects_of_results(results, images.categories),
                )
            )
        path = run.folder / "predictions.jpg"
        save_comparison(pairs, path, title=title)
        return path

    def profile(self, config: CfgNode) -> str:
        table = profile_table(profile_detector(build_detector(config, NUM_CLASSES)), PUBLISHED.get(config.MODEL.NAME))
        size = f"{WIDTH}x{HEIGHT}, {PROPOSALS} proposals and {MASKS} masks"
        return f"{config.MODEL.NAME}, {NUM_CLASSES} classes, {size}\n{table}"

    def image_size(self, config: CfgNode, *, training: bool) -> tuple[int, int]:
        """Return the largest landscape image: short side and long side."""
        if training:
            return max(config.AUG.SHORT_SIDES), config.AUG.LONG_SIDE
        return config.TEST.SHORT_SIDE, config.TEST.LONG_SIDE

    def synthetic_batch(self, config: CfgNode, model: nn.Module, device: torch.device) -> Batch:  # noqa: ARG002
        size = self.image_size(config, training=True)
        images, frames, targets = synthetic_inputs(config.DATA.BATCH_SIZE, size, device)
        return Batch(images, frames, [0] * len(frames), targets)

    def inference_call(
        self,
        config: CfgNode,
        model: nn.Module,
        batch_size: int,
        size: tuple[int, int],
        device: torch.device,
    ) -> Callable[[], object]:
        images, frames, _ = synthetic_inputs(batch_size, size, device)
        detector: Any = model

        def detect() -> None:
            for item in detector.detect(images, frames):
                paste_masks(item.mask_probabilities, item.boxes, *size, kernels=config.MODEL.KERNELS)

        classifier = detector.roi_head.bbox_head.fc_cls
        classifier.register_forward_hook(FixedDetections(batch_size, background=classifier.out_features - 1))
        return detect


def truth_of(record: Record, images: CocoImages) -> LabeledObjects:
    """Return a record's annotated objects, to draw.

    Raises:
        DataError: a segmentation cannot be decoded.
    """
    masks = images.read_masks(record)
    stacked = np.stack(masks).astype(bool) if masks else np.zeros((0, record.height, record.width), dtype=bool)
    return LabeledObjects(record.boxes, stacked, record.labels, [images.classes[label] for label in record.labels])
