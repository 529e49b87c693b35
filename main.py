"""Train, evaluate, time or profile a classifier from a YAML file, on one or many processes.

python main.py --cfg cfgs/digits.yaml --amp
python -m torch.distributed.launch --nproc_per_node=8 main.py --cfg cfgs/mlla_t.yaml --data-path imagenet --output out
torchrun --nproc_per_node=8 main.py --cfg cfgs/mlla_t.yaml --data-path imagenet --output out
python main.py --cfg cfgs/mlla_t.yaml --data-path imagenet --eval --resume mlla_t.pth
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until run_and_end: imports make no garbage, and looking for it takes a sixth of their time

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import SCHEMA, load_config
from data import Data, build_data, build_targets, kernels_in_use
from data.batch_decoding import use_many_queues
from data.transforms import denormalize
from models import PAPER_PROFILES, build_model, input_channels, prepare_for_inference
from models.kernels.dispatch import KernelsUnavailableError
from models.kernels.self_test import expect_self_test, run_self_test
from models.timm_interface import PyramidClassifier
from utils.benchmark.loading import run_loading
from utils.benchmark.measure import synthetic_images
from utils.benchmark.throughput import run_throughput
from utils.checkpoint.stored_config import load_config_of
from utils.config.command_line import parse_command_line, report_user_errors
from utils.config.errors import ConfigError, UserError
from utils.distributed.process import Process
from utils.logs.contact_sheet import save_captioned
from utils.logs.logger import logger, with_bar
from utils.logs.plots import CLASSIFIER_PANELS
from utils.speed.flops import profile, profile_table
from utils.training.build import build_classification_schedule, model_uses, trains
from utils.training.derived import Derived
from utils.training.ema import REACH, ModelEma
from utils.training.launch import run_and_end
from utils.training.losses import ClassificationLoss
from utils.training.lr_schedule import CLASSIFICATION_BATCH_SIZE, ClassificationSchedule
from utils.training.metrics import Scores, evaluate
from utils.training.optimizer import parameter_groups
from utils.training.run import run_task
from utils.training.task import Run, Task

NUM_PREVIEWS = 40  # on a sheet of predictions
NUM_MISTAKES = 24  # on such a sheet, if there are so many, so that right predictions can be seen too
NUM_CANDIDATES = 400  # validation images among which mistakes are looked for
MESA_START = 0.25  # share of the run's epochs, cool-down included


def main(argv: Sequence[str] | None = None) -> int:
    with report_user_errors():
        config = load_config_of(load_config, *parse_command_line(__doc__, argv, schema=SCHEMA))
    measure = run_loading if config.BENCHMARK.LOADING else run_throughput
    if config.DATA.DECODE_ON == "gpu" or config.BENCHMARK.LOADING:
        use_many_queues()
    return run_task(Classification(), config, run_throughput=measure)


def check_batch_size(config: CfgNode, model: nn.Module) -> None:
    """Refuse to train batch norm on one image whose last map is one pixel, which has no variance.

    Raises:
        ConfigError: DATA.BATCH_SIZE is 1, and DATA.IMG_SIZE is not above the stride of the last stage.
    """
    if not trains(config) or config.TRAIN.FREEZE or config.DATA.BATCH_SIZE > 1:
        return
    size, stride = config.DATA.IMG_SIZE, last_stride(model)
    if size <= stride and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        raise ConfigError(
            f"DATA.BATCH_SIZE 1: batch norm cannot train on one image per process with DATA.IMG_SIZE {size}, "
            f"which leaves one pixel in the last stage; set --batch-size 2 or more, or a size above {stride}",
            key="DATA.BATCH_SIZE",
        )


def last_stride(model: Any) -> int:
    """Return the stride of a model's last map in pixels, 0 if it is not known."""
    if isinstance(model, PyramidClassifier):
        return 4 * 2 ** (len(model.layers) - 1)
    info = getattr(model, "feature_info", None)
    stages = getattr(info, "info", info)  # timm has lists, and objects that hold one
    return stages[-1]["reduction"] if stages else 0


