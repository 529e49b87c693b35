"""Loading and training together, from JPEG files: what `python -m data.benchmark --end-to-end` measures."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from data.prefetch import DeviceLoader

ROOT = Path(__file__).parents[1]
EPOCHS = 3  # the last is reported: the first compiles and starts workers

PLACES = (("cpu", "cpu"), ("gpu", "cpu"), ("gpu", "gpu"))  # of DATA.AUGMENT_ON and DATA.DECODE_ON
HEADS = [
    *("DATA.AUGMENT_ON", "DATA.DECODE_ON", "loading alone, images/s", "steps alone", "training", "evaluation"),
    *("waiting", "time of the workers"),
]


class Rates(NamedTuple):
    """Images per second, the share of an epoch in which the steps wait for data, and what takes the workers' time."""

    loading: float
    training: float
    evaluation: float
    waiting: float
    stages: str

    @property
    def step(self) -> float:
        """Images per second of the steps while they do not wait."""
        return self.training / (1 - self.waiting)


OpenLoader = Callable[[Sequence[str]], DeviceLoader]  # from keys and values to the training loader


def measure(folder: Path, opts: Sequence[str], open_loader: OpenLoader) -> Rates:
    """Load an epoch without training, and train EPOCHS epochs with main.py.

    Args:
        folder: images in train/<class>/ and val/<class>/.
        opts: further keys and values.
        open_loader: opens the loader that main.py has with the same settings.

    Raises:
        RuntimeError: the training failed; the message ends with what it printed.
    """
    # The compiled step of a long run, which "auto" does not choose for a short one.
    compiled = ["TRAIN.COMPILE", "reduce-overhead"] if torch.cuda.is_available() else []
    opts = [*compiled, *opts, "DATA.DATA_PATH", str(folder)]
    loader = open_loader(opts)
    loading, stages = loader_rate(loader), loader.stage_shares()
    del loader  # its workers end before the training
    with tempfile.TemporaryDirectory() as output:
        opts += ["TRAIN.EPOCHS", str(EPOCHS), "TRAIN.WARMUP_EPOCHS", "0", "MODEL.NAME", "run"]
        command = [sys.executable, "main.py", "--cfg", "cfgs/mlla_t.yaml", "--amp", "--output", output]
        done = subprocess.run([*command, "--opts", *opts], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(done.args)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
        last = json.loads((Path(output) / "run" / "default" / "speed.jsonl").read_text().splitlines()[-1])
    num_evaluated = 2 * sum(1 for _ in (folder / "val").glob("*/*"))  # by the model and its EMA
    waiting = last["data_wait_seconds"] / last["train_seconds"]
    return Rates(loading, last["images_per_second"], num_evaluated / last["eval_seconds"], waiting, stages)


def loader_rate(loader: DeviceLoader) -> float:
    """Return images per second of a loader alone, once its workers run."""
    for epoch in range(2):
        loader.set_epoch(epoch)
        start, num_images = time.perf_counter(), 0
        for images, _ in loader:
            num_images += len(images)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return num_images / (time.perf_counter() - start)


def rows(folder: Path, opts: Sequence[str], open_loader: OpenLoader) -> list[list[str]]:
    """Return the rows of the table, one for each choice of where images can be prepared on this machine."""
    table = []
    for augment, decode in PLACES if torch.cuda.is_available() else PLACES[:1]:
        places = ["DATA.AUGMENT_ON", augment, "DATA.DECODE_ON", decode]
        rates = measure(folder, [*opts, *places], open_loader)
        numbers = [f"{rate:.0f}" for rate in (rates.loading, rates.step, rates.training, rates.evaluation)]
        table.append([augment, decode, *numbers, f"{rates.waiting:.1%}", rates.stages])
    return table
