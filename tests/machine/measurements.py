"""Speed: training steps, the exchange of gradients, the start, and a run from JPEG files; each on GPUs alone."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.photographs import save_photographs
from tests.faults.runs import STEPS
from tests.machine.commands import new_caches, run, start
from tests.machine.exactness import WORKER
from tests.machine.jobs import Guard, Job, Results, Row

NAMES = {"t": "mlla_tiny", "s": "mlla_small", "b": "mlla_base"}
MODELS = {"t512": ("t", 512), "s64": ("s", 64), "b64": ("b", 64), "t128": ("t", 128)}  # with batch sizes per GPU
GOALS = {("t", 128): 97.0, ("t", 512): 98.5}  # scaling in per cent
COMPILE_SECONDS, MEASURE_SECONDS, START_SECONDS = 200, 240, 240
EPOCHS, STEPS_PER_EPOCH, BATCH_SIZE = 2, 30, 128  # of the run from files


def measure_command(model: str, batch_size: int, output: Path, *opts: str) -> list[str]:
    """Return main.py's arguments that time a model's training step."""
    command = ["main.py", "--cfg", f"cfgs/mlla_{model}.yaml", "--throughput", "--train", "--amp"]
    return [*command, "--batch-size", str(batch_size), "--output", str(output), *(["--opts", *opts] if opts else [])]


def compile_jobs(folder: Path, models: Sequence[str], num_gpus: int) -> list[Job]:
    """Return jobs that compile the models at the same time, so that the timed ones find that done."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]

    def compile_model(guard: Guard, model: str, batch_size: int, gpu: int) -> list[Row]:
        begin, output = time.monotonic(), folder / f"compile_{model}_{batch_size}"
        env = {"CUDA_VISIBLE_DEVICES": visible[gpu] if gpu < len(visible) else str(gpu)}
        command = measure_command(model, batch_size, output)
        run(guard, command, processes=1, output=output / "printed.txt", env=env)
        seconds = time.monotonic() - begin
        values = {"seconds": seconds}
        return [Row(f"{NAMES[model]}, batch {batch_size}, and two rows", 1, f"{seconds:.0f} s", values=values)]

    return [
        Job(
            "compile",
            f"{m} {b}",
            1,
            partial(compile_model, model=m, batch_size=b, gpu=i % num_gpus),
            COMPILE_SECONDS,
        )
        for i, (m, b) in enumerate(MODELS[name] for name in models)
    ]


def throughput_jobs(folder: Path, part: str, models: Sequence[str], counts: Sequence[int]) -> list[Job]:
    """Return jobs that time each model on every process by itself and on all together, by the numbers of processes."""

    def measure(guard: Guard, model: str, batch_size: int, processes: int) -> Iterator[Row]:
        output = folder / f"throughput_{model}_{batch_size}_{processes}_{time.time_ns()}"
        command, printed = measure_command(model, batch_size, output), output / "printed.txt"
        try:
            run(guard, command, processes=processes, output=printed)
        finally:  # what was measured before it failed counts
            yield from throughput_rows(model, batch_size, speeds_in(output))

    return [
        Job(
            part,
            f"{m} {b}",
            n,
            partial(measure, model=m, batch_size=b, processes=n),
            MEASURE_SECONDS,
            is_timed=True,
        )
        for n in counts
        for m, b in (MODELS[name] for name in models)
    ]


def speeds_in(output: Path) -> list[dict[str, Any]]:
    """Return the rows that --throughput has written to a folder."""
    return [json.loads(line) for path in output.glob("*/default/throughput.jsonl") for line in path.open()]


