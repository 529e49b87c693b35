"""Segmentation on several processes, started by torchrun from test_segmentation_distributed.py.

torchrun --nproc_per_node=P tests/downstream/segmentation/segmentation_worker.py OUT.pt DATA_FOLDER BATCH_SIZE
"""

import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from torch import nn
from yacs.config import CfgNode

from downstream.segmentation.config import load_config
from downstream.segmentation.make_shapes import main as make_shapes
from downstream.segmentation.task import Segmentation, evaluate
from utils.distributed.process import Process, gather_objects, start_process, stop_process
from utils.training.run import open_run
from utils.training.training_run import Training

STEPS = 3
CONFIG = "downstream/segmentation/cfgs/shapes.yaml"
SMALL = {
    "DATA.SCALE": [64, 64],
    "DATA.NUM_WORKERS": 0,
    "MODEL.MLLA.EMBED_DIM": 8,
    "MODEL.MLLA.DEPTHS": [1, 1, 1, 1],
    "MODEL.MLLA.NUM_HEADS": [1, 1, 1, 1],
    "MODEL.HEAD.CHANNELS": 8,
    "MODEL.HEAD.AUXILIARY_CHANNELS": 4,
    "AUG.CROP_SIZE": 64,
    "TRAIN.WARMUP_STEPS": 2,
}


def make_data(folder: Path, *, val: int) -> Path:
    """A small set of shapes."""
    make_shapes([str(folder), "--train", "10", "--val", str(val), "--size", "48"])
    return folder


def small_config(data: Path, output: Path, **values: object) -> CfgNode:
    return load_config(CONFIG, flags={**SMALL, "DATA.DATA_PATH": str(data), "OUTPUT": str(output), **values})


def run(process: Process, data: Path, output: Path, batch_size: int) -> dict[str, object]:
    """Gradient norms and weights of a few steps, and the scores of the fresh model on the uneven validation set."""
    # SGD, since Adam divides by gradients near 0, and rounding would decide.
    flags = {"TRAIN.OPTIMIZER.NAME": "sgd", "TRAIN.BASE_LR": 0.5, "MODEL.HEAD.DROPOUT": 0.0}
    config = small_config(data, output, **{**flags, "DATA.BATCH_SIZE": batch_size})
    task = Segmentation()
    this_run = open_run(task, config, process, output)
    training = Training(task, this_run)
    model = this_run.model
    scores = evaluate(this_run, {"model": model.eval()}, {})["model"]
    model.train()
    for module in model.backbone.modules():  # type: ignore[union-attr]
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # of a process's own images by design
    step = training.build_step()
    norms = []
    for i, batch in enumerate(islice(task.batches(this_run, 0, 0), STEPS)):
        norms.append(step([batch], step=i, learning_rate=training.schedule.lr_at(i + 2)).grad_norm.item())
    digest = sum(float(value.double().abs().sum()) for value in model.state_dict().values())
    return {
        "norms": norms,
        "weights": model.state_dict(),
        "digests": gather_objects(digest),
        "scores": scores._asdict(),
    }


if __name__ == "__main__":
    this_process = start_process()
    results = run(this_process, Path(sys.argv[2]), Path(sys.argv[1]).parent, int(sys.argv[3]))
    if this_process.is_main:
        torch.save(results, sys.argv[1])
    stop_process(this_process)
