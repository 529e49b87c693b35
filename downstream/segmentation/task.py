"""Semantic segmentation as a task: data, model, losses, IoU metrics and images of predictions."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

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
from downstream.segmentation.pictures import save_comparison, save_prediction
from downstream.task import DenseTask, FixedShapeLosses
from utils.benchmark.measure import synthetic_images
from utils.config.errors import ConfigError
from utils.distributed.process import Process, gather_objects
from utils.logs.logger import logger, with_bar
from utils.logs.output_dir import output_errors, unused_name
from utils.logs.plots import STEP_PANELS, Panel
from utils.logs.recorder import append_records
from utils.speed.flops import profile, profile_table
from utils.training.derived import Derived
from utils.training.lr_schedule import DenseSchedule
from utils.training.task import Run

NUM_PREVIEWS = 8
NUM_CLASSES = 150  # ADE20K's
PROFILE_SIZE = (512, 2048)  # height and width of the images that published MACs are counted for
PUBLISHED = {"mlla_b_upernet": (128, 1183)}  # millions of parameters, GMACs


class Segmentation(DenseTask):
    """Semantic segmentation with UperNet, judged by mean IoU."""

    metric = "miou"
    metric_label = "mIoU"
    best_name = "miou"
    predict_command = "python -m downstream.segmentation.predict"
    panels = (
        Panel("training loss", {"train_loss": "both heads", "train_decode": "head", "train_auxiliary": "auxiliary"}),
        Panel("validation mean IoU, %", {"miou": "model", "ema_miou": "EMA"}, is_score=True),
        Panel("validation accuracy, %", {"pixel_accuracy": "pixels", "mean_accuracy": "class mean"}, is_score=True),
        *STEP_PANELS,
    )
    has_one_image_size = True  # crops have one size
    losses_class = FixedShapeLosses

    def build_data(self, config: CfgNode, process: Process) -> SegmentationData:
        shared = process.num_processes if config.MODEL.HEAD.SYNC_NORM else 1
        if config.DATA.BATCH_SIZE * shared < 2 and not config.EVAL_MODE:
            raise ConfigError(
                "DATA.BATCH_SIZE 1: the heads' batch norm needs two images to train on; set it to 2 or more, or train "
                "on several processes with MODEL.HEAD.SYNC_NORM True",
                key="DATA.BATCH_SIZE",
            )
        return build_data(config, process)

    def build_model(self, config: CfgNode, process: Process, num_classes: int | None) -> nn.Module:
        return build_model(config, num_classes or config.MODEL.NUM_CLASSES or NUM_CLASSES, process)

    def lengths(self, config: CfgNode, num_processes: int, num_train_images: int) -> tuple[int, int]:  # noqa: ARG002
        return config.TRAIN.STEPS // config.TRAIN.EVAL_STEPS, config.TRAIN.EVAL_STEPS

    def schedule(self, config: CfgNode, derived: Derived) -> DenseSchedule:
        train = config.TRAIN
        base_lr = train.BASE_LR * derived.lr_scale
        return DenseSchedule("linear", base_lr, derived.total_steps, train.WARMUP_STEPS, train.WARMUP_FACTOR)

    def to_device(self, batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        images, labels = batch
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        return images, labels.to(device, non_blocking=True)

    def batch_losses(
        self, config: CfgNode, network: Callable[..., Any], batch: tuple[Tensor, Tensor]
    ) -> Mapping[str, Tensor]:
        images, labels = batch
        weight, average = config.TRAIN.AUXILIARY_WEIGHT, config.TRAIN.LOSS_AVERAGE
        loss = segmentation_loss(network(images), labels, auxiliary_weight=weight, average=average)
        if config.MODEL.HEAD.AUXILIARY_CHANNELS:
            return {"decode": loss.decode, "auxiliary": loss.auxiliary}
        return {"decode": loss.decode}

    def evaluate(self, run: Run, models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
        saves = run.config.TEST.SAVE_PREDICTIONS and run.config.EVAL_MODE
        folders = {name: prediction_folder(run, name) for name in models} if saves else {}
        return {name: self.record(run, name, scores) for name, scores in evaluate(run, models, folders).items()}

    def record(self, run: Run, name: str, scores: SegmentationScores) -> dict[str, float]:
        """Log a model's scores, add them to evaluations.jsonl in `--eval`, and return them as metrics."""
        log_scores(scores, run, name)
        if run.config.EVAL_MODE and run.process.is_main:
            with output_errors(run.folder):
                append_records(run.folder / "evaluations.jsonl", [evaluation_record(scores, run, name)])
        return {
            "miou": scores.mean_iou,
            "mean_accuracy": scores.mean_accuracy,
            "pixel_accuracy": scores.pixel_accuracy,
        }

    def draw_predictions(self, run: Run, model: nn.Module, title: str) -> Path:
        """Write predictions.png: evenly spaced validation images, ground truth, and predictions."""
        images = run.data.val_images
        chosen = np.linspace(0, len(images) - 1, min(NUM_PREVIEWS, len(images))).astype(int)
        transform = EvalTransform(tuple(run.config.DATA.SCALE))
        rows = []
        model.eval()
        for index in chosen:
            image, truth = images.read(int(index))
            inputs = [x.to(run.process.device) for x in transform(image)]
            classes = Inference().predict(model, inputs, truth.shape, run.precision)
            rows.append((image, truth, classes.cpu().numpy()))
        path = run.folder / "predictions.png"
        save_comparison(rows, path, classes=run.data.classes, title=title)
        return path

    def profile(self, config: CfgNode) -> str:
        """Return parameters with both heads, and MACs of inference, in which the auxiliary head has no part."""
        with torch.device("meta"):
            model = build_model(config, config.MODEL.NUM_CLASSES or NUM_CLASSES)
        table = profile_table(profile(model, PROFILE_SIZE), PUBLISHED.get(config.MODEL.NAME))
        return f"{config.MODEL.NAME}, {PROFILE_SIZE[0]}x{PROFILE_SIZE[1]}\n{table}"

    def image_size(self, config: CfgNode, *, training: bool) -> tuple[int, int]:
        if training:
            return config.AUG.CROP_SIZE, config.AUG.CROP_SIZE
        long, short = config.DATA.SCALE
        return short, long

    def synthetic_batch(self, config: CfgNode, model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        size, num_images = self.image_size(config, training=True), config.DATA.BATCH_SIZE
        num_classes = config.MODEL.NUM_CLASSES or NUM_CLASSES
        labels = torch.randint(num_classes, (num_images, *size), device=device)
        return synthetic_images(num_images, size, device), labels

    def inference_call(
        self,
        config: CfgNode,  # noqa: ARG002
        model: nn.Module,
        batch_size: int,
        size: tuple[int, int],
        device: torch.device,
    ) -> Callable[[], object]:
        images = synthetic_images(batch_size, size, device)
        return lambda: model(images).argmax(dim=1)


def evaluate(run: Run, models: Mapping[str, nn.Module], folders: Mapping[str, Path]) -> dict[str, SegmentationScores]:
    """Return the scores of models over the validation set, exact for any number of processes.

    Args:
        run: the run; all its processes call together.
        models: segmentors in evaluation mode, by name.
        folders: where the predictions of a model are written, if there is one of its name.
    """
    inference, device = build_inference(run.config), run.process.device
    matrices = {name: ConfusionMatrix(len(run.data.classes), device) for name in models}
    was_benchmarking = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # it would time all algorithms for each image size
    for sample in with_bar(run.data.val, models, is_main=run.process.is_main):
        inputs = [x.to(device, non_blocking=True) for x in sample.inputs]
        labels = sample.labels.to(device, non_blocking=True)
        for name, matrix in matrices.items():
            predicted = inference.predict(models[name], inputs, labels.shape, run.precision)
            matrix.update(predicted, labels)
            if name in folders:
                image, _ = run.data.val_images.read(sample.position)
                save_prediction(
                    folders[name] / run.data.val_images.names[sample.position],
                    image,
                    predicted.cpu().numpy(),
                    num_classes=len(run.data.classes),
                    first_label=int(reduces_zero_label(run.config)),
                )
    torch.backends.cudnn.benchmark = was_benchmarking
    return {name: matrix.compute() for name, matrix in matrices.items()}


def prediction_folder(run: Run, name: str) -> Path:
    """Create a new folder for predictions, the same for all processes, and return it."""
    folder = gather_objects(unused_name(run.folder, f"predictions_{name}_{{}}"))[0]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def log_scores(scores: SegmentationScores, run: Run, name: str) -> None:
    logger.info("%s on %d images:\n%s", name, run.data.num_val_images, scores_table(scores, run.data.classes))
    logger.info(
        " * %s mIoU %.2f  mean accuracy %.2f  pixel accuracy %.2f",
        *(name, scores.mean_iou, scores.mean_accuracy, scores.pixel_accuracy),
    )
    accuracies = zip(run.data.classes, scores.class_accuracy, strict=True)
    if absent := [name for name, accuracy in accuracies if math.isnan(accuracy)]:
        logger.info(
            " * %d of %d classes have no labeled pixel in these images: %s",
            *(len(absent), len(run.data.classes), ", ".join(absent[:5])),
        )


def evaluation_record(scores: SegmentationScores, run: Run, name: str) -> dict[str, Any]:
    """Return a line of evaluations.jsonl; the IoU of a class without labels and predictions is null."""
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
