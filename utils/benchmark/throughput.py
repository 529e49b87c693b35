"""`--throughput`: speed of a task's inference or training step, beside other models; table, JSON lines and chart."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from yacs.config import CfgNode

from utils.benchmark.measure import Conditions, Throughput, measure_inference, measure_training
from utils.checkpoint.download import is_timm_model
from utils.config.command_line import report_user_errors
from utils.config.errors import ConfigError
from utils.distributed.process import Process
from utils.logs.logger import logger
from utils.logs.output_dir import open_output_dir
from utils.logs.plots import plot_bars
from utils.logs.recorder import append_records
from utils.speed.compile import effective_mode, resolve_mode, uses_graphs
from utils.training.build import build_ema, build_optimizer, build_precision, build_train_step
from utils.training.graphed_step import GraphedTrainStep
from utils.training.run import inference_model, prepare_model
from utils.training.task import Task

NUM_TRAIN_IMAGES = 1_281_167  # ImageNet's: of the run whose training step is measured
STEP_WITHOUT_TEACHER = -1  # before MESA, even if it begins at step 0

MakeModel = Callable[[], nn.Module]


def run_throughput(task: Task, config: CfgNode, process: Process) -> None:
    """Measure the configured model and BENCHMARK.BASELINES; print a table, append to throughput.jsonl, draw a chart.

    Training is measured on all processes together, inference on the first one alone, which also writes the files.
    """
    with report_user_errors(task.user_errors):
        folder = open_output_dir(config.OUTPUT, config.MODEL.NAME, config.TAG, rank=process.rank)
        if not (config.BENCHMARK.TRAIN or process.is_main):
            return
        factories: dict[str, MakeModel] = {config.MODEL.NAME: lambda: prepare_model(task, config, process, None)}
        for name in filter(None, config.BENCHMARK.BASELINES.split(",")):
            factories[name] = lambda name=name: task.baseline_model(config, process, name)  # type: ignore[misc]
        measure_rows = training_rows if config.BENCHMARK.TRAIN else inference_rows
        rows = [row for name, make in factories.items() for row in measure_rows(task, config, process, name, make)]
    if not process.is_main:
        return
    print(throughput_table(rows))
    by_size = size_rows(task, config, process, factories[config.MODEL.NAME])
    if by_size:
        print(pixel_table(by_size))
    append_records(folder / "throughput.jsonl", [asdict(row) for row in (*rows, *by_size)])
    draw_bars(rows, folder / "throughput.png")
    logger.info("speeds are in %s: throughput.jsonl and throughput.png", folder)


def timm_baseline(name: str, image_size: int, drop_path_rate: float, device: torch.device) -> nn.Module:
    """Return timm's classifier `timm:<name>` in channels_last, with stochastic depth and image size if it has them.

    Raises:
        ConfigError: timm has no such model.
    """
    model_name = name.removeprefix("timm:")
    if not is_timm_model(model_name):
        message = f"BENCHMARK.BASELINES {name!r}: timm has no such model; timm.list_models() lists them"
        raise ConfigError(message, key="BENCHMARK.BASELINES")
    weights = timm.get_pretrained_cfg(model_name)
    size: dict[str, Any] = {"img_size": image_size} if weights is not None and weights.fixed_input_size else {}
    try:
        model = timm.create_model(model_name, drop_path_rate=drop_path_rate, **size)
    except TypeError:  # it has no stochastic depth
        model = timm.create_model(model_name, **size)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def inference_rows(task: Task, config: CfgNode, process: Process, name: str, make_model: MakeModel) -> list[Throughput]:
    """Measure inference at the configured batch size and at batch size 1."""
    model = inference_model(task, config, make_model(), process.device).eval()
    sizes = sorted({config.DATA.BATCH_SIZE, 1}, reverse=True)
    return [inference_row(task, config, process, name, model, batch_size) for batch_size in sizes]


def inference_row(
    task: Task,
    config: CfgNode,
    process: Process,
    name: str,
    model: nn.Module,
    batch_size: int,
    size: tuple[int, int] | None = None,
) -> Throughput:
    size = size or task.image_size(config, training=False)
    mode = resolve_mode(config.TEST.COMPILE, process.device)
    conditions = conditions_of(config, process, effective_mode(mode, is_captured=uses_graphs(mode, process.device)))
    predict = task.inference_call(config, model, batch_size, size, process.device)
    return measure_inference(predict, conditions, name=name, batch_size=batch_size, size=size)


def training_rows(task: Task, config: CfgNode, process: Process, name: str, make_model: MakeModel) -> list[Throughput]:
    """Measure the run's own training step on all processes together, and with MESA once more with the teacher."""
    derived = task.derive(config, num_processes=process.num_processes, num_train_images=NUM_TRAIN_IMAGES)
    model = make_model()
    ema = build_ema(config, model, derived)
    optimizer = build_optimizer(config, task.parameter_groups(config, model))
    batch = task.synthetic_batch(config, model, process.device)
    precision = build_precision(config, process.device)
    step = build_train_step(task, config, model, process, optimizer, ema, precision, derived)
    mode = resolve_mode(config.TRAIN.COMPILE, process.device)
    conditions = conditions_of(
        config, process, effective_mode(mode, is_captured=isinstance(step, GraphedTrainStep)), process.num_processes
    )
    steps = {"training": STEP_WITHOUT_TEACHER}
    if getattr(step.compute_losses, "teacher", None) is not None:
        steps["training, MESA"] = step.compute_losses.mesa_start_step  # type: ignore[attr-defined]
    size = task.image_size(config, training=True)
    return [
        measure_training(
            step, batch, conditions, name=name, batch_size=config.DATA.BATCH_SIZE, size=size, step=number, work=work
        )
        for work, number in steps.items()
    ]


