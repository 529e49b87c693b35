"""Training steps whose gradients are exchanged, started by test_gradient_exchange.py.

torchrun --nproc_per_node=P tests/utils/distributed/exchange_worker.py OUT.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from torch import Tensor, nn

from utils.config.errors import UserError
from utils.distributed import gradient_exchange
from utils.distributed.gradient_exchange import GradientExchange
from utils.distributed.process import Process, gather_objects, start_process, stop_process
from utils.training.amp import make_precision
from utils.training.ema import ModelEma
from utils.training.optimizer import make_optimizer, parameter_groups
from utils.training.train_step import TrainStep

STEPS, IMAGES_PER_STEP = 4, 12
CASES = ("plain", "accumulation", "unused", "frozen", "sgd", "after_backward")


class Network(nn.Module):
    """Convolutions and linear layers; one branch runs for images of every second step, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.hidden = nn.Linear(8, 20)
        self.seldom = nn.Linear(8, 20)
        self.never = nn.Linear(8, 20)
        self.head = nn.Linear(20, 5, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).relu().mean(dim=(2, 3))
        hidden = self.hidden(x).tanh()
        if images[0, 0, 0, 0] > 0:
            hidden = hidden + self.seldom(x)
        return self.head(hidden)


def step_images(step: int) -> tuple[Tensor, Tensor]:
    """Return the images and targets of a step; the first pixel decides about a branch, on each process differently."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(IMAGES_PER_STEP, 3, 6, 6, generator=generator, dtype=torch.float64)
    images[:, 0, 0, 0] = -1 if step % 2 else 1
    return images, torch.randn(IMAGES_PER_STEP, 5, generator=generator, dtype=torch.float64).softmax(dim=1)


def train(process: Process, case: str) -> dict[str, Tensor]:
    """Return weights, EMA and whether there is a moment of the branch that never runs."""
    torch.manual_seed(process.rank if case == "plain" else 0)  # the exchange begins with the first process's weights
    model = Network().double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if case == "frozen":
        model.conv.requires_grad_(False)
    if case != "unused":
        model.never.requires_grad_(False)
        model.seldom.requires_grad_(False)
    exchange = None
    if process.num_processes > 1:
        exchange = GradientExchange(model, find_unused=case == "unused", overlaps=case != "after_backward")
        assert (len(exchange.slices) == 1) == (case == "after_backward")
    ema = ModelEma(model, 0.9)
    groups = parameter_groups(model, 0.1, layer_decay=1.0)
    optimizer = make_optimizer("sgd" if case == "sgd" else "adamw", groups)
    step = TrainStep(
        model,
        optimizer,
        make_precision(process.device, amp=False, dtype="auto"),
        compute_losses=lambda batch, _: {"loss": nn.functional.cross_entropy(model(batch[0]), batch[1])},
        clip_grad=0.3,
        ema=ema,
        exchange=exchange,
    )
    parts = 2 if case == "accumulation" else 1
    for number in range(STEPS):
        images, targets = (t.chunk(process.num_processes)[process.rank].chunk(parts) for t in step_images(number))
        step(list(zip(images, targets, strict=True)), step=number, learning_rate=0.05)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state |= {f"ema.{name}": value for name, value in ema.module.state_dict().items()}
    return state | {"num_moments": torch.tensor(len(optimizer.state))}


def refused(process: Process) -> str:
    """Return the error for a parameter without gradient where none is allowed."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    exchange = GradientExchange(model)
    exchange.start()
    model[0](torch.ones(1, 2) * (process.rank + 1)).sum().backward()
    try:
        exchange.finish()
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    gradient_exchange.LAST_SLICE_BYTES, gradient_exchange.SLICE_BYTES = 200, 1000  # several slices of a small model
    this_process = start_process()
    results = {case: train(this_process, case) for case in CASES}
    everywhere = gather_objects(results)
    message = refused(this_process)
    if this_process.is_main:
        torch.save({"processes": everywhere, "refused": message}, sys.argv[1])
    stop_process(this_process)
