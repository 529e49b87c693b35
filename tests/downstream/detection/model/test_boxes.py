import math

import pytest
import torch

from downstream.detection.model.boxes import (
    BOX_HEAD_STDS,
    MAX_LOG_RATIO,
    RPN_STDS,
    anchors_within,
    decode,
    encode,
    limits_of,
    make_anchors,
)
from tests.utils.speed.test_shape_graphs import DEVICES

ROOT2 = math.sqrt(2)


def test_anchors_by_hand() -> None:
    """Sides 8 strides times sqrt(2) and over it, centered on multiples of the stride; by row, column, ratio."""
    levels = make_anchors([(2, 3), (1, 2), (1, 1), (1, 1), (1, 1)], torch.device("cpu"))
    assert [len(level) for level in levels] == [18, 6, 3, 3, 3]
    half = 16.0  # of a square anchor at stride 4
    wide = [-half * ROOT2, -half / ROOT2, half * ROOT2, half / ROOT2]  # ratio 0.5
    square, tall = [-half, -half, half, half], [wide[1], wide[0], wide[3], wide[2]]
    torch.testing.assert_close(levels[0][:3], torch.tensor([wide, square, tall]))
    torch.testing.assert_close(levels[0][4], torch.tensor([4 - half, -half, 4 + half, half]))  # column 1
    torch.testing.assert_close(levels[0][16], torch.tensor([8 - half, 4 - half, 8 + half, 4 + half]))  # row 1, column 2
    torch.testing.assert_close(levels[1][4], torch.tensor([8.0 - 32, -32, 8 + 32, 32]))
    torch.testing.assert_close(levels[4][1], torch.tensor([-256.0, -256, 256, 256]))


@pytest.mark.parametrize("device", DEVICES)
def test_anchors_have_the_same_bits_on_all_devices(device: str) -> None:
    """Else anchors that tie for a ground truth on one device do not on another, and fewer or more are positive."""
    wide = make_anchors([(1, 1)] * 5, torch.device(device))[0][0].cpu()
    sides = wide.new_tensor([float.fromhex("0x1.6a09e6p+4"), float.fromhex("0x1.6a09e6p+3")])
    assert wide.equal(torch.cat((-sides, sides)))


def test_strides_do_not_depend_on_the_image_size() -> None:
    """A P6 map of an odd P5 (25 -> 13) still has stride 64, though 800 / 13 is less."""
    anchors = make_anchors([(200, 200), (100, 100), (50, 50), (25, 25), (13, 13)], torch.device("cpu"))[4]
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centers.max() == pytest.approx(12 * 64)
    torch.testing.assert_close(centers[3 * 13], torch.tensor([0.0, 64.0]))


def test_anchors_in_the_padding_of_the_batch_are_excluded() -> None:
    """An image of 64x33 in a batch of 64x128, against counting places by hand."""
    grids = [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]
    anchors = torch.cat(make_anchors(grids, torch.device("cpu")))
    within, all_within = anchors_within(anchors, [(64, 33), (64, 128)])
    parts = within.split([height * width * 3 for height, width in grids])
    per_level = [part.view(*grid, 3) for part, grid in zip(parts, grids, strict=True)]
    assert [int(level[:, :, 0].sum()) for level in per_level] == [16 * 9, 8 * 5, 4 * 3, 2 * 2, 1]
    assert per_level[0][:, :9].all()
    assert not per_level[0][:, 9:].any()
    assert all_within.all()


def random_boxes(count: int) -> torch.Tensor:
    corners, sides = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(0))
    return torch.cat((corners * 100, corners * 100 + 2 + sides * 80), dim=1)  # ratios of sides below the clamp, 62.5


@pytest.mark.parametrize("stds", [RPN_STDS, BOX_HEAD_STDS])
def test_decode_inverts_encode(stds: tuple[float, ...]) -> None:
    boxes, references = random_boxes(50), random_boxes(50).flip(0)
    torch.testing.assert_close(decode(references, encode(references, boxes, stds), stds), boxes, atol=1e-3, rtol=0)


def test_encoding_by_hand() -> None:
    """A 10x20 box at (5, 10) moves to 20x10 at (10, 15): half a width right, a quarter of a height down."""
    references, boxes = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[0.0, 10, 20, 20]])
    expected = torch.tensor([[0.5, 0.25, math.log(2), -math.log(2)]])
    torch.testing.assert_close(encode(references, boxes, RPN_STDS), expected)
    torch.testing.assert_close(encode(references, boxes, BOX_HEAD_STDS), expected / torch.tensor([0.1, 0.1, 0.2, 0.2]))


def test_sides_are_clamped_on_both_ends_and_boxes_to_the_image() -> None:
    reference = torch.tensor([[0.0, 0, 10, 10]])
    (large,) = decode(reference, torch.tensor([[0.0, 0, 99, 99]]), RPN_STDS)
    (small,) = decode(reference, torch.tensor([[0.0, 0, -99, -99]]), RPN_STDS)
    assert pytest.approx(4.135166556742356) == MAX_LOG_RATIO
    assert (large[2] - large[0]).item() == pytest.approx(625, rel=1e-5)
    assert (small[2] - small[0]).item() == pytest.approx(0.16, rel=1e-4)
    clipped = decode(reference, torch.tensor([[0.0, 0, 99, 99]]), RPN_STDS, limits_of([(30, 40)], reference.device))
    assert clipped.tolist() == [[0, 0, 40, 30]]
