"""Work of the processes that exactness.py and measurements.py start with torchrun.

worker.py steps OUT.json --batch-size GLOBAL --weights OUT.pt [--dtype float64]
worker.py evaluation OUT.json --data FOLDER
worker.py exchange OUT.json [--cfg cfgs/mlla_t.yaml]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import load_config
from main import Classification
from utils.benchmark.measure import median_seconds
from utils.distributed.gradient_exchange import GradientExchange, all_reduce_speed, should_overlap
from utils.distributed.process import Process, start_process, stop_process
from utils.speed.compile import Capture
from utils.training.build import build_ema, build_inference_model, build_optimizer, build_precision, build_train_step
from utils.training.determinism import use_deterministic_algorithms
from utils.training.metrics import evaluate
from utils.training.run import prepare_model

STEPS = 20
LEARNING_RATE = 1e-3
# AdamW's default follows gradients that are rounding alone: in float32 weights then differ by 4e-3 between one thread
# and two, in float64 by 1e-14 between one process and two.
EPS = {"float32": "1e-4", "float64": "1e-8"}
NUM_CLASSES = 10
TASK = Classification()


def batch_of(step: int, batch_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a global batch of images (B, 3, 32, 32) and targets (B, classes), the same for any number of processes."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(batch_size, 3, 32, 32, generator=generator).to(dtype)
    return images, torch.randn(batch_size, NUM_CLASSES, generator=generator).to(dtype).softmax(dim=1)


def steps(process: Process, args: argparse.Namespace) -> dict[str, Any]:
    """Train the small model of cfgs/digits.yaml, and save its weights.

    Batch norms use their running statistics: those of a process's share of a batch are not those of the whole batch.
    """
    torch.backends.cudnn.allow_tf32 = False
    dtype = getattr(torch, args.dtype)
    opts = [
        "TRAIN.OPTIMIZER.EPS",
        EPS[args.dtype],
        "MODEL.DROP_PATH_RATE",
        "0",
        "AUG.MESA",
        "0",
        "TRAIN.COMPILE",
        "graphs" if is_gpu(process) else "off",
    ]
    opts += ["DATA.BATCH_SIZE", str(args.batch_size // process.num_processes), "MODEL.NUM_CLASSES", str(NUM_CLASSES)]
    config = load_config("cfgs/digits.yaml", [*opts, "TRAIN.DETERMINISTIC", "True"])
    model = prepare_model(TASK, config, process, NUM_CLASSES).to(dtype)
    derived = TASK.derive(config, num_processes=process.num_processes, num_train_images=STEPS * args.batch_size)
    parts = build_ema(config, model, derived), build_precision(config, process.device), derived
    optimizer = build_optimizer(config, TASK.parameter_groups(config, model))
    step = build_train_step(TASK, config, model, process, optimizer, *parts)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for number in range(STEPS):
        own = [t.chunk(process.num_processes)[process.rank] for t in batch_of(number, args.batch_size, dtype)]
        images, targets = (t.to(process.device) for t in own)
        batch = images.contiguous(memory_format=torch.channels_last), targets
        result = step([batch], step=number, learning_rate=LEARNING_RATE)
    if step.check_finite(STEPS - 1) is not None:
        raise RuntimeError("the loss or gradient is not finite")
    if process.is_main:
        torch.save({name: value.cpu() for name, value in model.state_dict().items()}, args.weights)
    return {"loss": result.loss.item(), "has_graph": getattr(step, "capture", None) is not None}


def evaluation(process: Process, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate an untrained model on a folder's images with the loader and the graphs of `--eval`."""
    opts = ["DATA.DATASET", "idx", "DATA.DATA_PATH", args.data, "MODEL.NUM_CLASSES", str(NUM_CLASSES)]
    config = load_config("cfgs/digits.yaml", opts, {"EVAL_MODE": True, "DATA.BATCH_SIZE": 128})
    data = TASK.build_data(config, process)
    model = prepare_model(TASK, config, process, NUM_CLASSES)
    prepared = build_inference_model(TASK, config, process.device).together({"model": model})
    scores = evaluate(prepared, data.val, process, build_precision(config, process.device))["model"]
    return scores._asdict()


def exchange(process: Process, args: argparse.Namespace) -> dict[str, Any]:
    """Time the exchange of a model's gradients by itself, and all-reduces of single tensors.

    On GPUs it is a CUDA graph, as in the step.
    """
    config = load_config(args.cfg, ["MODEL.KERNELS", "torch"])  # which need not be compiled for this
    model = prepare_model(TASK, config, process, None)
    gradients = GradientExchange(model, overlaps=should_overlap(all_reduce_speed(process.device)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def call() -> None:
        gradients.start()
        for s in gradients.slices:
            for parameter in s.parameters:
                gradients.mark_ready(s, parameter)
        gradients.finish()

    num_bytes = sum(s.flat.numel() * s.flat.element_size() for s in gradients.slices)
    sizes = {"1": 2**20, "32": 2**25, "256": 2**28} if is_gpu(process) else {"1": 2**20}
    tensors = {name: torch.zeros(size // 4, device=process.device) for name, size in sizes.items()}
    calls: dict[str, Callable[[], object]] = {"exchange": captured(call, process)}
    for name, tensor in tensors.items():
        calls[f"{name} MiB"] = captured(partial(dist.all_reduce, tensor), process)
    measured = median_seconds(
        calls, process.device, rounds=3, round_seconds=0.3, warmup=3, num_processes=process.num_processes
    )
    seconds = {name: s for name, (s, _) in measured.items()}
    share = 2 * (process.num_processes - 1) / process.num_processes  # of the bytes, that each process sends
    gb_per_second = {name: share * size / seconds[f"{name} MiB"] / 1e9 for name, size in sizes.items()}
    return {
        "megabytes": num_bytes / 1e6,
        "slices": len(gradients.slices),
        "exchange_ms": 1000 * seconds["exchange"],
        "bus_gb_per_second": gb_per_second,
        "exchange_gb_per_second": share * num_bytes / seconds["exchange"] / 1e9,
    }


def captured(call: Callable[[], object], process: Process) -> Callable[[], object]:
    return Capture(call) if is_gpu(process) else call


def is_gpu(process: Process) -> bool:
    return process.device.type == "cuda"


WORK = {"steps": steps, "evaluation": evaluation, "exchange": exchange}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=list(WORK))
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data")
    parser.add_argument("--cfg", default="cfgs/mlla_t.yaml")
    args = parser.parse_args()
    if args.work == "steps":
        use_deterministic_algorithms()
    process, start = start_process(), time.monotonic()
    result = WORK[args.work](process, args)
    if process.is_main:
        args.output.write_text(json.dumps({**result, "seconds": time.monotonic() - start}))
    stop_process(process)


if __name__ == "__main__":
    main()
