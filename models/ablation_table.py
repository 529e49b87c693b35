"""Print parameters and MACs of every row of the paper's tables 1 and 2, beside the paper's, as a Markdown table.

python -m models.ablation_table                              takes a second
python -m models.ablation_table --output table.md            also writes a file
python -m models.ablation_table --throughput --amp           also measures inference on this machine
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from yacs.config import CfgNode

from config import load_config
from models.build import build_model, input_channels
from models.unified.paper_rows import ABLATIONS, Ablation
from utils.benchmark.measure import measure_in_turns
from utils.config.command_line import Parser, at_least, report_user_errors
from utils.config.errors import UserError, file_errors
from utils.speed.flops import profile
from utils.training.build import build_precision

CONFIGS = Path(__file__).parent.parent / "cfgs/ablation"


class Counts(NamedTuple):
    parameters_m: float
    gmacs: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--throughput", action="store_true", help="also measure inference")
    parser.add_argument("--batch-size", type=at_least(1), default=128, help="for --throughput")
    parser.add_argument("--amp", action="store_true", help="mixed precision for --throughput")
    args = parser.parse_args(argv)
    speeds = measure(args.batch_size, amp=args.amp) if args.throughput else None
    text = table([count(row) for row in ABLATIONS], speeds)
    print(text, end="")
    with report_user_errors():
        if args.output is not None:
            with file_errors(UserError, args.output, "written", "choose another --output"):
                args.output.write_text(text)
    return 0


def count(row: Ablation) -> Counts:
    """Count the parameters, in millions, and GMACs of a row's model at 224x224, on the meta device."""
    config = row_config(row)
    with torch.device("meta"):
        model = build_model(config)
    total = profile(model, config.DATA.IMG_SIZE, input_channels(config))[-1]
    return Counts(total.parameters / 1e6, total.macs / 1e9)


def measure(batch_size: int, *, amp: bool) -> dict[str, float]:
    """Measure inference on this machine at 224x224: images per second by row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configs = {row.name: row_config(row, amp=amp) for row in ABLATIONS}
    return measure_in_turns(
        {name: build_model(config) for name, config in configs.items()},
        device=device,
        precision=build_precision(configs["baseline"], device),
        batch_size=batch_size,
        image_size=configs["baseline"].DATA.IMG_SIZE,
    )


def row_config(row: Ablation, *, amp: bool = False) -> CfgNode:
    return load_config(CONFIGS / f"{row.name}.yaml", ["AMP", str(amp)])


def table(counts: Sequence[Counts], speeds: dict[str, float] | None = None) -> str:
    """Return the Markdown table: deviations from the paper in percent, speeds also relative to the baseline."""
    titles = ["row", "parameters, M", "paper", "GMACs", "paper", "paper, top-1", "paper, img/s"]
    lines = [titles if speeds is None else [*titles, "img/s"]]
    lines.append(["---"] * len(lines[0]))
    first = ABLATIONS[0]
    for row, ours in zip(ABLATIONS, counts, strict=True):
        line = [row.label]
        for value, paper in ((ours.parameters_m, row.parameters_m), (ours.gmacs, row.gmacs)):
            line += [f"{value:.2f}", f"{paper:g} ({100 * (value / paper - 1):+.1f}%)"]
        speed = row.images_per_second
        line += [f"{row.top1}", f"{speed} ({speed / first.images_per_second:.2f})"]
        if speeds is not None:
            line.append(f"{speeds[row.name]:.0f} ({speeds[row.name] / speeds[first.name]:.2f})")
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
