"""`--throughput` with BENCHMARK.LOADING: training from files, beside its loader alone and its steps alone."""

import gc
import itertools
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from utils.benchmark.measure import WARMUP_STEPS, chip_name, run_calls, synchronize
from utils.benchmark.throughput import free_memory, in_columns, new_train_step
from utils.config.command_line import report_user_errors
from utils.config.schema import with_setting
from utils.distributed.process import Process, gather_objects
from utils.logs.environment import describe_cores
from utils.logs.logger import logger
from utils.logs.output_dir import open_output_dir, output_errors
from utils.logs.plots import plot_grouped_bars
from utils.logs.recorder import append_records
from utils.speed.data_wait import DataWait
from utils.training.build import build_inference_model, build_precision
from utils.training.run import prepare_model
from utils.training.task import Run, Task
from utils.training.train_step import TrainStep
from utils.training.trainer import MAX_WAIT

SECONDS = 4.0  # of each measurement
FILL_SECONDS = 1.0  # in which the workers come to full speed, and batches that were loaded ahead are used up


@dataclass(frozen=True)
class LoadingRow:
    """A row of the table; rates are images per second of all processes together.

    `waiting` is the share of the time in which the steps wait for data, the longest of all processes; `stages` says
    what takes the time of the loader's workers; `advice` is how the steps would wait less, "" where they hardly wait.
    """

    chip: str
    torch: str
    precision: str
    cores: str
    processes: int
    workers: int  # per process
    batch: int  # per process
    settings: Mapping[str, str]
    loading: float
    steps: float
    training: float
    waiting: float
    stages: str
    advice: str

    @property
    def name(self) -> str:
        """The settings as text, such as "AUGMENT_ON gpu, DECODE_ON cpu"."""
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.settings.items()) or "as set"


@dataclass(frozen=True)
class EvaluationRow:
    """Seconds of an evaluation, from the start of its loader's workers to its metrics."""

    images: int
    models: list[str]
    seconds: float


