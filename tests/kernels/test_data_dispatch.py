"""Checks of the kernels for batches of images before they are used."""

import pytest
import torch

from data import augmentation_kernels, crop_kernels
from data.kernel_dispatch import check_augmenting, check_erasing, check_resizing, failure, kernel_works

CHECKS = [
    (check_augmenting, augmentation_kernels, "augment_with_kernels"),
    (check_resizing, crop_kernels, "resize_with_kernel"),
    (check_erasing, crop_kernels, "erase_with_kernel"),
]


@pytest.mark.parametrize(("check", "module", "name"), CHECKS)
def test_kernels_pass_their_checks_and_broken_ones_do_not(
    check: object, module: object, name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failure(check, device) == ""
    wrong = {"augment_with_kernels": lambda images, _: images, "erase_with_kernel": lambda *_: None}
    wrong["resize_with_kernel"] = lambda _, crops, device: torch.zeros(len(crops), 16, 16, 3, device=device)
    monkeypatch.setattr(module, name, wrong[name])
    assert "values differ" in failure(check, device)


def test_a_kernel_that_does_not_run_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def check_resizing(_: torch.device) -> torch.Tensor:
        raise RuntimeError("no C\ncompiler")

    for _ in range(2):
        assert not kernel_works(check_resizing, torch.device("cuda"))
    message = "resizing images on the GPU falls back to PyTorch, which is slower: Triton's kernel: no C compiler"
    assert caplog.messages == [message]
    assert not kernel_works(check_augmenting, torch.device("cpu"))
