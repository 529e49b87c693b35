"""`--throughput`: speed of a task's inference or training step, beside other models; table, JSON lines and chart."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from utils.benchmark.measure import Conditions, Throughput, measure_inference, measure_training
from utils.benchmark.official import official_speed
from utils.config.command_line import report_user_errors
from utils.config.errors import UserError
from utils.config.schema import with_setting
from utils.distributed.process import Process, gather_objects
from utils.logs.logger import logger
from utils.logs.output_dir import open_output_dir, output_errors
from utils.logs.plots import plot_bars, plot_lines
from utils.logs.recorder import append_records
from utils.speed.compile import effective_mode, uses_graphs
from utils.training.build import (
    build_ema,
    build_inference_model,
    build_optimizer,
    build_precision,
    build_train_step,
    is_captured,
    training_mode,
)
from utils.training.derived import Derived
from utils.training.ema import ModelEma
from utils.training.run import prepare_model
from utils.training.task import Task
from utils.training.train_step import TrainStep

NUM_TRAIN_IMAGES = 1_281_167  # ImageNet's: of the run whose training step is measured
STEP_WITHOUT_TEACHER = -1  # before MESA, even if it begins at step 0

MakeModel = Callable[[], nn.Module]


def run_throughput(task: Task, config: CfgNode, process: Process) -> None:
    """Measure the configured model and BENCHMARK.BASELINES; print a table, append to throughput.jsonl, draw a chart.

    Training is measured on each process by itself and on all together, inference on the first one, which also writes
    the files: each row as soon as it is measured.
    """
    with report_user_errors(task.user_errors, out_of_memory=False):
        folder = open_output_dir(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
        if not (config.BENCHMARK.TRAIN or process.is_main):
            return
        baselines = filter(None, config.BENCHMARK.BASELINES.split(","))
        configs = {config.MODEL.NAME: config, **{name: baseline_config(config, name) for name in baselines}}
        logger.info("speed of %s on synthetic images; each measurement takes ten seconds or more", ", ".join(configs))
        measure_rows = training_rows if config.BENCHMARK.TRAIN else inference_rows
        rows: list[Throughput] = []
        for name, of_model in configs.items():
            for row in measure_rows(task, config, process, name, partial(prepare_model, task, of_model, process, None)):
                rows.append(row)
                if process.is_main:
                    write_row(folder, row)
    if not process.is_main:
        return
    print(throughput_table(rows))
    with output_errors(folder):
        draw_bars(rows, folder / "throughput.png")
    by_size = []
    for row in size_rows(task, configs, process):
        by_size.append(row)
        write_row(folder, row)
    if by_size:
        print(pixel_table(by_size))
        with output_errors(folder):
            draw_sizes(by_size, folder / "sizes.png")
    logger.info("speeds are in %s: %s", folder, "throughput.jsonl, throughput.png" + (", sizes.png" if by_size else ""))


def write_row(folder: Path, row: Throughput) -> None:
    """Append a row to throughput.jsonl, and log its speed.

    Raises:
        OutputError: the file cannot be written.
    """
    with output_errors(folder):
        append_records(folder / "throughput.jsonl", [asdict(row)])
    logger.info(
        "%s of %s, batch %d on each of %d: %.1f img/s, %.2f ms/batch",
        *(row.work, row.model, row.batch, row.processes, row.images_per_second, row.milliseconds_per_batch),
    )
    if row.scaling is not None:
        logger.info(
            "that is %.1f%% of what the processes reach by themselves at the same time: %s img/s",
            *(row.scaling, ", ".join(f"{speed:.1f}" for speed in row.alone)),
        )


def baseline_config(config: CfgNode, name: str) -> CfgNode:
    """Return the configuration of a model of BENCHMARK.BASELINES, timm:NAME."""
    config = with_setting(config, "MODEL.TYPE", name)
    return with_setting(config, "MODEL.TIMM.ARGS", "") if "TIMM" in config.MODEL else config


def inference_rows(
    task: Task, config: CfgNode, process: Process, name: str, make_model: MakeModel
) -> Iterator[Throughput]:
    """Yield the speed of inference at the configured batch size and at batch size 1."""
    model = build_inference_model(task, config, process.device, for_speed=True)
    prepared = model(make_model())
    sizes = sorted({config.DATA.BATCH_SIZE, 1}, reverse=True)
    for batch_size in sizes:
        yield inference_row(task, config, process, name, prepared, model.mode, batch_size)


def inference_row(
    task: Task,
    config: CfgNode,
    process: Process,
    name: str,
    model: nn.Module,
    mode: str,
    batch_size: int,
) -> Throughput:
    size = task.image_size(config, training=False)
    conditions = conditions_of(config, process, effective_mode(mode, is_captured=uses_graphs(mode, process.device)))
    predict = task.inference_call(config, model, batch_size, size, process.device)
    return measure_inference(predict, conditions, name=name, batch_size=batch_size, size=size)


def training_rows(
    task: Task, config: CfgNode, process: Process, name: str, make_model: MakeModel
) -> Iterator[Throughput]:
    """Yield the speed of a run's own training step, and with MESA once more with the teacher.

    Several processes are measured by themselves first, all at the same time, which gives the scaling.
    """
    if process.num_processes == 1:
        yield from step_rows(task, config, process, name, make_model())
        return
    speeds: dict[str, float] = {}
    for row in step_rows(task, config, replace(process, num_processes=1), name, make_model()):
        speeds[row.work] = row.images_per_second
        yield row
    free_memory(process.device)
    of_all = gather_objects(speeds)
    for row in step_rows(task, config, process, name, make_model()):
        alone = tuple(speeds_of_one[row.work] for speeds_of_one in of_all)
        yield replace(row, scaling=100 * row.images_per_second / sum(alone), alone=alone)
    free_memory(process.device)


def step_rows(task: Task, config: CfgNode, process: Process, name: str, model: nn.Module) -> Iterator[Throughput]:
    """Yield the speed of a model's training step on the processes of `process`, all together."""
    step, _, derived = new_train_step(task, config, model, process)
    batch = task.synthetic_batch(config, model, process.device)
    mode = training_mode(task, config, model, process.device, derived)
    mode = effective_mode(mode, is_captured=is_captured(step))
    conditions = conditions_of(config, process, mode, process.num_processes)
    steps = {"training": STEP_WITHOUT_TEACHER}
    if getattr(step.compute_losses, "teacher", None) is not None:
        steps["training, MESA"] = step.compute_losses.mesa_start_step  # type: ignore[attr-defined]
    size = task.image_size(config, training=True)
    for work, number in steps.items():
        yield measure_training(
            step, batch, conditions, name=name, batch_size=config.DATA.BATCH_SIZE, size=size, step=number, work=work
        )


