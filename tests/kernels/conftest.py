"""The device of the kernel tests: a GPU, or a CPU with Triton's interpreter, chosen before Triton is imported."""

import os
from collections.abc import Iterator

import pytest
import torch

from models.kernels import dispatch


@pytest.fixture(scope="session", autouse=True)
def verdicts_of_these_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the verdicts of the self-test apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _without_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run of an earlier test counts as having tested its kernels."""
    monkeypatch.setattr(dispatch, "SET_UP", set())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU, with exact float32 convolutions, or the CPU that plays one through the interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr(dispatch, "missing_triton", lambda device_type: "")  # noqa: ARG005
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in an environment of its own: make test-kernels")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device("cuda")


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels whose self-test counts as passed, where running it is not the point."""
    monkeypatch.setattr(dispatch, "self_test_verdict", lambda *_: "")


@pytest.fixture
def replaceable_launches(device: torch.device) -> None:
    """Skip with the interpreter of Triton 3.2, whose kernels don't launch through a method of their class."""
    from triton.runtime.interpreter import InterpretedFunction

    if device.type == "cpu" and not hasattr(InterpretedFunction, "run"):
        pytest.skip("this Triton's interpreter has no method that launches")
