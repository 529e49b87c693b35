"""Measure images per second and core of this pipeline and of timm's on Pillow (the reference), by stage.

python -m data.benchmark [--workers 0 1 2] [--images 384] [--rounds 5] [--profile]
python -m data.benchmark --end-to-end [--batch-sizes 128 512] [--processes 1] [--opts KEY VALUE ...]

The images are scikit-learn's photographs, as JPEGs of 500x375 pixels and about 72 kB, which is typical of ImageNet.
Rounds of the pipelines alternate; results are medians over rounds. Stages are measured in CPU time, which depends
little on other work on the machine; whole loaders and reading in wall-clock time.

--end-to-end trains MLLA-T from such files instead, for a few seconds with images prepared by the CPU, and with
augmentation, and also decoding, on the GPU. It prints the speed of loading and of the steps, alone and together, and
the share of the time that the steps wait, and draws a chart. With your own images, run main.py: see data/README.md.
"""

import argparse
import cProfile
import io
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm
from yacs.config import CfgNode

from config import load_config
from data.augmentation import posterize
from data.build import eval_loader, train_loader
from data.dataset import ImageSource, seed_generators
from data.decoding import decode_fast, decode_pillow
from data.photographs import SIZE, save_photographs
from data.samplers import TrainSampler
from data.sources.image_folder import ImageFolder
from data.sources.zip_folder import ZipFolder
from utils.config.command_line import Parser, at_least

BATCH = 32
ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--workers", type=at_least(0), nargs="+", default=[0, 1, 2], help="numbers of loader workers")
    parser.add_argument("--images", type=at_least(1), help="images per round (384), or for training (100000)")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--profile", action="store_true", help="print the functions that take most CPU time")
    parser.add_argument("--end-to-end", action="store_true", help="train from the files, and measure waiting")
    whole = parser.add_argument_group("settings of --end-to-end")
    whole.add_argument("--batch-sizes", type=at_least(1), nargs="+", default=[128, 512], metavar="N")
    whole.add_argument("--processes", type=at_least(1), default=1, help="training processes, one per GPU")
    whole.add_argument("--eval-images", type=at_least(1), default=20_000, help="images of the evaluation")
    whole.add_argument("--output", default="output", help="folder of the results")
    whole.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="settings of the training")
    args = parser.parse_args(argv)
    if args.end_to_end:
        return run_end_to_end(args)
    args.images = args.images or 384
    torch.set_num_threads(1)  # as in a loader worker
    with tempfile.TemporaryDirectory() as folder:
        mean_bytes = save_photographs(Path(folder), args.images)
        print(f"{args.images} JPEGs, {SIZE[0]}x{SIZE[1]}, {mean_bytes / 1000:.0f} kB on average, to 224x224\n")
        config = load_config("cfgs/mlla_t.yaml", ["DATA.DATA_PATH", folder, "DATA.NUM_WORKERS", "0"])
        titled = {"training": training_pipelines(config), "evaluation": evaluation_pipelines(config)}
        for title, pipelines in titled.items():
            print(stage_table(title, pipelines, images=args.images, rounds=args.rounds))
        for title, pipelines in titled.items():
            print(worker_table(title, pipelines, workers=args.workers, rounds=args.rounds))
        print(reading_table(Path(folder), args.images, args.rounds))
        if args.profile:
            print(flat_profile(titled["training"]["this"], args.images))
    return 0


def run_end_to_end(args: argparse.Namespace) -> int:
    """Measure loading and training together in main.py, on images made for it. Returns its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        num_images = args.images or 100_000
        mean_bytes = save_photographs(Path(folder), num_images, args.eval_images)
        print(f"{num_images} JPEGs, {SIZE[0]}x{SIZE[1]}, {mean_bytes / 1000:.0f} kB, in the page cache", flush=True)
        command = ["main.py", "--cfg", "cfgs/mlla_t.yaml", "--amp", "--throughput", "--data-path", folder]
        command += ["--output", str(Path(args.output).resolve()), "--tag", "loading"]
        command += ["--opts", "BENCHMARK.LOADING", ",".join(map(str, args.batch_sizes)), *args.opts]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
        return subprocess.call([sys.executable, *(launcher if args.processes > 1 else []), *command], cwd=ROOT)


class Pipeline:
    """Named stages from an index to a sample, and a loader that does the same in workers."""

    def __init__(self, stages: Sequence[tuple[str, Callable[[Any], Any]]], loader: DataLoader[Any]) -> None:
        self.stages = stages
        self.loader = loader

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
                default_collate(samples)
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


class ReferenceDataset(Dataset[Any]):
    """Dataset of the official code: Pillow and timm's transforms to floats."""

    def __init__(self, source: ImageFolder, transform: Any) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(self.source.name(index)).convert("RGB")), int(self.source.labels[index])


def open_by_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def reference_pipeline(source: ImageFolder, names: Sequence[str], **settings: Any) -> Pipeline:
    transform = create_transform(224, interpolation="bicubic", **settings)
    for op in getattr(transform.transforms[2], "ops", []):
        if op.name.startswith("Posterize"):
            op.aug_fn = posterize  # timm's fails with Pillow 13
    stages = [("read", source.read), ("decode", open_by_pillow), *zip(names, transform.transforms, strict=True)]
    return Pipeline(stages, DataLoader(ReferenceDataset(source, transform)))


def training_pipelines(config: CfgNode) -> dict[str, Pipeline]:
    source = ImageFolder(config.DATA.DATA_PATH, "train")
    names = ("crop and resize", "flip", "augment", "to float", "normalize", "erase")
    settings = {"auto_augment": config.AUG.AUTO_AUGMENT, "re_prob": config.AUG.REPROB, "re_mode": config.AUG.REMODE}
    reference = reference_pipeline(source, names, is_training=True, **settings)
    loader = train_loader(config, source, 0, 1, torch.device("cpu")).loader
    transform: Any = loader.dataset.transform  # type: ignore[attr-defined]

    def seed(data: bytes) -> bytes:
        seed_generators(len(data), len(data), len(data))
        return data

    def draw_erasures(pixels: torch.Tensor) -> torch.Tensor:
        transform.draw_erasures()
        return pixels

    stages = [
        ("read", source.read),
        ("seed", seed),
        ("decode", decode_fast),
        ("crop and resize", transform.resized_crop),
    ]
    stages += [("flip", transform.flip), ("augment", transform.policy), ("erase", draw_erasures)]
    return {"reference": reference, "this": Pipeline(stages, loader)}


def evaluation_pipelines(config: CfgNode) -> dict[str, Pipeline]:
    source = ImageFolder(config.DATA.DATA_PATH, "val")
    names = ("crop and resize", "cut", "to float", "normalize")
    pipelines = {"reference": reference_pipeline(source, names, is_training=False, crop_pct=224 / 256)}
    for name, decode in (("exact", decode_pillow), ("fast", decode_fast)):
        changed = config.clone()
        changed.defrost()
        changed.DATA.EXACT_EVAL = name == "exact"
        loader = eval_loader(changed, source, 0, 1, torch.device("cpu")).loader
        resize = loader.dataset.transform  # type: ignore[attr-defined]
        stages = [("read", source.read), ("decode", decode), ("crop and resize", lambda image, f=resize: f(image)[0])]
        pipelines[name] = Pipeline(stages, loader)
    return pipelines


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


if __name__ == "__main__":
    sys.exit(main())