def new_train_step(
    task: Task, config: CfgNode, model: nn.Module, process: Process
) -> tuple[TrainStep, ModelEma | None, Derived]:
    """Return a model's training step in a run on ImageNet, its EMA, and the lengths of that run."""
    derived = task.derive(config, num_processes=process.num_processes, num_train_images=NUM_TRAIN_IMAGES)
    ema = build_ema(config, model, derived)
    if ema is not None:
        ema.scores = {"model": 0.0, "EMA": 0.0}  # so that it is MESA's teacher, also in short runs
    optimizer = build_optimizer(config, task.parameter_groups(config, model))
    precision = build_precision(config, process.device)
    return build_train_step(task, config, model, process, optimizer, ema, precision, derived), ema, derived


def size_rows(task: Task, configs: Mapping[str, CfgNode], process: Process) -> Iterator[Throughput]:
    """Yield the speed of inference of all models, by name, at BENCHMARK.SIZES.

    The batch shrinks as images grow, for the same number of pixels. Sizes for which a model cannot be made, or that do
    not fit into memory, are left out with a warning.
    """
    for name, config in configs.items():
        for side in map(int, filter(None, config.BENCHMARK.get("SIZES", "").split(","))):
            batch_size = max(1, round(config.DATA.BATCH_SIZE * config.DATA.IMG_SIZE**2 / side**2))
            try:
                yield size_row(task, with_setting(config, "DATA.IMG_SIZE", side), process, name, batch_size)
            except (torch.OutOfMemoryError, UserError) as error:
                is_memory = isinstance(error, torch.OutOfMemoryError)
                logger.warning("%s at %dx%d is left out: %s", name, side, side, "out of memory" if is_memory else error)
            free_memory(process.device)


def size_row(task: Task, config: CfgNode, process: Process, name: str, batch_size: int) -> Throughput:
    model = build_inference_model(task, config, process.device, for_speed=True)
    prepared = model(prepare_model(task, config, process, None))
    return inference_row(task, config, process, name, prepared, model.mode, batch_size)


