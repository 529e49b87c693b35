"""The log, the progress bar, and the files of figures that a run leaves behind."""

import contextlib
import json
import logging
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from termcolor import colored
from tqdm import tqdm

from utils.plots import plot_curves

CURVES_SECONDS = 60.0
COLOURS = {logging.WARNING: "yellow", logging.ERROR: "red"}

logger = logging.getLogger("mlla")


class TerminalHandler(logging.Handler):
    """Writes to standard output above a progress bar; where there is a bar, lines about single steps stay away."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_step", False) and sys.stdout.isatty():
            return
        clock, _, message = self.format(record).partition(" | ")
        tqdm.write(f"{colored(clock, 'green')} {colored(message, COLOURS.get(record.levelno))}", file=sys.stdout)
        sys.stdout.flush()


def start_logging(folder: Path, rank: int) -> None:
    """Log to the terminal (the first process; others only errors) and to <folder>/log_rank<rank>.txt."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    terminal = TerminalHandler(logging.INFO if rank == 0 else logging.ERROR)
    terminal.setFormatter(logging.Formatter("%(asctime)s | %(message)s", "%H:%M:%S"))
    logger.addHandler(terminal)
    file = logging.FileHandler(folder / f"log_rank{rank}.txt", delay=rank > 0, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)


class Progress:
    """One epoch's progress: a bar on a terminal, and a line in the log at each report."""

    def __init__(self, epoch: int, total_epochs: int, steps: int, *, is_main: bool) -> None:
        self.title = f"epoch {epoch + 1}/{total_epochs}"
        self.remaining_epochs = total_epochs - epoch - 1
        self.steps = steps
        self.bar = tqdm(
            total=steps,
            desc=self.title,
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=not (is_main and sys.stderr.isatty()),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self) -> None:
        """One more step was started; costs nothing but for the bar."""
        self.bar.update()

    def report(self, step: int, *, loss: float, grad_norm: float, lr: float, rate: float, seconds: float) -> None:
        """`step` steps are done in `seconds`; loss is the epoch's mean so far, rate in images per second."""
        left = (self.steps - step + self.remaining_epochs * self.steps) * seconds / step
        eta = timedelta(seconds=round(left))
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} img/s, run ends in {eta}")
        logger.info(
            "%s step %d/%d  loss %.4f  grad_norm %.3f  lr %.3e  %.0f img/s  eta %s",
            *(self.title, step, self.steps, loss, grad_norm, lr, rate, eta),
            extra={"is_step": True},
        )


class RunRecorder:
    """Figures of a run by epoch: metrics.jsonl, one JSON object a line, and TensorBoard scalars beside it."""

    def __init__(self, folder: Path, start_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and only the first process writes

        self.path = folder / "metrics.jsonl"
        self.drop_from(start_epoch)
        self.tensorboard = SummaryWriter(str(folder), purge_step=start_epoch)
        self.last_drawn = 0.0

    def drop_from(self, start_epoch: int) -> None:
        """Move lines of epochs that run again to metrics_replaced.jsonl."""
        records = read_records(self.path)
        kept = [record for record in records if record["epoch"] < start_epoch]
        replaced = [record for record in records if record["epoch"] >= start_epoch]
        append_records(self.path.with_name("metrics_replaced.jsonl"), replaced)
        temporary = self.path.with_name("metrics.jsonl.tmp")
        temporary.write_text("")
        append_records(temporary, kept)
        temporary.replace(self.path)

    def add(self, record: dict[str, Any]) -> None:
        append_records(self.path, [record])
        for name, value in record.items():
            if name != "epoch" and value is not None:
                self.tensorboard.add_scalar(name, value, record["epoch"])
        self.tensorboard.flush()

    def draw_curves(self, *, is_last: bool) -> None:
        """Bring curves.png up to date; but for the last epoch, at most once a minute."""
        if is_last or time.monotonic() - self.last_drawn > CURVES_SECONDS:
            self.last_drawn = time.monotonic()
            plot_curves(read_records(self.path), self.path.with_name("curves.png"))

    def close(self) -> None:
        self.tensorboard.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects with an epoch in a file of one JSON object a line; lines that a kill cut short are left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "epoch" in record]


def append_records(path: Path, records: list[dict[str, Any]]) -> None:
    if records:
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
