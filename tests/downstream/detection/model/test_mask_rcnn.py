import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from downstream.backbone import MLLABackbone, TimmBackbone
from downstream.detection.data.dataset import Batch
from downstream.detection.model import mask_rcnn
from downstream.detection.model.boxes import limits_of
from downstream.detection.model.mask_rcnn import MaskRCNN
from downstream.detection.model.masks import paste_masks
from downstream.detection.model.roi_heads import MAX_DETECTIONS
from downstream.detection.model.structures import Frame, Target
from downstream.detection.synthetic import FixedDetections
from downstream.detection.task import Detection, DetectionLosses
from models import use_kernels
from tests.helpers import GOLDEN, MICRO, fill_weights, random_values
from tests.utils.speed.test_inference_graphs import simulate_inference
from tests.utils.speed.test_shape_graphs import DEVICES, simulate
from utils.speed.compile import RECORDING
from utils.speed.inference_graphs import InferenceGraphs
from utils.speed.shape_graphs import ShapeGraphs
from utils.speed.streams import on_side_stream

ALL = 10**9  # samplers that take every positive and negative


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "mask_rcnn_micro.npz"))


@pytest.fixture(scope="module")
def model() -> MaskRCNN:
    model = MaskRCNN(MLLABackbone(**MICRO))
    fill_weights(model)
    return model


def test_names_and_parameters(golden: dict[str, np.ndarray], model: MaskRCNN) -> None:
    own = {name for name in model.state_dict() if not name.startswith("backbone.")}
    assert own == set(golden["keys"])
    assert sum(p.numel() for p in model.parameters()) == golden["n_params"]


def test_the_official_files_load_strictly(golden: dict[str, np.ndarray]) -> None:
    """MLLA-T's: 563 keys, with the rotary tables that the official code stores."""
    with torch.device("meta"):
        model = MaskRCNN(MLLABackbone())
    weights = {name: value for name, value in model.state_dict().items() if name.startswith("backbone.")}
    tables = {f"{name.removesuffix('qk.weight')}rope.rotations" for name in weights if name.endswith("attn.qk.weight")}
    weights |= {name: model.state_dict()[name] for name in golden["keys"]}
    weights |= {name: torch.zeros(4, 4, 32, 2) for name in tables}
    assert len(weights) == 563
    model.load_state_dict(weights, strict=True, assign=True)


