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
import copy
import io
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from yacs.config import CfgNode

from config import load_config
from data.augmentation import posterize
from data.batch_crops import pack_bytes
from data.batch_decoding import device_jpeg
from data.benchmark_tables import BATCH, Pipeline, flat_profile, reading_table, stage_table, worker_table
from data.build import eval_loader, train_loader, train_transform
from data.dataset import ImageDataset, keep_batch, seed_generators
from data.decoding import decode_fast, decode_pillow
from data.photographs import SIZE, save_photographs
from data.sources.image_folder import ImageFolder
from utils.config.command_line import Parser, at_least

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
    if args.images < 3 * BATCH:
        parser.error(
            f"--images {args.images}: the loaders are measured from their second batch on; at least {3 * BATCH}"
        )
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
            for name in ("this", "AUGMENT_ON gpu"):
                print(name, flat_profile(titled["training"][name], args.images))
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
    pipelines = {"reference": reference, "this": Pipeline(training_stages(source, transform, transform.policy), loader)}
    transform = train_transform(config, torch.device("cuda"))  # what it leaves to a GPU needs none here
    loaders = {
        share: DataLoader(
            ImageDataset(source, transform, config.SEED, device_share=share),
            sampler=loader.sampler,
            collate_fn=keep_batch,
        )
        for share in (0.0, 1.0)
    }
    stages = training_stages(source, transform, lambda pixels: (transform.recorded_policy(224, 224), pixels)[1])
    pipelines["AUGMENT_ON gpu"] = Pipeline(stages, loaders[0.0])
    stages = [*stages[:2], ("decode", device_jpeg), ("crop and resize", lambda jpeg: transform(jpeg).pixels)]
    pipelines["DECODE_ON gpu"] = Pipeline(stages, loaders[1.0], pack_bytes)
    return pipelines


def training_stages(
    source: ImageFolder, transform: Any, augment: Callable[[torch.Tensor], torch.Tensor]
) -> list[tuple[str, Callable[[Any], Any]]]:
    """Return the stages of this pipeline for images that a worker decodes."""
    numbers = itertools.count()  # other draws for each image, as in training

    def seed(data: bytes) -> bytes:
        number = next(numbers)
        seed_generators(number, number, number)
        return data

    def draw_erasures(pixels: torch.Tensor) -> torch.Tensor:
        transform.draw_erasures()
        return pixels

    return [
        ("read", source.read),
        ("seed", seed),
        ("decode", decode_fast),
        ("crop and resize", transform.resized_crop),
        ("flip", transform.flip),
        ("augment", augment),
        ("erase", draw_erasures),
    ]


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
        if name == "exact":
            on_gpu: Any = copy.copy(loader.dataset)
            on_gpu.transform = copy.copy(resize)
            on_gpu.transform.on_device = True
            stages = [*stages[:2], ("crop and resize", lambda image, f=on_gpu.transform: f(image).pixels)]
            changed_loader: DataLoader[Any] = DataLoader(on_gpu, sampler=loader.sampler, collate_fn=keep_batch)
            pipelines["exact, resized on the GPU"] = Pipeline(stages, changed_loader, pack_bytes)
    return pipelines


if __name__ == "__main__":
    sys.exit(main())