class Classification(Task):
    """Image classification with soft targets, EMA and MESA, judged by top-1 accuracy."""

    metric = "acc1"
    metric_label = "top-1"
    best_name = "acc"
    best_label = "accuracy"
    predict_command = "python -m utils.predict"
    panels = CLASSIFIER_PANELS
    lr_batch_size = CLASSIFICATION_BATCH_SIZE
    ema_batch_size = 4096
    has_one_image_size = True
    smaller_images = "lower DATA.IMG_SIZE"
    user_errors = (UserError, KernelsUnavailableError)

    def build_data(self, config: CfgNode, process: Process) -> Data:
        return build_data(config, rank=process.rank, num_processes=process.num_processes, device=process.device)

    def build_model(self, config: CfgNode, process: Process, num_classes: int | None) -> nn.Module:  # noqa: ARG002
        model = build_model(config, config.MODEL.NUM_CLASSES or num_classes)
        check_batch_size(config, model)
        return model

    def check_kernels(self, config: CfgNode, device: torch.device) -> None:
        expect_self_test(config.MODEL.KERNELS, device)

    def test_kernels(
        self,
        config: CfgNode,
        model: nn.Module,
        dtype: torch.dtype,
        meanwhile: Callable[[], object] | None = None,
        others: Sequence[str] = (),
    ) -> None:
        device = next(model.parameters()).device
        if others:  # the model is trained
            others = [*others, *kernels_in_use(config, device)]
        run_self_test(model, dtype, config.DATA.IMG_SIZE, model_uses(config, device), meanwhile, others)

    def prepare_for_inference(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        return prepare_for_inference(model, dtype)

    def parameter_groups(self, config: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
        return parameter_groups(model, config.TRAIN.WEIGHT_DECAY, layer_decay=config.MODEL.LAYER_DECAY)

    def lengths(self, config: CfgNode, num_processes: int, num_train_images: int) -> tuple[int, int]:
        epochs, steps_per_epoch = super().lengths(config, num_processes, num_train_images)
        return epochs + config.TRAIN.COOLDOWN_EPOCHS, steps_per_epoch

    def schedule(self, config: CfgNode, derived: Derived) -> ClassificationSchedule:
        return build_classification_schedule(config, steps_per_epoch=derived.steps_per_epoch, lr_scale=derived.lr_scale)

    def batches(self, run: Run, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader = run.data.train
        loader.set_epoch(epoch, first * run.config.DATA.BATCH_SIZE)
        make_targets = build_targets(run.config, len(run.data.classes))
        return (make_targets(*batch) for batch in loader)

    def expect_epoch(self, run: Run, epoch: int) -> None:
        run.data.expect_epoch(epoch)

    def loading_choices(self, config: CfgNode, device: torch.device) -> list[dict[str, str]]:
        if config.DATA.AUGMENT_ON != "auto" or device.type != "cuda":
            return [{}]
        places = ("cpu", "cpu"), ("gpu", "cpu"), ("gpu", "gpu")
        return [{"DATA.AUGMENT_ON": augment, "DATA.DECODE_ON": decode} for augment, decode in places]

    def losses(self, config: CfgNode, network: nn.Module, ema: ModelEma | None, derived: Derived) -> ClassificationLoss:
        return ClassificationLoss(
            network,
            ema.module if ema else None,
            mesa_ratio=config.AUG.MESA,
            mesa_start_step=mesa_start_epoch(derived) * derived.steps_per_epoch,
            is_ready=lambda: ema is not None and ema.is_teacher,
        )

    def evaluate(self, run: Run, models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
        batches = with_bar(run.data.val, models, is_main=run.process.is_main)
        scores = evaluate(models, batches, run.process, run.precision)
        return {name: self.log_scores(run, name, score) for name, score in scores.items()}

    def log_scores(self, run: Run, name: str, scores: Scores) -> dict[str, float]:
        """Log the scores of a model, and return them as metrics."""
        logger.info("%s on %d images, loss %.4f:", name, scores.num_images, scores.loss)
        num_outputs = run.config.MODEL.NUM_CLASSES or len(run.data.classes)
        acc5 = f" Acc@5 {scores.acc5:.3f}" if num_outputs > 5 else ""  # which is 100 for five classes
        logger.info(" * Acc@1 %.3f%s", scores.acc1, acc5)
        network = "network" if name == "model" else f"{name} network"
        logger.info("Accuracy of the %s on the %d test images: %.3f%%", network, scores.num_images, scores.acc1)
        return {"acc1": scores.acc1, "acc5": scores.acc5, "loss": scores.loss}

    def draw_predictions(self, run: Run, model: nn.Module, title: str) -> Path:
        """Write predictions.png: validation images with their true and predicted classes, mistakes first."""
        path, names = run.folder / "predictions.png", dict(enumerate(run.data.classes))
        previews, counts = choose_previews(run, model)
        captions = [
            f"true {names[preview.label]}\n"
            f"pred. {names.get(preview.prediction, f'output {preview.prediction}')} ({preview.confidence:.0%})"
            for preview in previews
        ]
        save_captioned(
            [preview.image for preview in previews],
            captions,
            path,
            colors=["black" if preview.is_right else "red" for preview in previews],
            title=f"{title}; {counts}",
        )
        return path

    def profile(self, config: CfgNode) -> str:
        size = config.DATA.IMG_SIZE
        with torch.device("meta"):  # without memory, and without the time to initialize weights
            model = build_model(config)
        parts = profile(model, size, input_channels(config))
        paper = PAPER_PROFILES.get(config.MODEL.NAME) if size == 224 else None
        table = profile_table(parts, (paper.parameters_m, paper.gmacs) if paper else None)
        return f"{config.MODEL.NAME}, {size}x{size}\n{table}"

    def memory_request(self, config: CfgNode) -> tuple[str, int]:
        work, batch_size = super().memory_request(config)
        return f"{work} images of {config.DATA.IMG_SIZE}x{config.DATA.IMG_SIZE} per process", batch_size

    def describe(self, config: CfgNode, derived: Derived) -> str:
        if config.AUG.MESA and not config.EMA.ENABLED:
            logger.warning(
                "AUG.MESA %s is off: its teacher is the EMA model, and EMA.ENABLED is False", config.AUG.MESA
            )
        is_on = config.AUG.MESA and config.EMA.ENABLED
        if not is_on:
            return ", MESA off"
        condition = f" on, while the EMA is within {REACH:g} point of the model" if derived.ema_warmup else ""
        return f", MESA {config.AUG.MESA} from epoch {mesa_start_epoch(derived) + 1}{condition}"

    def image_size(self, config: CfgNode, *, training: bool) -> tuple[int, int]:  # noqa: ARG002
        return config.DATA.IMG_SIZE, config.DATA.IMG_SIZE

    def synthetic_batch(self, config: CfgNode, model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
        size, num_images = self.image_size(config, training=True), config.DATA.BATCH_SIZE
        images = synthetic_images(num_images, size, device, in_chans=input_channels(config))
        num_classes: Any = model.num_classes
        return images, torch.randn(num_images, num_classes, device=device).softmax(dim=1)

    def inference_call(
        self, config: CfgNode, model: nn.Module, batch_size: int, size: tuple[int, int], device: torch.device
    ) -> Callable[[], object]:
        images = synthetic_images(batch_size, size, device, in_chans=input_channels(config))
        return lambda: model(images)


class Preview(NamedTuple):
    """A validation image (H, W, 3) uint8, its true and predicted class, and the probability of that."""

    image: np.ndarray
    label: int
    prediction: int
    confidence: float

    @property
    def is_right(self) -> bool:
        return self.label == self.prediction


@torch.no_grad()
def choose_previews(run: Run, model: nn.Module) -> tuple[list[Preview], str]:
    """Return validation images to show, mistakes first and of these the most confident, and a line that counts them."""
    shown: dict[bool, list[Preview]] = {False: [], True: []}  # by Preview.is_right
    counts = {False: 0, True: 0}
    for images, labels in run.data.previews(NUM_CANDIDATES, batch_size=NUM_PREVIEWS):
        with run.precision.autocast():
            probabilities = model(images.to(run.process.device)).float().softmax(dim=1).cpu()  # (N, classes)
        confidences, predictions = probabilities.max(dim=1)
        pixels = (255 * denormalize(images).permute(0, 2, 3, 1)).round().byte().numpy()  # (N, H, W, 3)
        parts = pixels, labels, predictions.tolist(), confidences.tolist()
        for preview in itertools.starmap(Preview, zip(*parts, strict=True)):
            shown[preview.is_right].append(preview)
            counts[preview.is_right] += 1
        shown[False].sort(key=lambda preview: -preview.confidence)
        shown = {is_right: previews[:NUM_PREVIEWS] for is_right, previews in shown.items()}
    num_mistakes = max(NUM_MISTAKES, NUM_PREVIEWS - counts[True])
    order = " (first, the most confident leading)" if counts[False] else ""
    line = f"{counts[False]} of {sum(counts.values())} images are wrong{order}"
    return (shown[False][:num_mistakes] + shown[True])[:NUM_PREVIEWS], line


def mesa_start_epoch(derived: Derived) -> int:
    """Return the first epoch, from 0, that trains with MESA's teacher."""
    return int(MESA_START * derived.total_epochs)


command = partial(run_and_end, main)  # the program as a process of its own, which it ends


if __name__ == "__main__":
    command()
