"""The copy for inference, without kernels of Triton."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import prepare_for_inference
from models.kernels import inference
from models.kernels.inference import FoldedConv
from models.kernels.matmul import conv_relu
from models.layers import ConvLayer, Stem


@pytest.fixture
def stem() -> Stem:
    stem = Stem(3, 16).eval()
    for layer in stem.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return stem


def folded_layers(stem: Stem) -> list[str]:
    prepared = prepare_for_inference(stem, torch.float32)
    return [name for name, module in prepared.named_modules() if isinstance(module, FoldedConv)]


@pytest.mark.parametrize("with_cudnn", [False, True])
def test_folded_stem(stem: Stem, monkeypatch: pytest.MonkeyPatch, with_cudnn: bool) -> None:
    strides: list[int] = []

    def convolve(*args: Any) -> torch.Tensor:
        strides.append(args[-1])
        return conv_relu(*args)

    monkeypatch.setattr(inference, "conv_relu", convolve)
    monkeypatch.setattr(inference, "takes_conv_relu", lambda *_: with_cudnn)
    images = torch.randn(2, 3, 14, 16)
    with torch.no_grad():
        torch.testing.assert_close(prepare_for_inference(stem, torch.float32)(images), stem(images))
    assert strides == [1, 2] * with_cudnn


def test_layers_with_other_parts_stay_as_they_are(stem: Stem) -> None:
    assert folded_layers(stem) == ["conv2.0", "conv3.0", "conv3.1"]
    layer = stem.conv3[0]
    assert isinstance(layer, ConvLayer)
    layer.register_forward_hook(lambda *_: None)
    assert isinstance(stem.conv2[0], ConvLayer)
    stem.conv2[0].act = nn.GELU()
    assert folded_layers(stem) == ["conv3.1"]


@pytest.mark.parametrize("stride", [1, 2])
def test_operator(stride: int) -> None:
    on_gpu = torch.cuda.is_available()
    kind: Any = {"device": "cuda", "dtype": torch.float16} if on_gpu else {}
    images, weight, bias = torch.randn(2, 8, 5, 6, **kind), torch.randn(16, 8, 3, 3, **kind), torch.randn(16, **kind)
    expected = F.conv2d(images.float(), weight.float(), bias.float(), stride, padding=1).relu()
    tolerance = {"atol": 2e-2, "rtol": 2e-3} if on_gpu else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(conv_relu(images, weight, bias, stride).float(), expected, **tolerance)
    torch.library.opcheck(conv_relu, (images, weight, bias, stride), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "replaced"),
    [({}, True), ({"stride": 3}, False), ({"padding": 0}, False), ({"groups": 2}, False), ({"kernel_size": 5}, False)],
)
def test_settings_that_one_kernel_computes(change: dict[str, int], replaced: bool) -> None:
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3, "padding": 1, **change})
    assert FoldedConv.replaces(ConvLayer(conv, norm=False)) == replaced
