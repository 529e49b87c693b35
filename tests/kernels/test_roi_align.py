"""RoIAlign from several maps: values and gradients of torchvision's function; and the detector's choice of kernels."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from downstream.detection.model import kernel_dispatch, pooling
from downstream.detection.model.fpn import check_adding
from downstream.detection.model.kernel_dispatch import kernel_works, passes
from downstream.detection.model.masks import check_pasting
from downstream.detection.model.matching import check_matching
from downstream.detection.model.nms import check_suppressing
from downstream.detection.model.pooling import STRIDES, check_pooling, pool_regions, pool_with_torchvision

kernel = pytest.importorskip("downstream.detection.model.triton_roi_align", exc_type=ImportError)

# Empty, thin, beyond the image on each side, all of it, long, and of sides that are whole numbers of cells.
BOXES = [
    *([0, 0, 0, 0], [10, 10, 10, 40], [9, 5, 6, 6], [-30, -30, 200, 200], [100, 80, 140, 110], [0, 0, 128, 96]),
    *([3, 3, 127, 4], [-50, -50, -20, -20], [200, 200, 300, 300], [0, 0, 64, 32], [0, 7, 17.3, 32.0]),
]


def random_maps(channels: int, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, channels, 96 // s, 128 // s, device=device, requires_grad=True) for s in STRIDES]


@pytest.mark.parametrize(("channels", "grid"), [(5, 2), (260, 1)])
def test_values_and_gradients_are_those_of_torchvision(device: torch.device, channels: int, grid: int) -> None:
    maps = random_maps(channels, device)
    boxes = torch.tensor(BOXES, device=device)
    levels, images = (torch.arange(len(boxes), device=device) // n % m for n, m in ((2, 4), (1, 2)))
    found, expected = (
        pool(maps, boxes, images, levels, grid) for pool in (kernel.pool_with_kernel, pool_with_torchvision)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(pooled, maps, upstream) for pooled in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    assert kernel.pool_with_kernel(maps, boxes[:0], images[:0], levels[:0], grid).shape == (0, channels, grid, grid)


def test_regions_are_pooled_by_the_kernel_in_the_maps_dtype(device: torch.device) -> None:
    maps = [x.detach().bfloat16() for x in random_maps(8, device)]
    boxes = torch.tensor([[0, 0, 30, 30], [0, 0, 120, 96.0]], device=device)
    images = torch.arange(2, device=device)
    found = pool_regions(maps, boxes, images, 2, kernels="triton")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.float(), pool_regions([x.float() for x in maps], boxes, images, 2), atol=0.02, rtol=0.02
    )


@pytest.mark.parametrize(
    ("check", "module", "name", "wrong"),
    [
        (
            check_pooling,
            "triton_roi_align",
            "pool_with_kernel",
            lambda *args, right=kernel.pool_with_kernel: 1.1 * right(*args),
        ),
        (check_adding, "triton_fpn", "add_upsampled_with_kernel", lambda fine, coarse: fine + 0 * coarse.sum()),
        (check_pasting, "triton_masks", "paste_with_kernel", lambda _, boxes, *size: boxes.new_ones(4, *size) > 0),
        (check_matching, "triton_matching", "match_with_kernels", lambda _, is_valid, *__: is_valid.long()),
        (check_suppressing, "triton_nms", "suppress_with_kernel", lambda boxes, *_: torch.ones_like(boxes[..., 0]) > 0),
    ],
)
def test_a_kernel_that_fails_its_check_falls_back_with_one_line(
    check: Callable[[torch.device], Tensor],
    module: str,
    name: str,
    wrong: Callable[..., Tensor],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mlla")
    passes.cache_clear()
    x = torch.zeros(1, device=device)
    assert kernel_works("auto", x, check)
    passes.cache_clear()
    monkeypatch.setattr(f"downstream.detection.model.{module}.{name}", wrong)
    assert [kernel_works("auto", x, check) for _ in range(2)] == [False, False]
    assert kernel_works("triton", x, check)
    assert not kernel_works("torch", x, check)
    passes.cache_clear()
    (line,) = [line for line in caplog.messages if "values differ" in line]
    assert line.startswith("Triton kernels: falls back to eager PyTorch: ")


@pytest.mark.parametrize("name", kernel_dispatch.KERNELS)
@pytest.mark.parametrize("error", ["", "no compiler"])
def test_verdicts_from_other_processes_count(name: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_dispatch, "failure", lambda check, _: f"{check.__name__} was called")
    kernel, gpu = name.partition(":")[2], torch.device("cuda", 98)  # no other test asks about it
    passes.cache_clear()
    kernel_dispatch.set_verdict(kernel, gpu, error)
    assert kernel_dispatch.find_error(kernel, gpu) == f"check_{kernel} was called"
    assert passes(kernel_dispatch.check_of(kernel), gpu) == (error == "")
    passes.cache_clear()


def test_deterministic_algorithms_leave_the_sums_to_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "kernel_works", lambda *_: pytest.fail("the kernel adds in any order"))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    maps = [torch.ones(1, 2, 32 // s, 32 // s) for s in STRIDES]
    assert pool_regions(maps, torch.tensor([[0, 0, 8.0, 8]]), torch.tensor([0]), 2, kernels="auto").allclose(
        torch.ones(1)
    )
