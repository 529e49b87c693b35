"""Results that must not depend on the number of processes: weights after some steps, and metrics of an evaluation."""

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.machine.commands import run
from tests.machine.jobs import Guard, Job, Row
from tests.machine.worker import NUM_CLASSES, STEPS

WORKER = "tests/machine/worker.py"
BATCH_SIZE = 16  # of each of the most processes
TOLERANCE = 1e-5
NUM_IMAGES = 10_001
SECONDS = 200


def exactness_jobs(folder: Path, counts: Sequence[int], *, dtypes: Sequence[str]) -> list[Job]:
    """Return jobs that compare the weights of each number of processes with those of the first one."""
    global_batch = BATCH_SIZE * max(counts)

    def compare(guard: Guard, dtype: str) -> Iterator[Row]:
        first: dict[str, Tensor] = {}
        for number in counts:
            result = folder / f"steps_{dtype}_{number}_of_{max(counts)}.json"
            weights = result.with_suffix(".pt")
            args = [WORKER, "steps", str(result), "--batch-size", str(global_batch), "--weights", str(weights)]
            run(guard, [*args, "--dtype", dtype], processes=number, output=result.with_suffix(".txt"))
            if not first:
                first = torch.load(weights)
                continue
            difference = largest_difference(first, torch.load(weights))
            graph = ", as a CUDA graph" if json.loads(result.read_text())["has_graph"] else ""
            yield Row(
                f"{STEPS} steps, {number} x {global_batch // number} against 1 x {global_batch}, {dtype}{graph}",
                number,
                f"weights differ by {difference:.1e}",
                f"{TOLERANCE:.0e} at most",
                difference <= TOLERANCE,
                {"difference": difference, "dtype": dtype},
            )

    if max(counts) == 1:
        return []
    return [
        Job("exactness", f"weights in {dtype}", max(counts), partial(compare, dtype=dtype), SECONDS) for dtype in dtypes
    ]


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a layer's weights, as L2 norms, relative to the layer's weights in `one`.

    A bias, which starts at zero, counts with its weight.
    """
    if one.keys() != other.keys():
        raise ValueError("weights of different models")
    squares: dict[str, list[float]] = {}
    for name, tensor in one.items():
        sums = squares.setdefault(name.rpartition(".")[0], [0.0, 0.0])
        sums[0] += float((tensor.double() - other[name].double()).square().sum())
        sums[1] += float(tensor.double().square().sum())
    return max(math.sqrt(difference / weights) if difference else 0.0 for difference, weights in squares.values())


def evaluation_jobs(folder: Path, counts: Sequence[int]) -> list[Job]:
    """Return the job that evaluates a model with each number of processes."""

    def compare(guard: Guard) -> list[Row]:
        data = folder / "idx"
        if not data.exists():
            write_idx(data)
        scores = {}
        for number in counts:
            result = folder / f"evaluation_{number}.json"
            args = [WORKER, "evaluation", str(result), "--data", str(data)]
            run(guard, args, processes=number, output=result.with_suffix(".txt"))
            scores[number] = json.loads(result.read_text())
        return evaluation_rows(scores)

    return [Job("evaluation", f"{NUM_IMAGES} images", max(counts), compare, SECONDS)]


def evaluation_rows(scores: Mapping[int, Mapping[str, float]]) -> list[Row]:
    """Return a row from the metrics by number of processes."""
    first = next(iter(scores.values()))
    exact = ("num_images", "acc1", "acc5")
    is_good = first["num_images"] == NUM_IMAGES and all(
        all(other[name] == first[name] for name in exact) and abs(other["loss"] / first["loss"] - 1) < 1e-6
        for other in scores.values()
    )
    spread = max(abs(other["loss"] / first["loss"] - 1) for other in scores.values())
    told = "; ".join(f"{n}: {s['num_images']:.0f}, {s['acc1']:.4f}, {s['acc5']:.4f}" for n, s in scores.items())
    return [
        Row(
            f"images, top-1 and top-5 with {', '.join(map(str, scores))} processes",
            max(scores),
            f"{told}; losses within {spread:.0e}",
            f"equal, of {NUM_IMAGES} images; losses within 1e-6",
            is_good,
            {"scores": {str(n): dict(s) for n, s in scores.items()}},
        )
    ]


def write_idx(folder: Path) -> None:
    """Write random images and labels of both splits in MNIST's file format, NUM_IMAGES for validation."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", 100), ("t10k", NUM_IMAGES)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % NUM_CLASSES).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())
