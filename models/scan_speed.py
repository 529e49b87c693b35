"""Measure the forget gate's scan by number of tokens, chunked, with Triton and token by token, beside linear attention.

python -m models.scan_speed                                  on the GPU, or a few minutes on a CPU
python -m models.scan_speed --tokens 196 3136 --batch-size 32

Writes scan_speed.md and scan_speed.png. The layer is that of the baseline's first stage: 3 heads of 32 channels.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.kernels.scan import triton_scan
from models.unified.scan import gated_scan, step_scan
from models.unified.ssm import unified_attention
from utils.benchmark.measure import synchronize
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.config.errors import UserError, file_errors
from utils.tools.paper_plots import plot_speed

HEADS, HEAD_DIM = 3, 32
REPEATS = 5
SECONDS = 10.0  # longest time for the repetitions of one measurement

Layer = Callable[[Sequence[Tensor]], Tensor]
LAYERS: dict[str, Layer] = {
    "linear attention": lambda x: unified_attention(*x[:3], normalize=False),
    "forget gate, in chunks": lambda x: gated_scan(*x),
    "forget gate, Triton": lambda x: gated_scan(*x, operator=triton_scan),
    "forget gate, step by step": lambda x: step_scan(*x),
}
STEPWISE, TRITON = "forget gate, step by step", "forget gate, Triton"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=at_least(1), nargs="+", default=[196, 784, 3136, 12544, 65536])
    parser.add_argument("--batch-size", type=at_least(1), default=1)
    parser.add_argument(
        "--most-steps", type=at_least(0), default=12544, help="most tokens for the step-by-step scan with gradients"
    )
    parser.add_argument("--forward-only", action="store_true", help="without gradients")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of one thread instead of wall-clock time, for a busy machine"
    )
    parser.add_argument("--output", type=Path, default=Path("output/scan_speed"))
    args = parser.parse_args(argv)
    with report_user_errors():
        if args.cpu_time and (torch.cuda.is_available() or torch.get_num_threads() > 1):
            raise UserError("--cpu-time: needs one thread on a CPU; set OMP_NUM_THREADS=1 and CUDA_VISIBLE_DEVICES=")
        with file_errors(UserError, args.output, "written", "choose another --output"):
            args.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = {name: layer for name, layer in LAYERS.items() if name != TRITON or device.type == "cuda"}
    times = {
        with_gradients: {
            name: [
                None
                if name == STEPWISE and with_gradients and count > args.most_steps
                else measure(layer, count, args, device=device, with_gradients=with_gradients)
                for count in args.tokens
            ]
            for name, layer in layers.items()
        }
        for with_gradients in ([False] if args.forward_only else [False, True])
    }
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    about = f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {args.batch_size}, float32"
    about += ", CPU time" if args.cpu_time else ""
    text = table(args.tokens, times, about)
    (args.output / "scan_speed.md").write_text(text)
    plot_speed(args.tokens, times, title=about, picture=args.output / "scan_speed.png")
    print(text, end="")
    return 0


def measure(
    layer: Layer, num_tokens: int, args: argparse.Namespace, *, device: torch.device, with_gradients: bool
) -> float:
    """Return the seconds of one call: the median of REPEATS after a warm-up, or the first call if it is long."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, HEADS, num_tokens, HEAD_DIM)
    q, k, v, delta = (torch.rand(shape, generator=generator).to(device) for _ in range(4))
    a = -torch.arange(1.0, HEAD_DIM + 1, device=device).repeat(HEADS, HEAD_DIM, 1).mT.contiguous()
    clock = time.process_time if args.cpu_time else time.perf_counter
    inputs = [x.requires_grad_(with_gradients) for x in (q, k, v, 0.1 * delta, a)]

    def call() -> float:
        synchronize(device)
        start = clock()
        with torch.set_grad_enabled(with_gradients):
            out = layer(inputs)
        if with_gradients:
            out.sum().backward()
        synchronize(device)
        return clock() - start

    first = call()
    if first * REPEATS > SECONDS:
        return first
    return statistics.median(call() for _ in range(REPEATS))


def table(tokens: Sequence[int], times: dict[bool, dict[str, list[float | None]]], about: str) -> str:
    """Return a Markdown table of milliseconds by number of tokens."""
    lines = [["tokens"], ["---"]]
    for with_gradients in times:
        what = "forward and backward" if with_gradients else "forward"
        lines[0] += [f"{name}, {what}, ms" for name in times[with_gradients]]
        lines[1] += ["---"] * len(times[with_gradients])
    for i, count in enumerate(tokens):
        row = [values[i] for by_name in times.values() for values in by_name.values()]
        lines.append([f"{count:,}", *map(milliseconds, row)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{about}.\n"


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1000 * seconds:.2f}" if seconds < 0.01 else f"{1000 * seconds:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
