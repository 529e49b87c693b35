"""Tables of `python -m data.benchmark`: CPU time by stage, whole loaders, reading, and a flat profile."""

import cProfile
import io
import os
import pstats
import statistics
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from data.dataset import ImageSource
from data.samplers import TrainSampler
from data.sources.image_folder import ImageFolder
from data.sources.zip_folder import ZipFolder

BATCH = 32


class Pipeline:
    """Named stages from an index to a sample, a function that collates them, and a loader that does it in workers."""

    def __init__(
        self,
        stages: Sequence[tuple[str, Callable[[Any], Any]]],
        loader: DataLoader[Any],
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self.stages = stages
        self.loader = loader
        self.collate = collate

    def seconds(self, count: int) -> dict[str, float]:
        """Measure the CPU seconds per image of each stage in this process, and of collating BATCH samples."""
        totals = dict.fromkeys([*(name for name, _ in self.stages), "collate"], 0.0)
        samples = []
        for index in range(count):
            value: Any = index
            for name, work in self.stages:
                start = time.thread_time()
                value = work(value)
                totals[name] += time.thread_time() - start
            samples.append(value)
            if len(samples) == BATCH:
                start = time.thread_time()
                self.collate(samples)
                totals["collate"] += time.thread_time() - start
                samples = []
        return {name: total / count for name, total in totals.items()}

    def images_per_second(self, workers: int) -> float:
        """Measure the loader with a number of workers, from the second batch on: the first waits for their start."""
        loader = DataLoader(
            self.loader.dataset,
            BATCH,
            sampler=self.loader.sampler,
            num_workers=workers,
            collate_fn=self.loader.collate_fn,
            drop_last=True,
        )
        batches = iter(loader)
        next(batches)
        start = time.perf_counter()
        count = sum(1 for _ in batches)
        return count * BATCH / (time.perf_counter() - start)


def stage_table(title: str, pipelines: Mapping[str, Pipeline], *, images: int, rounds: int) -> str:
    """Return a table of milliseconds per image by stage, and of images per second, on one core."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
    for _ in tqdm(range(rounds), f"{title}, stages", leave=False, disable=None):
        for name, pipeline in pipelines.items():
            measured[name].append(pipeline.seconds(images))
    stages = list(dict.fromkeys(stage for runs in measured.values() for stage in runs[0]))
    medians = {
        name: {stage: 1000 * statistics.median(run[stage] for run in runs) for stage in runs[0]}
        for name, runs in measured.items()
    }
    rows = [[stage, *(f"{of[stage]:.3f}" if stage in of else "" for of in medians.values())] for stage in stages]
    totals = {name: sum(of.values()) for name, of in medians.items()}
    rows.append(["total", *(f"{total:.3f}" for total in totals.values())])
    rows.append(["images/s/core", *(f"{1000 / total:.0f}" for total in totals.values())])
    rows.append(["ratio", *(f"{totals['reference'] / total:.2f}" for total in totals.values())])
    return table([f"{title}, ms per image", *pipelines], rows)


def worker_table(title: str, pipelines: Mapping[str, Pipeline], *, workers: Sequence[int], rounds: int) -> str:
    """Return a table of images per second of whole loaders by number of workers; 0 loads in the training process."""
    rates: dict[tuple[int, str], list[float]] = {(count, name): [] for count in workers for name in pipelines}
    for _ in tqdm(range(rounds), f"{title}, loaders", leave=False, disable=None):
        for count, name in rates:
            rates[count, name].append(pipelines[name].images_per_second(count))
    medians = {key: statistics.median(values) for key, values in rates.items()}
    rows = []
    for count in workers:
        of = {name: medians[count, name] for name in pipelines}
        rows.append([str(count), *(f"{rate:.0f} ({rate / of['reference']:.2f})" for rate in of.values())])
    return table([f"{title}, images/s by workers", *pipelines], rows)


def reading_table(root: Path, images: int, rounds: int) -> str:
    """Return a table of milliseconds to read an encoded image in random order, with a dropped and a warm page cache."""
    folder = ImageFolder(str(root), "train")
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        for index in range(images):
            archive.write(folder.name(index), folder.paths[index])
    (root / "train_map.txt").write_text("".join(f"{folder.paths[index]}\t0\n" for index in range(images)))
    zipped, cached = ZipFolder(str(root), "train"), ZipFolder(str(root), "train")
    cached.use_cache(0, 1)
    sources: dict[str, tuple[ImageSource, list[Path]]] = {
        "folder": (folder, [Path(folder.name(index)) for index in range(images)]),
        "zip": (zipped, [zipped.archive]),
        "zip, cached": (cached, []),
    }
    order = TrainSampler(images, rank=0, num_processes=1, seed=0).order(0).tolist()
    rows = []
    for name, (source, files) in sources.items():
        runs: dict[str, list[float]] = {"cold": [], "warm": []}
        for _ in range(rounds):
            drop_from_page_cache(files)
            for state in runs:
                start = time.perf_counter()
                for index in order:
                    source.read(index)
                runs[state].append((time.perf_counter() - start) / images)
        cold, warm = (f"{1000 * statistics.median(values):.3f}" for values in runs.values())
        rows.append([name, cold if files else "", warm])
    return table(["reading, ms per image", "cold page cache", "warm"], rows)


def drop_from_page_cache(files: Sequence[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flat_profile(pipeline: Pipeline, images: int) -> str:
    """Return the functions that take most CPU time, without what they call."""
    profiler = cProfile.Profile()
    profiler.runcall(pipeline.seconds, images)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(18)
    return text.getvalue()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *rows]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded) + "\n"
