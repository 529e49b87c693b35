"""Checks of the kernels for batches of images before they are used."""

import pytest
import torch

from data import augmentation_kernels, crop_kernels, kernel_dispatch
from data.batch_augmentation import IDENTITY, Kind
from data.batch_crops import whole_crop
from data.kernel_dispatch import (
    augment_on_device,
    check_augmenting,
    check_erasing,
    check_exactly_resizing,
    check_resizing,
    erase_on_gpu,
    failure,
    find_error,
    kernel_works,
    resize_on_device,
    set_verdict,
)

CHECKS = [
    (check_augmenting, augmentation_kernels, "augment_with_kernels"),
    (check_resizing, crop_kernels, "resize_with_kernel"),
    (check_erasing, crop_kernels, "erase_with_kernel"),
    (check_exactly_resizing, crop_kernels, "resize_exactly"),
]


@pytest.mark.parametrize(("check", "module", "name"), CHECKS)
def test_kernels_pass_their_checks_and_broken_ones_do_not(
    check: object, module: object, name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failure(check, device) == ""
    wrong = {"augment_with_kernels": lambda images, _: images, "erase_with_kernel": lambda *_: None}
    wrong["resize_with_kernel"] = lambda _, crops, device: torch.zeros(len(crops), 16, 16, 3, device=device)
    wrong["resize_exactly"] = lambda _, crops, device: torch.zeros(len(crops), 24, 24, 3, device=device)
    monkeypatch.setattr(module, name, wrong[name])
    assert "values differ" in failure(check, device)


def test_a_verdict_from_another_process_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel_dispatch, "VERDICTS", {})
    monkeypatch.setattr(kernel_dispatch, "failure", lambda *_: "tested here")
    gpu = torch.device("cuda", 99)  # no other test asks about it
    for name, error in (("resizing", ""), ("erasing", "no compiler")):
        set_verdict(name, gpu, error)
        assert find_error(name, gpu) == "tested here"
    assert (kernel_works(check_resizing, gpu), kernel_works(check_erasing, gpu)) == (True, False)
    assert [message.partition(" ")[0] for message in caplog.messages] == ["erasing"]


def test_a_kernel_that_does_not_run_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def check_resizing(_: torch.device) -> torch.Tensor:
        raise RuntimeError("no C\ncompiler")

    for _ in range(2):
        assert not kernel_works(check_resizing, torch.device("cuda"))
    message = "resizing images on the GPU falls back to PyTorch, which is slower: Triton's kernel: no C compiler"
    assert caplog.messages == [message]
    assert not kernel_works(check_augmenting, torch.device("cpu"))


def test_a_batch_takes_the_kernels_that_work(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(kernel_dispatch, "kernel_works", lambda check, _: used.append(check) is None)
    pixels = kernel_dispatch.random_bytes(2, 8, 8, 3)
    crops = torch.tensor([whole_crop(image) for image in pixels])
    images = resize_on_device(pixels.flatten(), crops, device)
    assert images.cpu().equal(pixels)
    no_operations = torch.empty(0, 10, dtype=torch.float64)
    assert augment_on_device(images, no_operations) is images
    inverted = augment_on_device(images, torch.tensor([[1, 0, Kind.INVERT, 0, *IDENTITY]], dtype=torch.float64))
    assert inverted.cpu().equal(torch.stack([pixels[0], 255 - pixels[1]]))
    values = torch.ones(2, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    boxes = torch.tensor([[0, 0, 0, 4, 4, 1], [0, 2, 2, 4, 4, 2]])
    assert not erase_on_gpu(values, boxes[:0], "const")
    assert erase_on_gpu(values, boxes, "const")
    assert values.sum() == values.numel() - 3 * (2 * 16 - 4)
    assert used == [check_resizing, check_augmenting, check_erasing]


def test_a_box_has_the_same_noise_beside_others_that_overlap(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_dispatch, "kernel_works", lambda *_: True)
    empty = torch.zeros(2, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    together, alone = empty.clone(), empty.clone()
    boxes = torch.tensor([[0, 0, 0, 4, 4, 1], [0, 2, 2, 4, 4, 2]])
    assert erase_on_gpu(together, boxes, "pixel")
    assert erase_on_gpu(alone, boxes[1:], "pixel")
    assert together[0, :, 2:6, 2:6].equal(alone[0, :, 2:6, 2:6])  # the later box lies above
    assert alone.any()
