"""Parameters and multiply-accumulates of every row of the paper's tables 1 and 2, beside the paper's, as Markdown.

python -m models.ablation_table                              counts alone, a second
python -m models.ablation_table --output table.md            also to a file
python -m models.ablation_table --throughput --amp           with inference speed on this machine, by turns
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
from utils.speed.flops import profile
from utils.training.build import build_precision

CONFIGS = Path(__file__).parent.parent / "cfgs/ablation"


class Counts(NamedTuple):
    parameters_m: float
    gmacs: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--throughput", action="store_true", help="measure inference too")
    parser.add_argument("--batch-size", type=at_least(1), default=128, help="of --throughput")
    parser.add_argument("--amp", action="store_true", help="16-bit autocast in --throughput")
    options = parser.parse_args(argv)
    speeds = measure(options.batch_size, amp=options.amp) if options.throughput else None
    text = table([count(row) for row in ABLATIONS], speeds)
    print(text, end="")
    with report_user_errors():
        if options.output is not None:
            write(options.output, text)
    return 0


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ValueError(f"--output {path}: {error.strerror}") from error


def count(row: Ablation) -> Counts:
    """Of the model of a row at 224x224, in millions and 10^9; nothing is computed."""
    config = row_config(row)
    with torch.device("meta"):
        model = build_model(config)
    total = profile(model, config.DATA.IMG_SIZE, input_channels(config))[-1]
    return Counts(total.parameters / 1e6, total.macs / 1e9)


def measure(batch_size: int, *, amp: bool) -> dict[str, float]:
    """Images per second of each row at 224x224, on this machine."""
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
    """The rows in the paper's order; deviations from its figures in per cent, speeds also as shares."""
    titles = ["row", "parameters, M", "paper", "GMACs", "paper", "paper, top-1", "paper, img/s"]
    lines = [titles if speeds is None else [*titles, "img/s"]]
    lines.append(["---"] * len(lines[0]))
    first = ABLATIONS[0]
    for row, found in zip(ABLATIONS, counts, strict=True):
        line = [row.label]
        for ours, paper in ((found.parameters_m, row.parameters_m), (found.gmacs, row.gmacs)):
            line += [f"{ours:.2f}", f"{paper:g} ({100 * (ours / paper - 1):+.1f}%)"]
        speed = row.images_per_second
        line += [f"{row.top1}", f"{speed} ({speed / first.images_per_second:.2f})"]
        if speeds is not None:
            line.append(f"{speeds[row.name]:.0f} ({speeds[row.name] / speeds[first.name]:.2f})")
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
