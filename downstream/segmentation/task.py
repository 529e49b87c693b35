"""Segmentation as a task of the shared run: its data, losses, scores and pictures."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from downstream.run import Run, Task
from downstream.segmentation.build import (
    SegmentationData,
    build_data,
    build_inference,
    build_model,
    reduces_zero_label,
)
from downstream.segmentation.data.transforms import EvalTransform
from downstream.segmentation.metrics import ConfusionMatrix, SegmentationScores, scores_table
from downstream.segmentation.model.inference import Inference
from downstream.segmentation.model.losses import segmentation_loss
from downstream.segmentation.pictures import plot_segmentations, save_prediction
from utils.config.errors import ConfigError
from utils.distributed.process import Process, gather_objects
from utils.logs.logger import logger
from utils.logs.output_dir import unused_name
from utils.logs.plots import STEP_PANELS, Panel
from utils.logs.recorder import append_records
from utils.training.recipe import WarmupSchedule

NUM_PREVIEWS = 8


class Segmentation(Task):
    """UperNet, judged by mean IoU."""

    metric = "miou"
    best_name = "miou"
    panels = (
        Panel("training loss", {"train_loss": "both heads", "train_decode": "head", "train_auxiliary": "auxiliary"}),
        Panel("validation mean IoU, %", {"miou": "model", "ema_miou": "EMA"}),
        Panel("validation accuracy, %", {"pixel_accuracy": "of pixels", "mean_accuracy": "mean of classes"}),
        *STEP_PANELS,
    )

    def __init__(self, config: Any, process: Process) -> None:
        self.config = config
        self.process = process

    def open_data(self, config: Any, process: Process) -> SegmentationData:
        shared = process.num_processes if config.MODEL.HEAD.SYNC_NORM else 1
        if config.DATA.BATCH_SIZE * shared < 2 and not config.EVAL_MODE:
            raise ConfigError(
                "DATA.BATCH_SIZE 1: the heads' batch norm needs two images to train on; set it to 2 or more, or train "
                "on several processes with MODEL.HEAD.SYNC_NORM True"
            )
        return build_data(config, process)

    def build_model(self, config: Any, num_classes: int) -> nn.Module:
        return build_model(config, num_classes, self.process)

    def lengths(self, config: Any, num_train_images: int, images_per_step: int) -> tuple[int, int]:  # noqa: ARG002
        return config.TRAIN.STEPS // config.TRAIN.EVAL_STEPS, config.TRAIN.EVAL_STEPS

    def schedule(self, config: Any, base_lr: float, epochs: int, steps_per_epoch: int) -> WarmupSchedule:
        train = config.TRAIN
        return WarmupSchedule("linear", base_lr, epochs * steps_per_epoch, train.WARMUP_STEPS, train.WARMUP_FACTOR)

    def to_device(self, batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        images, labels = batch
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        return images, labels.to(device, non_blocking=True)

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        images, labels = batch
        train = self.config.TRAIN
        loss = segmentation_loss(
            model(images), labels, auxiliary_weight=train.AUXILIARY_WEIGHT, average=train.LOSS_AVERAGE
        )
        if self.config.MODEL.HEAD.AUXILIARY_CHANNELS:
            return {"decode": loss.decode, "auxiliary": loss.auxiliary}
        return {"decode": loss.decode}

    def evaluate(self, run: Run, model: nn.Module, name: str) -> dict[str, float]:
        saves = run.config.TEST.SAVE_PREDICTIONS and run.config.EVAL_MODE
        folder = prediction_folder(run, name) if saves else None
        scores = evaluate(run, model, folder)
        log_scores(scores, run, name)
        if run.config.EVAL_MODE and run.process.is_main:
            append_records(run.folder / "evaluations.jsonl", [evaluation_record(scores, run, name)])
        return {
            "miou": scores.mean_iou,
            "mean_accuracy": scores.mean_accuracy,
            "pixel_accuracy": scores.pixel_accuracy,
        }

    def illustrate(self, run: Run, model: nn.Module) -> Path:
        """predictions.png: evenly spaced validation images, the truth, and what the model predicts."""
        images = run.data.val_images
        chosen = np.linspace(0, len(images) - 1, min(NUM_PREVIEWS, len(images))).astype(int)
        transform = EvalTransform(tuple(run.config.DATA.SCALE))
        shown: tuple[list[np.ndarray], ...] = ([], [], [])
        model.eval()
        for index in chosen:
            image, truth = images.read(int(index))
            inputs = [x.to(run.process.device) for x in transform(image)]
            classes = Inference().predict(model, inputs, truth.shape, run.precision)
            for kept, item in zip(shown, (image, truth, classes.cpu().numpy()), strict=True):
                kept.append(item)
        picture = run.folder / "predictions.png"
        plot_segmentations(*shown, classes=run.data.classes, picture=picture)
        return picture


def evaluate(run: Run, model: nn.Module, folder: Path | None = None) -> SegmentationScores:
    """Scores of a model over the validation set, exact for any number of processes; called by all together.

    Args:
        folder: where predictions are written, None for nowhere.
    """
    inference, device = build_inference(run.config), run.process.device
    matrix = ConfusionMatrix(len(run.data.classes), device)
    was_training, was_tuning = model.training, torch.backends.cudnn.benchmark
    model.eval()
    torch.backends.cudnn.benchmark = False  # it would try all algorithms for each size of image anew
    for sample in run.data.val:
        inputs = [x.to(device, non_blocking=True) for x in sample.inputs]
        labels = sample.labels.to(device, non_blocking=True)
        predicted = inference.predict(model, inputs, labels.shape, run.precision)
        matrix.update(predicted, labels)
        if folder is not None:
            image, _ = run.data.val_images.read(sample.position)
            save_prediction(
                folder / run.data.val_images.names[sample.position],
                image,
                predicted.cpu().numpy(),
                num_classes=len(run.data.classes),
                first_label=int(reduces_zero_label(run.config)),
            )
    torch.backends.cudnn.benchmark = was_tuning
    model.train(was_training)
    return matrix.compute()


def prediction_folder(run: Run, name: str) -> Path:
    """A folder for predictions that was not there before, the same for all processes."""
    folder = gather_objects(unused_name(run.folder, f"predictions_{name}_{{}}"))[0]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def log_scores(scores: SegmentationScores, run: Run, name: str) -> None:
    logger.info("%s on %d images:\n%s", name, run.data.num_val_images, scores_table(scores, run.data.classes))
    logger.info(
        " * %s mIoU %.2f  mean accuracy %.2f  pixel accuracy %.2f",
        *(name, scores.mean_iou, scores.mean_accuracy, scores.pixel_accuracy),
    )


def evaluation_record(scores: SegmentationScores, run: Run, name: str) -> dict[str, Any]:
    """A line of evaluations.jsonl; null stands for the IoU of a class that neither labels nor predictions have."""
    test = run.config.TEST
    return {
        "weights": run.config.MODEL.RESUME,
        "kind": name,
        "multi_scale": test.MULTI_SCALE,
        "slide": test.SLIDE,
        "images": run.data.num_val_images,
        "miou": scores.mean_iou,
        "mean_accuracy": scores.mean_accuracy,
        "pixel_accuracy": scores.pixel_accuracy,
        "class_iou": {
            name: None if math.isnan(iou) else iou for name, iou in zip(run.data.classes, scores.class_iou, strict=True)
        },
    }