def throughput_rows(model: str, batch_size: int, speeds: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows = []
    for speed in speeds:
        scaling, goal = speed["scaling"], GOALS.get((model, batch_size))
        told = f"{speed['images_per_second']:,.0f} img/s, {speed['milliseconds_per_batch']:.2f} ms"
        what = f"{NAMES[model]}, batch {batch_size}, {speed['work']}, {speed['compile']}"
        if scaling is None:
            rows.append(Row(what, speed["processes"], told, values=speed))
            continue
        is_good = None if goal is None else scaling >= goal
        told += f", {scaling:.1f}% of {' + '.join(f'{alone:,.0f}' for alone in speed['alone'])}"
        rows.append(Row(what, speed["processes"], told, f"{goal}%" if goal else "", is_good, speed))
    return rows


def deterministic_jobs(folder: Path) -> list[Job]:
    """Return the job that compares a step with TRAIN.DETERMINISTIC to one without, both as graphs without compiling."""

    def compare(guard: Guard) -> list[Row]:
        seconds = {}
        for value in ("False", "True"):
            output = folder / f"deterministic_{value}_{time.time_ns()}"
            settings = ("TRAIN.COMPILE", "graphs", "TRAIN.DETERMINISTIC", value, "AUG.MESA", "0")
            command = measure_command("t", 128, output, *settings)
            run(guard, command, processes=1, output=output / "printed.txt")
            seconds[value] = speeds_in(output)[0]["milliseconds_per_batch"]
        cost = 100 * (seconds["True"] / seconds["False"] - 1)
        what, told = "TRAIN.DETERMINISTIC, mlla_tiny, batch 128, graphs", f"{seconds['False']:.2f} ms, with it"
        values = {"cost_percent": cost, "milliseconds": seconds}
        return [Row(what, 1, f"{told} {seconds['True']:.2f}: {cost:+.1f}%", "5% at most", cost <= 5, values)]

    return [Job("deterministic", "cost", 1, compare, MEASURE_SECONDS, True)]


def exchange_jobs(folder: Path, results: Results, processes: int) -> list[Job]:
    """Return the job that times the exchange of MLLA-T's gradients alone; its part of a step is known by throughput."""

    def measure(guard: Guard) -> list[Row]:
        output = folder / "exchange.json"
        run(guard, [WORKER, "exchange", str(output)], processes=processes, output=output.with_suffix(".txt"))
        return exchange_rows(json.loads(output.read_text()), list(results.values("throughput")), processes)

    return [Job("exchange", "mlla_tiny", processes, measure, 90, True)] if processes > 1 else []


def exchange_rows(measured: Mapping[str, Any], speeds: Sequence[Mapping[str, Any]], processes: int) -> list[Row]:
    """Return the rows from the exchange alone, and from the steps of one and of all processes."""
    rate = measured["exchange_gb_per_second"]
    told = f"{measured['exchange_ms']:.2f} ms, {rate:.0f} GB/s"
    what = f"gradients of mlla_tiny, {measured['megabytes']:.1f} MB in {measured['slices']} parts, by themselves"
    rows = [Row(what, processes, told, values=measured)]
    bandwidths = ", ".join(f"{name} MiB: {rate:.0f}" for name, rate in measured["bus_gb_per_second"].items())
    rows.append(Row("all-reduce, bus bandwidth in GB/s", processes, bandwidths))
    for batch_size, work in sorted({(s["batch"], s["work"]) for s in speeds if s["model"] == NAMES["t"]}):
        step = {
            s["processes"]: s["milliseconds_per_batch"]
            for s in speeds
            if (s["model"], s["batch"], s["work"]) == (NAMES["t"], batch_size, work)
        }
        if {1, processes} <= set(step):
            hidden = step[processes] - step[1]
            values = {"batch": batch_size, "work": work, "milliseconds": hidden}
            what = f"what a step of {processes} processes takes more than one, batch {batch_size}, {work}"
            rows.append(Row(what, processes, f"{hidden:.2f} ms of {step[processes]:.2f}", values=values))
    return rows


def image_folder(folder: Path, processes: int) -> Path:
    """Return a folder of JPEG files for STEPS_PER_EPOCH steps, which the first call makes."""
    path = folder / f"photographs_{processes}"
    if not path.exists():
        partial = path.with_suffix(f".{time.time_ns()}")
        save_photographs(partial, STEPS_PER_EPOCH * BATCH_SIZE * processes)
        partial.rename(path)
    return path


def training_command(data: Path, output: Path, *opts: str) -> list[str]:
    command = ["main.py", "--cfg", "cfgs/mlla_t.yaml", "--data-path", str(data), "--amp", "--output", str(output)]
    return [*command, "--opts", *opts]


def data_jobs(folder: Path, processes: int) -> list[Job]:
    """Return the job that trains from JPEG files, and reports how long the steps wait for them."""

    def measure(guard: Guard) -> list[Row]:
        output = folder / f"files_{time.time_ns()}"
        lengths = ("TRAIN.EPOCHS", str(EPOCHS), "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.COMPILE", "reduce-overhead")
        command = training_command(image_folder(folder, processes), output, *lengths)
        run(guard, command, processes=processes, output=output / "printed.txt")
        (path,) = output.glob("*/default/speed.jsonl")
        return waiting_rows([json.loads(line) for line in path.open()], processes)

    return [Job("data", "JPEG files", processes, measure, MEASURE_SECONDS, True)]


def waiting_rows(speeds: Sequence[Mapping[str, Any]], processes: int) -> list[Row]:
    """Return a row for each epoch of a run's speed.jsonl."""
    rows = []
    for speed in speeds:
        waiting = speed["data_wait_seconds"] / speed["train_seconds"]
        told = f"{speed['images_per_second']:,.0f} img/s, waits {waiting:.1%}"
        what = f"mlla_tiny, MESA, from JPEG files, epoch {speed['epoch'] + 1}, {speed['steps']} steps"
        rows.append(Row(what, processes, told, values={**speed, "waiting": waiting}))
    return rows


def startup_jobs(folder: Path, processes: int) -> list[Job]:
    """Return the job that starts a long run twice, at first without anything compiled before."""

    def measure(guard: Guard) -> Iterator[Row]:
        data, caches = image_folder(folder, processes), new_caches(folder / f"caches_{time.time_ns()}")
        for name, goal in (("cold caches", 30.0), ("second start", 10.0)):
            output = folder / f"start_{time.time_ns()}"
            log, begin = output / NAMES["t"] / "default" / "log_rank0.txt", time.monotonic()
            command = training_command(data, output, "PRINT_FREQ", "1")
            process = start(guard, command, processes=processes, output=output / "printed.txt", env=caches)
            guard.wait_for(partial(has_step, log), process, of="first step")
            seconds = time.monotonic() - begin
            process.terminate()
            process.wait()
            what = f"official command to its first step, {name}"
            yield Row(what, processes, f"{seconds:.1f} s", f"{goal:.0f} s", seconds <= goal, {"seconds": seconds})

    return [Job("startup", "official command", processes, measure, START_SECONDS, True)]


def has_step(log: Path) -> bool:
    """Return whether a run's log has a line of training."""
    return log.exists() and STEPS.search(log.read_text()) is not None