@pytest.mark.slow
def test_golden_detections(golden: dict[str, np.ndarray], model: MaskRCNN) -> None:
    model.eval()
    images, frames = random_values(21, 1, 3, 256, 384), [Frame((250, 380), (256, 384), (125, 190))]
    (found,) = model.detect(images, frames)
    np.testing.assert_allclose(found.boxes, golden["boxes"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(found.scores, golden["scores"], atol=1e-5, rtol=0)
    assert found.labels.tolist() == golden["labels"].tolist()
    masks = paste_masks(found.mask_probabilities, found.boxes, 125, 190)
    assert np.abs(masks.sum(dim=(1, 2)).numpy() - golden["mask_areas"]).max() <= 2
    first = np.unpackbits(golden["masks_first20"]).reshape(20, 125, 190)
    assert (masks[:20].numpy() != first).sum(axis=(1, 2)).max() <= 2
    with torch.no_grad():
        *maps, logits, deltas = model.features(images)
        proposals = model.rpn_head.propose(
            model.rpn_head.with_anchors(maps, logits, deltas), limits_of([frames[0].size], maps[0].device)
        )
    np.testing.assert_allclose(proposals.boxes[0, :50], golden["proposals"][:, :4], atol=1e-3, rtol=0)
    np.testing.assert_allclose(proposals.scores[0, :50], golden["proposals"][:, 4], atol=1e-5, rtol=0)


def ellipses(boxes: Tensor, height: int, width: int) -> Tensor:
    """Ellipses that fill boxes (G, 4), by pixel centers: (G, height, width) uint8."""
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(dim=1)
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    across, down = (2 * xs - x1 - x2) / (x2 - x1), (2 * ys - y1 - y2) / (y2 - y1)
    return (across**2 + down**2 <= 1).to(torch.uint8)


def training_batch(golden: dict[str, np.ndarray]) -> tuple[Tensor, list[Frame], list[Target]]:
    noise, images = random_values(22, 2, 3, 256, 320), torch.zeros(2, 3, 256, 320)
    images[0, :, :240], images[1, :, :, :210] = noise[0, :, :240], noise[1, :, :, :210]
    frames = [Frame((240, 320), (240, 320), (240, 320)), Frame((256, 210), (256, 224), (256, 210))]
    targets = []
    for i, frame in enumerate(frames):
        boxes = torch.from_numpy(golden[f"gt_boxes{i}"])
        targets.append(Target(boxes, torch.from_numpy(golden[f"gt_labels{i}"]), ellipses(boxes, *frame.padded)))
    return images, frames, targets


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_golden_losses_and_gradients(golden: dict[str, np.ndarray], device: str) -> None:
    """On a GPU from CUDA graphs, with kernels.

    Sums of large terms that nearly cancel, the gradients of queries and keys, move by 1% where activations do by 1e-5.
    """
    model = MaskRCNN(use_kernels(MLLABackbone(**MICRO))).train()
    fill_weights(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model.rpn_head.samples_per_image = model.roi_head.samples_per_image = ALL
    images, frames, targets = training_batch(golden)
    images, targets = images.to(device), [target.to(torch.device(device)) for target in targets]
    part = ShapeGraphs(model.to(device).features, model.feature_parameters(), num_calls=device == "cuda" and 10**6)
    on_stream = on_side_stream(images.device, RECORDING)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), on_stream:
        if device == "cuda":
            part(images)
        losses = model.losses(part(images), frames, targets)
        sum(losses.values()).backward()
    assert part.frequent.num_recorded == (device == "cuda")
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(golden[f"loss/{name}"].item(), rel=1e-5 if device == "cpu" else 1e-3), name
    for name, parameter in model.named_parameters():
        norm = golden[f"gradnorm/{name}"].item()
        tolerance = 1e-3 if device == "cpu" else 0.1 if ".qk." in name else 1e-2
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=tolerance), name


def small_detector() -> MaskRCNN:
    torch.manual_seed(0)
    return MaskRCNN(TimmBackbone("test_convnext"), num_classes=3, width=16, hidden=32)


def objects(count: int) -> Target:
    boxes = torch.tensor([[8.0 * i, 4.0, 8.0 * i + 30, 40.0] for i in range(count)]).reshape(-1, 4)
    return Target(boxes, torch.arange(count) % 3, ellipses(boxes, 64, 96))


@pytest.mark.parametrize("device", DEVICES)
def test_losses_from_recorded_features(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Equal, bit by bit, to those of the steps without graphs, for two shapes of images."""
    simulate(monkeypatch, device)
    batches = [
        Batch(torch.randn(2, 3, 64, side, device=device), [Frame((60, 60), (64, 64), (60, 60))] * 2, [], [])
        for side in (64, 96)
    ]
    results: list[list[Tensor]] = []
    for num_calls in (0, 10**6):
        losses_of = DetectionLosses(Detection(), CfgNode(), small_detector().to(device).train())
        losses_of.record_fixed_part(partial(ShapeGraphs, num_calls=num_calls))
        results.append([])
        for batch in batches * 2:
            torch.manual_seed(1)
            targets = [objects(count).to(torch.device(device)) for count in (4, 1)]
            losses_of.network.zero_grad()
            with on_side_stream(torch.device(device), RECORDING):
                losses = losses_of(batch._replace(targets=targets), 0)
                sum(losses.values()).backward()
            gradients = [p.grad.clone() for p in losses_of.network.parameters()]
            results[-1] += [*losses.values(), *(gradients if device == "cpu" else [])]  # GPUs add in any order
        assert losses_of.fixed_part.frequent.num_recorded == (2 if num_calls else 0)
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (4, 1)])
def test_images_without_objects(counts: tuple[int, int]) -> None:
    """Losses stay finite, and every parameter gets a gradient, as several processes need it."""
    model = small_detector().train()
    frames = [Frame((64, 96), (64, 96), (64, 96))] * 2
    losses = model(torch.randn(2, 3, 64, 96), frames, [objects(count) for count in counts])
    assert all(loss.isfinite() for loss in losses.values())
    has_objects = sum(counts) > 0
    assert (losses["loss_mask"] > 0) == (losses["loss_bbox"] > 0) == has_objects
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_batch_detects_as_single_images() -> None:
    """Images of one size; BatchNorm in evaluation mode. Empty places of the fuller image's batch count for nothing."""
    model = small_detector().eval()
    nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=0.3)
    images, frames = (
        torch.randn(2, 3, 64, 96),
        [Frame((60, 96), (64, 96), (30, 50)), Frame((64, 90), (64, 96), (64, 90))],
    )
    together = model.detect(images, frames)
    for i in range(2):
        (alone,) = model.detect(images[i : i + 1], frames[i : i + 1])
        assert len(alone.boxes) > 5
        for one, other in zip(alone, together[i], strict=True):
            torch.testing.assert_close(one.float(), other.float(), atol=1e-3, rtol=0)
        width, height = frames[i].original[1], frames[i].original[0]
        assert (alone.boxes >= 0).all()
        assert (alone.boxes <= torch.tensor([width, height, width, height]) + 1e-3).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("waits", [True, False])
def test_detections_with_graphs_equal_those_without(monkeypatch: pytest.MonkeyPatch, device: str, waits: bool) -> None:
    """For two sizes of images; graphs end before the suppression of proposals where it waits for the device.

    Of fewer detections than the mask head's graph has slots; also with a benchmark's, which are part of the graph.
    """
    simulate_inference(monkeypatch, device)
    monkeypatch.setattr(mask_rcnn, "waits_for_device", lambda *_: waits)
    model = small_detector().eval()
    nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=0.3)
    model.roi_head.bbox_head.fc_cls.bias.data[-1] = 4  # the background's
    model.rpn_head.kernels = model.roi_head.kernels = "torch" if waits else "auto"
    model = model.to(device)
    recorded, graphs = copy.deepcopy(model), []
    recorded.record_inference(lambda function: graphs.append(InferenceGraphs(function)) or graphs[-1])
    torch.manual_seed(0)
    for width in (96, 64) * 4:
        images, frame = torch.randn(1, 3, 64, width).to(device), Frame((60, 64), (64, 64), (30, 50))
        (expected,), (found,) = model.detect(images, [frame]), recorded.detect(images, [frame])
        assert 5 < len(expected.boxes) < MAX_DETECTIONS
        assert len(found.boxes) == len(expected.boxes)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert [own.frequent.num_recorded for own in graphs] == [2, 2]
    for detector in (model, recorded):
        detector.roi_head.bbox_head.fc_cls.register_forward_hook(FixedDetections(1, background=3))
    images, frame = torch.randn(1, 3, 96, 96).to(device), Frame((96, 96), (96, 96), (96, 96))
    for _ in range(3):
        (expected,), (found,) = model.detect(images, [frame]), recorded.detect(images, [frame])
        torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-4, rtol=1e-4)
    assert len(found.boxes) > 50
    assert [own.frequent.num_recorded for own in graphs] == [3, 3]


def test_nothing_found() -> None:
    model = small_detector().eval()
    nn.init.constant_(model.roi_head.bbox_head.fc_cls.bias, 0)
    model.roi_head.bbox_head.fc_cls.bias.data[-1] = 50  # all background
    (found,) = model.detect(torch.randn(1, 3, 64, 64), [Frame((64, 64), (64, 64), (64, 64))])
    assert [len(x) for x in found] == [0, 0, 0, 0]
    assert paste_masks(found.mask_probabilities, found.boxes, 64, 64).shape == (0, 64, 64)