def size_rows(task: Task, config: CfgNode, process: Process, make_model: MakeModel) -> list[Throughput]:
    """Measure inference at BENCHMARK.SIZES; the batch shrinks as images grow, for the same number of pixels."""
    rows = []
    for side in map(int, filter(None, config.BENCHMARK.get("SIZES", "").split(","))):
        batch_size = max(1, round(config.DATA.BATCH_SIZE * config.DATA.IMG_SIZE**2 / side**2))
        model = inference_model(task, config, make_model(), process.device).eval()
        rows.append(inference_row(task, config, process, config.MODEL.NAME, model, batch_size, (side, side)))
    return rows


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
            }
            for row in rows
        ]
    )


def pixel_table(rows: Sequence[Throughput]) -> str:
    """Return the cost of a pixel at several image sizes, and its ratio to the first size's."""
    costs = [1e6 * row.milliseconds_per_batch / row.batch / int(row.size) ** 2 for row in rows]
    return in_columns(
        [
            {
                "model": row.model,
                "size": str(row.size),
                "batch": str(row.batch),
                "img/s": f"{row.images_per_second:.1f}",
                "ns/pixel": f"{cost:.3f}",
                f"of {rows[0].size}": f"{cost / costs[0]:.2f}",
            }
            for row, cost in zip(rows, costs, strict=True)
        ]
    )


def in_columns(rows: Sequence[dict[str, str]]) -> str:
    """Return rows of cells by column name as text in aligned columns under a heading."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [dict(zip(widths, widths, strict=True)), *rows]
    return "\n".join("  ".join(line[name].rjust(width) for name, width in widths.items()) for line in lines)


def pixels(row: Throughput) -> str:
    return row.size if isinstance(row.size, str) else f"{row.size}x{row.size}"


def draw_bars(rows: Sequence[Throughput], path: Path) -> None:
    """Draw the images per second of each row as a bar chart."""
    first = rows[0]
    plot_bars(
        [f"{row.model}, {row.work}, batch {row.batch}, {pixels(row)}" for row in rows],
        [row.images_per_second for row in rows],
        highlighted=[row.model == first.model for row in rows],
        axis_label="images per second",
        title=f"{first.chip}, torch {first.torch}, {first.precision}, {first.layout}, compile {first.compile}",
        path=path,
    )
