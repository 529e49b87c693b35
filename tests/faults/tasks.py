"""Commands that train a small model of each task for a few seconds on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SMALL_BACKBONE = ("MODEL.MLLA.EMBED_DIM", "8", "MODEL.MLLA.NUM_HEADS", "[1, 1, 1, 1]", "MODEL.MLLA.DEPTHS", "[1,1,1,1]")
SMALL = (*SMALL_BACKBONE, "MODEL.DROP_RATE", "0.1")  # for a CPU
# Every source of randomness is on, and a worker process loads images.
SETTINGS = [
    *("MODEL.DROP_PATH_RATE", "0.2", "AUG.MIXUP", "0.5", "AUG.REPROB", "0.25", "AUG.MESA", "1.0"),
    *("TRAIN.WARMUP_EPOCHS", "1", "TRAIN.BASE_LR", "0.01", "PRINT_FREQ", "5", "DATA.NUM_WORKERS", "1"),
]
DETECTION = [
    *("MODEL.DROP_PATH_RATE", "0.1", "MODEL.DETECTOR.WIDTH", "8", "MODEL.DETECTOR.HIDDEN", "16"),
    *("MODEL.DETECTOR.ROI_SAMPLES", "16", "MODEL.DETECTOR.MAX_PROPOSALS", "50", "TRAIN.WARMUP_STEPS", "2"),
    *("AUG.SHORT_SIDES", "[32,64]", "AUG.LONG_SIDE", "80", "TEST.SHORT_SIDE", "64", "TEST.LONG_SIDE", "80"),
    *("TRAIN.DECAY_EPOCHS", "[1]", "EMA.ENABLED", "True", "PRINT_FREQ", "1", *SMALL_BACKBONE),
]
SEGMENTATION = [
    *("MODEL.DROP_PATH_RATE", "0.1", "MODEL.HEAD.CHANNELS", "8", "MODEL.HEAD.AUXILIARY_CHANNELS", "4"),
    *("DATA.SCALE", "[64,64]", "AUG.CROP_SIZE", "64", "TRAIN.WARMUP_STEPS", "2", "PRINT_FREQ", "1", *SMALL_BACKBONE),
]
SEGMENTATION_STEPS = 6  # between evaluations


@dataclass(frozen=True)
class Command:
    """Command of a task.

    Attributes:
        program: arguments of Python, without those that all tasks share.
        name: MODEL.NAME of its configuration.
        batch_size: global batch size.
        settings: from the number of epochs, and the compile mode on a GPU or an empty text, keys and values for --opts.
        make_data: writes the dataset into a folder that it makes; None: the task needs no files.
    """

    program: tuple[str, ...]
    name: str
    batch_size: int
    settings: Callable[[int, str], list[str]]
    make_data: Callable[[Path], object] | None = None


def on_gpu(mode: str) -> tuple[str, ...]:
    return "TRAIN.DETERMINISTIC", "True", "TRAIN.COMPILE", mode


def classification_settings(epochs: int, gpu: str) -> list[str]:
    return [*SETTINGS, *(on_gpu(gpu) if gpu else SMALL), "TRAIN.EPOCHS", str(epochs)]


def detection_settings(epochs: int, gpu: str) -> list[str]:
    return [*DETECTION, *(on_gpu("auto") if gpu else ()), "TRAIN.EPOCHS", str(epochs)]


def segmentation_settings(epochs: int, gpu: str) -> list[str]:
    steps = ("TRAIN.STEPS", str(epochs * SEGMENTATION_STEPS), "TRAIN.EVAL_STEPS", str(SEGMENTATION_STEPS))
    return [*SEGMENTATION, *(on_gpu("auto") if gpu else ()), *steps]


def detection_shapes(folder: Path) -> None:
    from downstream.detection.make_shapes import make_shapes

    make_shapes(folder, {"train": 24, "val": 6}, seed=1)


def segmentation_shapes(folder: Path) -> None:
    from downstream.segmentation.make_shapes import main

    main([str(folder), "--train", "24", "--val", "6", "--size", "48"])


TASKS = {
    "classification": Command(("main.py", "--cfg", "cfgs/digits.yaml"), "mlla_digits", 64, classification_settings),
    "detection": Command(
        ("-m", "downstream.detection.main", "--cfg", "downstream/detection/cfgs/shapes.yaml"),
        "mask_rcnn_shapes",
        4,
        detection_settings,
        detection_shapes,
    ),
    "segmentation": Command(
        ("-m", "downstream.segmentation.main", "--cfg", "downstream/segmentation/cfgs/shapes.yaml"),
        "shapes_upernet",
        4,
        segmentation_settings,
        segmentation_shapes,
    ),
}
