"""Training step and evaluation on several processes, started by test_process.py.

torchrun --nproc_per_node=P tests/utils/distributed/distributed_worker.py OUT.pt BATCH_SIZE ACCUMULATION_STEPS
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import numpy as np
import torch
from PIL import Image
from torch import nn

from config import load_config
from data.build import eval_loader, train_loader
from main import Classification
from models import MLLA
from utils.distributed.process import Process, gather_objects, start_process, stop_process
from utils.training.build import build_ema, build_optimizer, build_precision, build_train_step
from utils.training.metrics import evaluate

STEPS = 3
NUM_IMAGES = 101
MICRO = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 4), "drop_path_rate": 0.0, "num_classes": 10}


class Noise:
    """Random images with random labels."""

    def __init__(self) -> None:
        self.classes = list("0123456789")
        self.labels = np.random.default_rng(0).integers(10, size=NUM_IMAGES)

    def __len__(self) -> int:
        return NUM_IMAGES

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, size=(32, 32, 3), dtype=np.uint8))


def make_model() -> MLLA:
    """Return a model with batch norm in evaluation mode, since its statistics differ between processes by design."""
    torch.manual_seed(0)
    model = MLLA(img_size=32, **MICRO).train()  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def run(process: Process, batch_size: int, accumulation_steps: int) -> dict[str, object]:
    """Return the weights and EMA weights after a few steps, and the new model's scores on a dataset of odd size."""
    opts = {"DATA.BATCH_SIZE": batch_size, "TRAIN.ACCUMULATION_STEPS": accumulation_steps, "TRAIN.BASE_LR": 0.02}
    opts |= {"TRAIN.WARMUP_EPOCHS": 0, "TRAIN.EPOCHS": 1, "AUG.MESA": 0}
    config = load_config("cfgs/digits.yaml", flags=opts)
    task = Classification()
    derived = task.derive(config, num_processes=process.num_processes, num_train_images=NUM_IMAGES)
    precision = build_precision(config, process.device)
    model = make_model().to(process.device)
    loader = eval_loader(config, Noise(), process.rank, process.num_processes, process.device)
    scores = evaluate({"model": model.eval()}, loader, process, precision)["model"]
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    ema = build_ema(config, model, derived)
    optimizer = build_optimizer(config, task.parameter_groups(config, model))
    train_step = build_train_step(task, config, model, process, optimizer, ema, precision, derived)
    schedule = task.schedule(config, derived)
    batches = iter(train_loader(config, Noise(), process.rank, process.num_processes, process.device))
    grad_norms = []
    for step in range(STEPS):
        micro_batches = [
            (images, nn.functional.one_hot(labels, 10).float())
            for images, labels in (next(batches) for _ in range(accumulation_steps))
        ]
        result = train_step(micro_batches, step=step, learning_rate=schedule.lr_at(step))
        grad_norms.append(result.grad_norm.item())
    assert ema is not None
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ema_weights = {name: value.clone() for name, value in ema.module.state_dict().items()}
    model.train()  # one more step, in which each process's batch norm sees its own images
    train_step(micro_batches, step=STEPS, learning_rate=0.01)
    digests = [sum(float(v.double().abs().sum()) for v in m.state_dict().values()) for m in (model, ema.module)]
    images, targets = micro_batches[0]
    images[0, 0, 0, 0] = float("nan") if process.rank == process.num_processes - 1 else 0.0
    train_step([(images, targets)], step=STEPS + 1, learning_rate=0.01)
    return {
        "bad_steps": gather_objects(train_step.check_finite(STEPS + 1)),
        "weights": weights,
        "ema": ema_weights,
        "digests": gather_objects(digests),
        "grad_norms": grad_norms,
        "derived": (derived.global_batch_size, schedule.base_lr, derived.steps_per_epoch, derived.ema_decay),
        "scores": tuple(scores),
    }


if __name__ == "__main__":
    this_process = start_process()
    results = run(this_process, int(sys.argv[2]), int(sys.argv[3]))
    if this_process.is_main:
        torch.save(results, sys.argv[1])
    stop_process(this_process)
