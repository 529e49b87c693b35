"""From a configuration to measurements: `main.py --throughput`."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import nn
from yacs.config import CfgNode

from utils.benchmark.measure import Conditions, Throughput, measure_inference, measure_training
from utils.benchmark.tables import draw_bars, pixel_table, throughput_table
from utils.distributed.process import Process, wrap_ddp
from utils.logs.logger import logger
from utils.logs.recorder import append_records
from utils.speed.compile import compile_for_inference, effective_mode, resolve_mode, uses_graphs
from utils.training.build import build_ema, build_optimizer, build_precision, build_train_step
from utils.training.graphed_step import GraphedTrainStep

PLAIN_STEP = -1  # before MESA, even where it begins at step 0
MakeModel = Callable[[], nn.Module]
Prepare = Callable[[nn.Module, torch.dtype], nn.Module]


def run_benchmark(
    config: CfgNode,
    process: Process,
    folder: Path,
    *,
    make_model: MakeModel,
    prepare: Prepare,
    in_chans: int,
    derived: Any,
) -> None:
    """Measure the model and what it is compared with; print tables, append to throughput.jsonl, draw throughput.png.

    Training runs on all processes, inference on the first alone, which also writes.

    Args:
        config: the whole configuration; BENCHMARK.* says what is measured.
        make_model: the configured model with fresh weights, on the device.
        prepare: a copy of a model for fast inference in a dtype.
        in_chans: channels of the images.
        derived: see config.derive.
    """
    factories = {config.MODEL.NAME: make_model}
    for name in filter(None, config.BENCHMARK.BASELINES.split(",")):
        factories[name] = baseline_factory(name, config, process.device)
    rows = []
    if not (config.BENCHMARK.TRAIN or process.is_main):
        return
    for name, factory in factories.items():
        if config.BENCHMARK.TRAIN:
            rows += training_rows(config, process, name, factory, derived, in_chans)
        else:
            rows += inference_rows(config, process, name, factory, prepare, in_chans)
    if not process.is_main:
        return
    print(throughput_table(rows))
    sizes = [int(size) for size in config.BENCHMARK.SIZES.split(",") if size]
    by_size = size_rows(config, process, make_model, prepare, sizes, in_chans)
    if by_size:
        print(pixel_table(by_size))
    append_records(folder / "throughput.jsonl", [asdict(row) for row in (*rows, *by_size)])
    draw_bars(rows, folder / "throughput.png")
    logger.info("speeds are in %s: throughput.jsonl and throughput.png", folder)


def baseline_factory(name: str, config: CfgNode, device: torch.device) -> MakeModel:
    """Makes timm's model `timm:<name>`, in the run's memory layout; with its stochastic depth and image size, where the
    model has such.

    Raises:
        ValueError: timm has no such model.
    """
    model_name = name.removeprefix("timm:")
    if not timm.is_model(model_name):
        raise ValueError(f"BENCHMARK.BASELINES {name!r}: timm has no such model; timm.list_models() names them")

    def make() -> nn.Module:
        weights = timm.get_pretrained_cfg(model_name)
        size = {"img_size": config.DATA.IMG_SIZE} if weights is not None and weights.fixed_input_size else {}
        try:
            model = timm.create_model(model_name, drop_path_rate=config.MODEL.DROP_PATH_RATE, **size)
        except TypeError:  # it knows no stochastic depth
            model = timm.create_model(model_name, **size)
        return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    return make


def inference_model(config: CfgNode, device: torch.device, model: nn.Module, prepare: Prepare) -> nn.Module:
    """The model as TEST.COMPILE has it: prepared and compiled, or as it is for off."""
    mode = resolve_mode(config.TEST.COMPILE, device)
    if mode != "off":
        model = prepare(model, build_precision(config, device).dtype)
    return compile_for_inference(model, mode, device)


def inference_rows(
    config: CfgNode, process: Process, name: str, make_model: MakeModel, prepare: Prepare, in_chans: int
) -> list[Throughput]:
    """At the configured batch, and at batch 1."""
    conditions = conditions_of(config, process, config.TEST.COMPILE, in_chans)
    model = inference_model(config, process.device, make_model(), prepare)
    rows = []
    for batch_size in sorted({config.DATA.BATCH_SIZE, 1}, reverse=True):
        rows.append(
            measure_inference(model, conditions, name=name, batch_size=batch_size, image_size=config.DATA.IMG_SIZE)
        )
    return rows


def training_rows(
    config: CfgNode, process: Process, name: str, make_model: MakeModel, derived: Any, in_chans: int
) -> list[Throughput]:
    """The run's own step, on all processes together, and with AUG.MESA the same once the teacher has its say."""
    conditions = conditions_of(config, process, config.TRAIN.COMPILE, in_chans, num_processes=process.num_processes)
    model = make_model()
    num_classes = cast("int", model.num_classes)
    ema, optimizer = build_ema(config, model, derived), build_optimizer(config, model)
    model = wrap_ddp(model, process, find_unused_parameters=config.TRAIN.FIND_UNUSED_PARAMS)
    step = build_train_step(config, model, optimizer, ema, conditions.precision, derived)
    mode = effective_mode(conditions.compile, is_captured=isinstance(step, GraphedTrainStep))
    conditions = replace(conditions, compile=mode)
    works = {"training": PLAIN_STEP}
    if config.AUG.MESA and ema is not None:
        works["training, MESA"] = derived.mesa_start_epoch * derived.steps_per_epoch
    rows = []
    for work, number in works.items():
        rows.append(
            measure_training(
                step,
                conditions,
                name=name,
                batch_size=config.DATA.BATCH_SIZE,
                image_size=config.DATA.IMG_SIZE,
                num_classes=num_classes,
                step=number,
                work=work,
            )
        )
    return rows


def size_rows(
    config: CfgNode, process: Process, make_model: MakeModel, prepare: Prepare, sizes: list[int], in_chans: int
) -> list[Throughput]:
    """Inference at several image sizes; the batch shrinks with the image's area, so that the pixels are as many."""
    rows = []
    for size in sizes:
        batch_size = max(1, round(config.DATA.BATCH_SIZE * config.DATA.IMG_SIZE**2 / size**2))
        model = inference_model(config, process.device, make_model(), prepare)
        conditions = conditions_of(config, process, config.TEST.COMPILE, in_chans)
        rows.append(
            measure_inference(model, conditions, name=config.MODEL.NAME, batch_size=batch_size, image_size=size)
        )
    return rows


def conditions_of(config: CfgNode, process: Process, mode: str, in_chans: int, *, num_processes: int = 1) -> Conditions:
    """`mode` is TEST.COMPILE or TRAIN.COMPILE; whether a training step becomes a graph is known when it is built."""
    device = process.device
    mode = resolve_mode(mode, device)
    return Conditions(
        device,
        build_precision(config, device),
        effective_mode(mode, is_captured=uses_graphs(mode, device)),
        in_chans=in_chans,
        num_processes=num_processes,
    )