def conditions_of(config: CfgNode, process: Process, mode: str, num_processes: int = 1) -> Conditions:
    return Conditions(process.device, build_precision(config, process.device), mode, num_processes=num_processes)


def throughput_table(rows: Sequence[Throughput]) -> str:
    """Return a heading and the rows, in columns."""
    return in_columns(
        [
            {
                "model": row.model,
                "work": row.work,
                "chip": row.chip,
                "precision": row.precision,
                "compile": row.compile,
                "batch": str(row.batch),
                "size": str(row.size),
                "processes": str(row.processes),
                "img/s": f"{row.images_per_second:.1f}",
                "ms/batch": f"{row.milliseconds_per_batch:.2f}",
                "peak MiB": f"{row.memory_mib:.0f}",
                "scaling": "" if row.scaling is None else f"{row.scaling:.1f}%",
                "official code": "" if (speed := official(row)) is None else f"{speed:.0f}",
            }
            for row in rows
        ]
    )


def official(row: Throughput) -> float | None:
    """Return the official code's images per second at the same work, or None."""
    return official_speed(
        model=row.model, work=row.work, chip=row.chip, batch=row.batch, size=row.size, processes=row.processes
    )


def pixel_table(rows: Sequence[Throughput]) -> str:
    """Return the cost of a pixel by image size, its ratio to that at the model's first size, and the peak memory."""
    costs = {(row.model, row.size): nanoseconds_per_pixel(row) for row in rows}
    first: dict[str, int | str] = {}
    for row in rows:
        first.setdefault(row.model, row.size)
    return in_columns(
        [
            {
                "model": row.model,
                "size": str(row.size),
                "batch": str(row.batch),
                "img/s": f"{row.images_per_second:.1f}",
                "ns/pixel": f"{costs[row.model, row.size]:.3f}",
                "ratio": f"{costs[row.model, row.size] / costs[row.model, first[row.model]]:.2f}",
                "peak MiB": f"{row.memory_mib:.0f}",
            }
            for row in rows
        ]
    )


def nanoseconds_per_pixel(row: Throughput) -> float:
    return 1e6 * row.milliseconds_per_batch / row.batch / int(row.size) ** 2


def in_columns(rows: Sequence[dict[str, str]]) -> str:
    """Return rows of cells by column name as text in aligned columns under a heading; empty columns are left out."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = [dict(zip(widths, widths, strict=True)), *rows]
    return "\n".join("  ".join(line[name].rjust(width) for name, width in widths.items()) for line in lines)


def pixels(row: Throughput) -> str:
    return row.size if isinstance(row.size, str) else f"{row.size}x{row.size}"


def draw_bars(rows: Sequence[Throughput], path: Path) -> None:
    """Draw the images per second of each row, and of the official code where it is known, as a bar chart."""
    first = rows[0]
    bars: list[tuple[str, float, str]] = []
    for row in rows:
        gpus = f", {row.processes} processes" if row.processes > 1 else ""
        work = f"{row.work}, batch {row.batch}, {pixels(row)}{gpus}"
        color = "tab:blue" if row.model == first.model else "tab:gray"
        bars.append((f"{row.model}, {work}", row.images_per_second, color))
        speed = official(row)
        if speed is not None:
            bars.append((f"official code (float16), {work}", speed, "tab:orange"))
    labels, values, colors = zip(*bars, strict=True)
    plot_bars(
        labels,
        values,
        colors=colors,
        axis_label="images per second",
        title=f"{first.chip}, torch {first.torch}, {first.precision}, {first.layout}, compile {first.compile}",
        path=path,
    )


def draw_sizes(rows: Sequence[Throughput], path: Path) -> None:
    """Draw time per pixel and peak memory by image size, a curve per model: of linear complexity where it is level."""
    first = rows[0]
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {"nanoseconds per pixel": {}, "peak memory, MiB": {}}
    for row in rows:
        for values, value in zip(panels.values(), (nanoseconds_per_pixel(row), row.memory_mib), strict=True):
            values.setdefault(row.model, []).append((int(row.size), value))
    title = f"inference, {first.chip}, torch {first.torch}, {first.precision}, compile {first.compile}"
    plot_lines(panels, x_label="side of the image, pixels", title=title, path=path)


def free_memory(device: torch.device) -> None:
    """Free what the previous measurement left on the device, CUDA graphs included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
