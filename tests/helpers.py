"""Shared by several test files: golden numbers, small models, image folders, and running commands."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests' tensors are too small to share out

import contextlib
import io
import json
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.faults.processes import descendants, kill_all, start_process

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
MICRO = {"img_size": 64, "embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "drop_path_rate": 0.0}
THREE_DIGITS = ("DATA.CLASSES", "['0', '1', '2']")  # for --opts: a third of the digits' images


def random_array(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def random_values(seed: int, *shape: int) -> Tensor:
    """Return the golden files' inputs: NumPy's legacy standard normals, as float32."""
    return torch.from_numpy(random_array(seed, *shape))


@torch.no_grad()
def fill_weights(model: nn.Module) -> None:
    """Give a model the golden files' weights, which follow from the names and shapes in its state_dict."""
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = random_array(zlib.crc32(name.encode()) & 0x7FFFFFFF, *value.shape)
        if name.endswith("running_var"):
            noise = 1 + 0.1 * np.abs(noise)
        elif name.endswith(("running_mean", "bias")):
            noise = 0.1 * noise
        elif noise.ndim == 1:
            noise = 1 + 0.1 * noise
        else:
            noise = noise.astype(np.float64) / np.sqrt(np.prod(noise.shape[1:]))
        value.copy_(torch.from_numpy(noise.astype(np.float32)))


def make_image_folder(root: Path, *, train: int, val: int, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write JPEGs of random sizes, `train` and `val` images per class, each class with a color of its own."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(40, 90, size=2)
                pixels = rng.integers(0, 80, size=(height, width, 3), dtype=np.uint8)
                pixels[..., label % 3] += 150
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


def note_compiled_modules(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Let modules run eagerly after `compile`, and return the list that gets them."""
    compiled: list[nn.Module] = []

    def note(module: nn.Module, **_: Any) -> None:
        compiled.append(module)
        module._compiled_call_impl = module._call_impl

    monkeypatch.setattr(nn.Module, "compile", note)
    return compiled


def run_python(
    *args: str | Path, timeout: float = 300, forked: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run this Python with the given arguments in the project's folder, on the CPU, with one thread.

    After `timeout` seconds it is killed with all its descendants, since a launcher's workers would survive it. `forked`
    leaves out the imports, see `start_process`.
    """
    if forked:
        return run_fork(list(map(str, args)), timeout, environment)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, *map(str, args)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_fork(args: list[str], timeout: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python's arguments in a fork of a process that has imported everything."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, environment):
        output, error = (Path(folder) / name for name in ("output", "error"))
        process = start_process(args, output=output, error=error, forked=True)
        try:
            code = process.wait(timeout)
        except BaseException:
            kill_all(process)
            raise
        return subprocess.CompletedProcess(args, code, output.read_text(), error.read_text())


def exit_code(main: Callable[[list[str]], int], args: Iterable[Any]) -> int:
    """Return a command's exit code, which `main` may return or raise as SystemExit."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return int(stop.code or 0)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timed out after {seconds} s"
        time.sleep(0.05)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image with large shapes, edges and fine noise, like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, size=(5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    edges = (np.add.outer(np.arange(height) // 23, np.arange(width) // 31) % 2 * 60)[..., None]
    noise = rng.integers(-12, 13, size=(height, width, 3))
    return Image.fromarray(np.clip(smooth + edges + noise, 0, 255).astype(np.uint8))


def deep_gray(height: int = 40, width: int = 30) -> Image.Image:
    """Return a 16-bit ramp from black to white, whose mean is 127.5 in 8 bits."""
    return Image.fromarray(np.linspace(0, 65535, height * width).astype(np.uint16).reshape(height, width))


def encoded(image: Image.Image, kind: str = "JPEG", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def add_records(folder: Path, **records: Mapping[str, float]) -> None:
    """Add a line to files of a run's folder: metrics={...} to metrics.jsonl."""
    for name, record in records.items():
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
