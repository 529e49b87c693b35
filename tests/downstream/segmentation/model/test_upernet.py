import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.backbone import MLLABackbone
from downstream.segmentation.model.losses import pixel_cross_entropy, segmentation_loss
from downstream.segmentation.model.upernet import ResizeByMatmul, SegmentationLogits, UperNet, interpolate, resize
from tests.helpers import GOLDEN, MICRO, fill_weights, random_values
from tests.utils.speed.test_shape_graphs import DEVICES

WIDTHS = [32, 64, 128, 256]


def make_micro(num_classes: int = 150) -> UperNet:
    return UperNet(MLLABackbone(**MICRO), WIDTHS, num_classes)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "upernet_micro.npz"))


@pytest.fixture(scope="module")
def model() -> UperNet:
    model = make_micro()
    fill_weights(model)
    return model


@pytest.mark.slow
def test_golden_logits(model: UperNet, golden: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        logits = model.eval()(random_values(23, 1, 3, 130, 198))
    assert logits.shape == tuple(golden["shape"])
    np.testing.assert_allclose(logits.mean(dim=(2, 3)), golden["mean"], atol=1e-4)
    np.testing.assert_allclose(logits[..., :2, :2], golden["corner"], atol=1e-4)
    np.testing.assert_allclose(logits[..., -1, -1], golden["end"], atol=1e-4)
    assert np.array_equal(np.bincount(logits.argmax(dim=1).flatten(), minlength=150), golden["argmax_hist"])
    whole = resize(logits, golden["whole_shape"][2:])
    assert whole.shape == tuple(golden["whole_shape"])
    np.testing.assert_allclose(whole.mean(dim=(2, 3)), golden["whole_mean"], atol=1e-4)


@pytest.mark.slow
def test_golden_losses_and_gradients(model: UperNet, golden: dict[str, np.ndarray]) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout2d):
            module.eval()
    labels = torch.from_numpy(np.random.RandomState(41).randint(0, 160, (2, 1, 128, 192)))[:, 0]
    labels[labels >= 150] = 255
    loss = segmentation_loss(model(random_values(24, 2, 3, 128, 192)), labels)
    assert loss.decode.item() == pytest.approx(float(golden["loss/decode.loss_ce"]), rel=1e-5)
    assert loss.auxiliary.item() == pytest.approx(float(golden["loss/aux.loss_ce"]), rel=1e-5)
    loss.total.backward()
    expected = {name.removeprefix("gradnorm/"): float(v) for name, v in golden.items() if name.startswith("gradnorm/")}
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    assert norms == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_keys_and_parameters(model: UperNet, golden: dict[str, np.ndarray]) -> None:
    heads = [name for name in model.state_dict() if not name.startswith("backbone.")]
    assert sorted(heads) == sorted(golden["keys"].tolist())
    assert sum(p.numel() for p in model.parameters()) == int(golden["n_params"])


def test_published_base_has_1053_keys_and_128_million_parameters() -> None:
    with torch.device("meta"):
        backbone = MLLABackbone(embed_dim=96, depths=(3, 6, 21, 6), num_heads=(3, 6, 12, 24))
        model = UperNet(backbone, [96, 192, 384, 768], 150)
    num_rotary_tables = 3 + 6 + 21 + 6  # derived: in the published files, not in ours
    assert len(model.state_dict()) + num_rotary_tables == 1053
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(127.64, abs=0.005)


@pytest.mark.slow
def test_every_parameter_gets_a_gradient() -> None:
    model = make_micro(num_classes=7).train()
    labels = torch.randint(0, 7, (2, 64, 64))
    segmentation_loss(model(torch.randn(2, 3, 64, 64)), labels).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("training", [False, True])
def test_backward_hooks_on_every_module(training: bool) -> None:
    model = make_micro(num_classes=3).train(training)
    calls: set[str] = set()
    for name, module in model.named_modules():
        module.register_full_backward_hook(lambda *_, name=name: calls.add(name))
    outputs = model(random_values(0, 2, 3, 64, 96).requires_grad_())
    (outputs.decode if training else outputs).sum().backward()
    assert {"decode_head.fpn_bottleneck.bn", "backbone.patch_embed.conv1.norm"} <= calls


def test_without_auxiliary_head() -> None:
    model = UperNet(MLLABackbone(**MICRO), WIDTHS, 5, channels=16, auxiliary_channels=0)
    logits = model(torch.randn(2, 3, 40, 72))
    assert logits.auxiliary is None
    assert logits.decode.shape == (2, 5, 10, 18)
    assert model.eval()(torch.randn(1, 3, 37, 70)).shape == (1, 5, 37, 70)
    loss = segmentation_loss(logits, torch.zeros(2, 40, 72, dtype=torch.int64))
    assert loss.total == loss.decode


