"""The log, the progress bar, and the files of figures that a run leaves behind."""

import contextlib
import io
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from PIL import Image
from termcolor import colored
from tqdm import tqdm

from utils.logs.plots import Panel, plot_curves

CURVES_SECONDS = 60.0
HISTOGRAM_BINS = 64
PICTURE_SIDE = 1024  # pixels
COLORS = {logging.WARNING: "yellow", logging.ERROR: "red"}

logger = logging.getLogger("mlla")


class TerminalHandler(logging.Handler):
    """Writes to standard output above a progress bar; where there is a bar, lines about single steps stay away."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_step", False) and sys.stdout.isatty():
            return
        clock, _, message = self.format(record).partition(" | ")
        tqdm.write(f"{colored(clock, 'green')} {colored(message, COLORS.get(record.levelno))}", file=sys.stdout)
        sys.stdout.flush()


class LogFile(logging.FileHandler):
    """A log file that says once, on standard error, that it cannot be written, and lets the run go on."""

    has_failed = False

    def handleError(self, _: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        if not self.has_failed:
            self.has_failed = True
            print(f"{self.baseFilename}: the log cannot be written ({sys.exc_info()[1]})", file=sys.stderr)


def start_logging(folder: Path, rank: int) -> None:
    """Log to the terminal (the first process; others only errors) and to <folder>/log_rank<rank>.txt."""
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    terminal = TerminalHandler(logging.INFO if rank == 0 else logging.ERROR)
    terminal.setFormatter(logging.Formatter("%(asctime)s | %(message)s", "%H:%M:%S"))
    logger.addHandler(terminal)
    file = LogFile(folder / f"log_rank{rank}.txt", delay=rank > 0, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)


class ProgressBar:
    """One epoch's progress: a bar on a terminal, and a line in the log at each report."""

    def __init__(self, epoch: int, total_epochs: int, steps: int, *, done: int, is_main: bool) -> None:
        self.title = f"epoch {epoch + 1}/{total_epochs}"
        self.remaining_epochs = total_epochs - epoch - 1
        self.steps = steps
        self.done = done  # when this process started on it
        self.bar = tqdm(
            total=steps,
            initial=done,
            desc=self.title,
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=not (is_main and sys.stderr.isatty()),
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self) -> None:
        """One more step was started; costs nothing but for the bar."""
        self.bar.update()

    def report(
        self, step: int, *, terms: Mapping[str, float], grad_norm: float, lr: float, rate: float, seconds: float
    ) -> None:
        """`step` steps of the epoch are done, those since the start in `seconds`; terms are means of the epoch so far,
        the loss first, rate in images per second.
        """
        left = (self.steps - step + self.remaining_epochs * self.steps) * seconds / (step - self.done)
        eta = timedelta(seconds=round(left))
        losses = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
        self.bar.set_postfix_str(f"loss {terms['loss']:.4f}, {rate:.0f} img/s, run ends in {eta}")
        logger.info(
            "%s step %d/%d  %s  grad_norm %.3f  lr %.3e  %.0f img/s  eta %s",
            *(self.title, step, self.steps, losses, grad_norm, lr, rate, eta),
            extra={"is_step": True},
        )


class Tracker(Protocol):
    """A service that keeps figures besides the run's folder; it never raises."""

    def add(self, figures: Mapping[str, Any]) -> None: ...

    def add_picture(self, name: str, picture: Path, epoch: int) -> None: ...

    def close(self) -> None: ...


class RunRecorder:
    """Figures of a run by epoch. metrics.jsonl holds what the run's settings determine, to the last bit, however often
    it was interrupted; speed.jsonl what depends on the machine; TensorBoard both.

    Where they cannot be written, the log says so, and the run goes on.

    Args:
        folder: the run's.
        start_epoch: lines of this epoch and later ones are to be written anew.
        panels: what curves.png shows.
        tracker: where figures and pictures go besides.
    """

    def __init__(self, folder: Path, start_epoch: int, panels: Sequence[Panel], tracker: Tracker | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and only the first process writes

        self.path = folder / "metrics.jsonl"
        self.panels = panels
        self.tracker = tracker
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

    def add(self, metrics: dict[str, Any], speed: dict[str, Any]) -> None:
        """Note an epoch's figures; both have its number as "epoch"."""
        with self.errors_logged():
            append_records(self.path, [metrics])
            append_records(self.path.with_name("speed.jsonl"), [speed])
            for name, value in {**metrics, **speed}.items():
                if name != "epoch" and value is not None:
                    self.tensorboard.add_scalar(name, value, metrics["epoch"])
            self.tensorboard.flush()
        if self.tracker is not None:
            self.tracker.add({**metrics, **speed})

    def add_details(self, epoch: int, weights: Mapping[str, np.ndarray], picture: Path | None) -> None:
        """Histograms of weights by part, and a picture, made smaller where it is large."""
        with self.errors_logged():
            for name, values in weights.items():
                self.tensorboard.add_histogram(f"weights/{name}", values, epoch, bins=HISTOGRAM_BINS)
            if picture is not None:
                writer: Any = self.tensorboard.file_writer  # add_image writes PNG, several times as large
                writer.add_summary(picture_summary(picture), epoch)
            self.tensorboard.flush()
        if self.tracker is not None and picture is not None:
            self.tracker.add_picture("predictions", picture, epoch)

    def draw_curves(self, *, is_last: bool) -> None:
        """Bring curves.png up to date; but for the last epoch, at most once a minute."""
        if is_last or time.monotonic() - self.last_drawn > CURVES_SECONDS:
            self.last_drawn = time.monotonic()
            with self.errors_logged():
                plot_curves(read_records(self.path), self.panels, self.path.with_name("curves.png"))

    @contextlib.contextmanager
    def errors_logged(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.error("%s: figures could not be written (%s)", self.path.parent, error.strerror or error)

    def close(self) -> None:
        with self.errors_logged():
            self.tensorboard.close()
        if self.tracker is not None:
            self.tracker.close()


def picture_summary(picture: Path) -> Any:
    """TensorBoard's record of a picture, its longer side PICTURE_SIDE at most."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    buffer = io.BytesIO()
    with Image.open(picture) as image:
        small = image.convert("RGB")
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    small.save(buffer, "JPEG", quality=80)
    content = Summary.Image(
        height=small.height, width=small.width, colorspace=3, encoded_image_string=buffer.getvalue()
    )
    return Summary(value=[Summary.Value(tag="predictions", image=content)])


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