def run_loading(task: Task, config: CfgNode, process: Process) -> None:
    """Measure each batch size of BENCHMARK.LOADING with each of `task.loading_choices`, and an evaluation; print a
    table, append to loading.jsonl, draw a chart. All processes call together.
    """
    rows: list[LoadingRow | EvaluationRow] = []
    with report_user_errors(task.user_errors, out_of_memory=False):
        folder = open_output_dir(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
        for batch_size in map(int, config.BENCHMARK.LOADING.split(",")):
            sized = with_setting(config, "DATA.BATCH_SIZE", batch_size)
            for row in measure_batch_size(task, sized, process, folder, evaluates=not rows):
                rows.append(row)
                if process.is_main:
                    logger.info("%s", describe(row))
                    with output_errors(folder):
                        append_records(folder / "loading.jsonl", [asdict(row)])
            free_memory(process.device)
            torch.compiler.reset()  # else the next batch size is compiled as one of many
    if not process.is_main:
        return
    of_training = [row for row in rows if isinstance(row, LoadingRow)]
    print(loading_table(of_training))
    for row in rows:
        if isinstance(row, EvaluationRow):
            print(describe(row))
    for advice in advice_lines(of_training):
        print(advice)
    with output_errors(folder):
        draw_chart(of_training, folder / "loading.png")
    logger.info("speeds are in %s: loading.jsonl and loading.png", folder)


def measure_batch_size(
    task: Task, config: CfgNode, process: Process, folder: Path, *, evaluates: bool
) -> Iterator[LoadingRow | EvaluationRow]:
    """Yield the rows of a batch size, for which the model is built and compiled once."""
    choices = task.loading_choices(config, process.device)
    precision, parts, steps = build_precision(config, process.device), None, 0.0
    for settings in choices:
        chosen = config
        for key, value in settings.items():
            chosen = with_setting(chosen, key, value)
        data = task.build_data(chosen, process)
        if parts is None:
            model = prepare_model(task, config, process, len(data.classes))
            parts = model, *new_train_step(task, config, model, process)
            batch = task.synthetic_batch(config, model, process.device)
            steps = steps_alone(parts[1], batch, process) * process.num_processes * config.DATA.BATCH_SIZE
            logger.info("batch size %d: the steps alone train %.0f images/s", config.DATA.BATCH_SIZE, steps)
        run = Run(chosen, process, folder, data, parts[0], precision)
        yield training_row(task, run, parts[1], settings, steps)
        if evaluates and settings is choices[-1]:
            yield evaluation_row(task, run, parts[2])
        del data, run
        gc.collect()  # ends the workers


def steps_alone(step: TrainStep, batch: Any, process: Process) -> float:
    """Return the steps per second on a batch that is on the device."""
    call = lambda: step([batch], step=0, learning_rate=0.0)  # noqa: E731
    run_calls(call, process.device, WARMUP_STEPS)
    count = agreed_count(run_calls(call, process.device, WARMUP_STEPS) / WARMUP_STEPS)
    return count / max(gather_objects(run_calls(call, process.device, count)))


def agreed_count(step_seconds: float) -> int:
    """Return how many steps all processes measure together."""
    return max(1, round(SECONDS / max(gather_objects(step_seconds))))


def training_row(task: Task, run: Run, step: TrainStep, settings: Mapping[str, str], steps: float) -> LoadingRow:
    """Measure a loader alone, and then the steps on its batches; epochs follow each other without evaluation."""
    process, num_images = run.process, run.config.DATA.BATCH_SIZE
    batches = itertools.chain.from_iterable(task.batches(run, epoch, 0) for epoch in itertools.count())
    num_workers = max(1, run.data.num_workers)
    gather_objects(None)  # all processes load at the same time, as in training
    batch_rate(batches, process, FILL_SECONDS, num_workers)
    loading = sum(gather_objects(num_images * batch_rate(batches, process, SECONDS, num_workers)))
    train = lambda: step([next(batches)], step=0, learning_rate=0.0)  # noqa: E731
    warmup = max(WARMUP_STEPS, num_workers)
    count = agreed_count(run_calls(train, process.device, warmup) / warmup)
    wait, start = DataWait(process.device), time.perf_counter()
    for index in range(count):
        with wait:
            batch = next(batches)
        step([batch], step=0, learning_rate=0.0)
        if (index + 1) % run.config.PRINT_FREQ == 0 or index + 1 == count:  # as training waits to log its progress
            synchronize(process.device)
            wait.collect()
    seconds = time.perf_counter() - start
    waiting = max(gather_objects(wait.collect() / seconds))
    return LoadingRow(
        chip=chip_name(process.device),
        torch=str(torch.__version__),
        precision=run.precision.name,
        cores=describe_cores(),
        processes=process.num_processes,
        workers=run.data.num_workers,
        batch=num_images,
        settings=settings,
        loading=loading,
        steps=steps,
        training=process.num_processes * num_images * count / max(gather_objects(seconds)),
        waiting=waiting,
        stages=run.data.loading_stages(),
        advice=run.data.loading_advice() if waiting > MAX_WAIT else "",
    )


def batch_rate(batches: Iterator[Any], process: Process, seconds: float, num_workers: int) -> float:
    """Return the batches per second in at least so many seconds, counted in rounds of all workers: one that began
    together ends together, so that large batches come in bursts.
    """
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(num_workers):
            next(batches)
            synchronize(process.device)
        count += num_workers
    return count / (time.perf_counter() - start)


def evaluation_row(task: Task, run: Run, ema: Any) -> EvaluationRow:
    """Time an evaluation of the model and its EMA in one pass over the validation images."""
    inference = build_inference_model(task, run.config, run.process.device)
    inference.warm_up(run.model, run.config, run.precision)
    models = {"model": run.model} | ({} if ema is None else {"EMA": ema.on(run.process.device)})
    synchronize(run.process.device)
    start = time.perf_counter()
    task.evaluate(run, inference.together(models))
    return EvaluationRow(run.data.num_val_images, list(models), time.perf_counter() - start)


def describe(row: LoadingRow | EvaluationRow) -> str:
    """Return a row as a sentence."""
    if isinstance(row, EvaluationRow):
        rate = row.images / row.seconds
        return (
            f"evaluation of {row.images} images by {' and '.join(row.models)}: {row.seconds:.1f} s, {rate:.0f} images/s"
        )
    return (
        f"batch {row.batch}, {row.name}: {row.training:.0f} images/s, waits {row.waiting:.1%}; "
        f"loading alone {row.loading:.0f}, of which {row.stages}"
    )


def loading_table(rows: Sequence[LoadingRow]) -> str:
    """Return what all rows share, and a line for each."""
    first = rows[0]
    return (
        f"{first.chip}, {first.processes} {'process' if first.processes == 1 else 'processes'}, {first.cores}, "
        f"{first.workers} workers per process, torch {first.torch}, {first.precision}; images/s\n"
    ) + in_columns(
        [
            {
                "batch": str(row.batch),
                **{key.rpartition(".")[2]: value for key, value in row.settings.items()},
                "loading alone": f"{row.loading:.0f}",
                "steps alone": f"{row.steps:.0f}",
                "training": f"{row.training:.0f}",
                "waiting": f"{row.waiting:.1%}",
                "time of the workers": row.stages,
            }
            for row in rows
        ]
    )


def advice_lines(rows: Sequence[LoadingRow]) -> Iterator[str]:
    """Yield a line for each batch size whose fastest row still waits for data."""
    for batch in dict.fromkeys(row.batch for row in rows):
        best = max((row for row in rows if row.batch == batch), key=lambda row: row.training)
        if best.advice:
            yield f"batch {batch}, {best.name}: steps wait {best.waiting:.1%}: {best.advice}"


def draw_chart(rows: Sequence[LoadingRow], path: Path) -> None:
    """Draw for each row the images per second of its loader, of the steps, and of both together.

    The rows may be of several runs on one kind of chip, which were allowed so many cores each.
    """
    plot_grouped_bars(
        [
            f"batch {row.batch}, {row.cores}, {row.workers} workers\n"
            f"{textwrap.fill(row.name, 36)}\nwaiting {row.waiting:.1%}"
            for row in rows
        ],
        {
            "loading alone": [row.loading for row in rows],
            "steps alone": [row.steps for row in rows],
            "training from files": [row.training for row in rows],
        },
        axis_label="images per second",
        title=f"{rows[0].chip} x{rows[0].processes}; batch and workers per process",
        path=path,
    )