def slow_resize(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resizing by definition: pixel centers, coordinates clamped to the map."""
    out = torch.empty(*x.shape[:2], height, width, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * x.shape[2] / height - 0.5, 0), x.shape[2] - 1)
            z = min(max((j + 0.5) * x.shape[3] / width - 0.5, 0), x.shape[3] - 1)
            top, left = int(y), int(z)
            below, right = min(top + 1, x.shape[2] - 1), min(left + 1, x.shape[3] - 1)
            upper = x[..., top, left] * (1 - (z - left)) + x[..., top, right] * (z - left)
            lower = x[..., below, left] * (1 - (z - left)) + x[..., below, right] * (z - left)
            out[..., i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


@pytest.mark.parametrize("size", [(11, 5), (3, 14), (1, 1), (6, 7)])
def test_resize_against_its_definition(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(resize(x, size), slow_resize(x, *size))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(24, 28), (12, 7), (11, 5), (3, 14), (1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_resizing_by_matrix_products(
    size: tuple[int, int], memory_format: torch.memory_format, device: str
) -> None:
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=memory_format)
    expected = torch.autograd.grad((interpolate(x, size) * weight).sum(), x)
    moved = x.detach().to(device).requires_grad_()
    resized = ResizeByMatmul.apply(moved, size)
    assert torch.equal(resized, interpolate(moved, size))
    found = torch.autograd.grad((resized * weight.to(device)).sum(), moved)
    torch.testing.assert_close(found[0].cpu(), expected[0])
    in_place = resize(moved, size)
    assert (type(in_place.grad_fn).__name__ == "ResizeByMatmulBackward") is (device == "cuda")


def test_gradient_of_resizing_in_16_bits() -> None:
    """It is rounded twice; where the size is a power of 2 times as large, the shares themselves are exact."""
    x = torch.randn(1, 4, 8, 8)
    weight = torch.randn(1, 4, 32, 32).bfloat16()
    rounded = x.bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(ResizeByMatmul.apply(rounded, (32, 32)), rounded, weight)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(interpolate(x, (32, 32)), x, weight.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6)


def test_pyramid_pooling_against_its_definition() -> None:
    """Cell i of n along a side of L pixels is the mean from floor(i L / n) to ceil((i + 1) L / n)."""
    head = UperNet(MLLABackbone(**MICRO), WIDTHS, 5, channels=8).decode_head.double().eval()
    x = torch.randn(1, 256, 7, 10, dtype=torch.float64)
    parts = [x]
    for n, module in zip((1, 2, 3, 6), head.psp_modules, strict=True):
        cells = torch.empty(1, 256, n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                rows, columns = slice(i * 7 // n, -(-(i + 1) * 7 // n)), slice(j * 10 // n, -(-(j + 1) * 10 // n))
                cells[..., i, j] = x[..., rows, columns].mean(dim=(2, 3))
        unit = module[1]
        y = torch.einsum("oc,bchw->bohw", unit.conv.weight[:, :, 0, 0], cells)
        y = (y / (1 + unit.bn.eps) ** 0.5).clamp(min=0)  # fresh batch norm: mean 0, variance 1
        parts.append(slow_resize(y, 7, 10))
    torch.testing.assert_close(head.pool_pyramid(x), head.bottleneck(torch.cat(parts, dim=1)))


def test_cross_entropy_by_hand() -> None:
    """Two of four pixels are labeled; each costs log 3 where all three logits are equal."""
    logits = torch.zeros(1, 3, 2, 2)
    labels = torch.tensor([[[0, 2], [255, 255]]])
    assert pixel_cross_entropy(logits, labels).item() == pytest.approx(np.log(3) / 2)
    assert pixel_cross_entropy(logits, labels, average="labelled").item() == pytest.approx(np.log(3))
    nothing = torch.full((1, 2, 2), 255)
    for average in ("all", "labelled"):
        assert pixel_cross_entropy(logits, nothing, average=average).item() == 0


def test_loss_resizes_logits_to_the_labels() -> None:
    logits = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 9, 13))
    slow = F.cross_entropy(slow_resize(logits, 9, 13), labels)
    both = segmentation_loss(SegmentationLogits(logits, logits), labels, auxiliary_weight=0.25)
    assert both.decode.item() == pytest.approx(slow.item())
    assert both.total.item() == pytest.approx(1.25 * slow.item())


def test_loss_in_16_bits_is_computed_in_float32() -> None:
    logits = torch.randn(1, 4, 8, 8).to(torch.bfloat16)
    labels = torch.randint(0, 4, (1, 8, 8))
    assert pixel_cross_entropy(logits, labels).dtype == torch.float32
