from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from downstream.segmentation.model.sync_norm import CpuSyncBatchNorm, synchronize_norms
from downstream.segmentation.task import Segmentation
from tests.downstream.segmentation.segmentation_worker import make_data, run, small_config
from tests.helpers import run_python
from utils.distributed.process import Process
from utils.training.run import prepare_model

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "shapes", val=5)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(Process(0, 1, CPU), data, tmp_path_factory.mktemp("alone"), batch_size=2)


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each trains on a single image a step; of the five validation images one has three, the other two."""
    out = tmp_path_factory.mktemp("two") / "out.pt"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_python(*words, "tests/downstream/segmentation/segmentation_worker.py", out, data, "1", forked=True)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def test_two_processes_train_as_one(alone: dict[str, Any], two: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """Batch norm in the heads included, which sees all images of a step."""
    assert two["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    for name, value in alone["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], value, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert len(set(two["digests"])) == 1
    model = prepare_model(Segmentation(), small_config(data, tmp_path), Process(0, 1, CPU), 6)
    fresh = model.state_dict()
    assert (fresh["decode_head.conv_seg.weight"] - alone["weights"]["decode_head.conv_seg.weight"]).abs().max() > 1e-3


def test_evaluation_is_exact_for_uneven_shares(alone: dict[str, Any], two: dict[str, Any]) -> None:
    for name, value in alone["scores"].items():
        assert two["scores"][name] == pytest.approx(value, nan_ok=True, rel=1e-12), name
    assert alone["scores"]["num_pixels"] == 5 * 48 * 48


def test_one_process_keeps_plain_norms() -> None:
    head = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert type(synchronize_norms(head, Process(0, 1, CPU))[1]) is nn.BatchNorm2d
    keys = list(head.state_dict())
    head = synchronize_norms(head, Process(1, 2, CPU))
    assert type(head[1]) is CpuSyncBatchNorm
    assert list(head.state_dict()) == keys


def test_gpus_get_their_own_kind() -> None:
    head = synchronize_norms(nn.Sequential(nn.BatchNorm2d(4)), Process(0, 2, torch.device("cuda", 0)))
    assert type(head[0]) is nn.SyncBatchNorm


def test_plain_twin_equals_batch_norm_without_others(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        twin, plain = CpuSyncBatchNorm(5), nn.BatchNorm2d(5)
        x = torch.randn(3, 5, 4, 6, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        with torch.no_grad():
            for norm in (twin, plain):
                norm.weight.copy_(torch.arange(1.0, 6.0))
        ours, theirs = twin(x), plain(y)
        torch.testing.assert_close(ours, theirs)
        (ours.square() * 0.5 + ours.sin()).sum().backward()
        (theirs.square() * 0.5 + theirs.sin()).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(twin.state_dict()[name], value)
        torch.testing.assert_close(twin.eval()(x), plain.eval()(x))
    finally:
        torch.distributed.destroy_process_group()
