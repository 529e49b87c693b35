"""The Triton kernels, in a process of their own: Triton decides when it is imported whether it interprets."""

from concurrent.futures import ThreadPoolExecutor
from subprocess import CompletedProcess

import pytest
import torch

from models import MLLA
from models.kernels import dispatch
from tests.helpers import run_python

triton = pytest.importorskip("triton")


def test_kernels_compute_what_plain_pytorch_does() -> None:
    """On the GPU, or by Triton's interpreter: float64, golden numbers, operators' registration, the trial.

    Two processes share the checks, as the interpreter is slow.
    """
    environment = {"CUDA_VISIBLE_DEVICES": "0"} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}

    def run(worker: str) -> CompletedProcess[str]:
        return run_python(f"tests/{worker}", timeout=290, **environment)

    with ThreadPoolExecutor() as threads:
        ends = list(threads.map(run, ("kernel_worker.py", "kernel_network_worker.py")))
    for done in ends:
        assert done.returncode == 0, done.stdout + done.stderr
    assert sum(done.stdout.count(" s\n") for done in ends) == 11


def test_plain_path_where_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.zeros(1, 4, 4, 32)
    said: list[str] = []
    monkeypatch.setattr(dispatch.logger, "info", lambda words, *parts: said.append(words % parts))
    dispatch.remember_and_say.cache_clear()
    assert not any(dispatch.takes("auto", tokens, "mixer", channels=32) for _ in range(3))
    assert not dispatch.takes("torch", tokens, "mixer", channels=32)
    assert said == ["plain PyTorch instead of Triton kernels: there is no Triton for the device cpu"]
    with pytest.raises(ValueError, match=r"MODEL\.KERNELS triton: there is no Triton for the device cpu; use auto"):
        dispatch.takes("triton", tokens, "mixer", channels=32)
    with pytest.raises(ValueError, match=r"MODEL\.KERNELS triton"):
        MLLA(img_size=32, embed_dim=16, depths=(1,), num_heads=(1,), kernels="triton")(torch.zeros(1, 3, 32, 32))


def test_what_the_kernels_do_not_know() -> None:
    def reason(dtype: torch.dtype = torch.float32, width: int = 64, **options: object) -> str:
        options = {"head_width": 32, "norm": None, **options}
        return dispatch.unsupported_reason(dtype, width, **options)  # type: ignore[arg-type]

    assert reason() == ""
    assert "float64" in reason(torch.float64)
    assert "heads of 24 channels" in reason(head_width=24)
    assert "1056 channels are more than 1024" in reason(width=1056, norm=torch.nn.LayerNorm(1056))
    assert "without weight" in reason(norm=torch.nn.LayerNorm(64, bias=False))
    assert "not BatchNorm2d" in reason(norm=torch.nn.BatchNorm2d(64))
