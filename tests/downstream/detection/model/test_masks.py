import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.detection.model import masks
from downstream.detection.model.masks import MASK_SIZE, mask_targets, paste_masks


def interpolated(picture: Tensor, y: float, x: float) -> float:
    """Bilinear value between the centers of a picture's cells, with zeros around it; y and x in cells."""
    padded = F.pad(picture, (1, 1, 1, 1))
    y, x = y + 0.5, x + 0.5  # cell centers at whole numbers, the border included
    if not (0 <= y < len(padded) - 1 and 0 <= x < len(padded) - 1):
        return 0.0
    top, left = int(y), int(x)
    patch = padded[top : top + 2, left : left + 2]
    rows = patch[0] * (1 - (y - top)) + patch[1] * (y - top)
    return float(rows[0] * (1 - (x - left)) + rows[1] * (x - left))


def slow_paste(probabilities: Tensor, box: list[float], height: int, width: int) -> Tensor:
    x1, y1, x2, y2 = box
    pasted = torch.zeros(height, width)
    for row in range(height):
        for column in range(width):
            y, x = (row + 0.5 - y1) / (y2 - y1) * MASK_SIZE, (column + 0.5 - x1) / (x2 - x1) * MASK_SIZE
            pasted[row, column] = interpolated(probabilities, y, x)
    return pasted


BOXES = torch.tensor([[3.2, 4.7, 20.9, 15.8], [0.0, 0.0, 30.0, 24.0], [25.5, 20.5, 30.0, 24.0], [7.0, 7.0, 7.4, 7.3]])


@pytest.mark.parametrize("chunk_pixels", [1, 2**26])
def test_pasting_matches_a_loop_over_pixels(monkeypatch: pytest.MonkeyPatch, chunk_pixels: int) -> None:
    monkeypatch.setattr(masks, "CHUNK_PIXELS", chunk_pixels)
    probabilities = torch.rand(4, MASK_SIZE, MASK_SIZE, generator=torch.Generator().manual_seed(0))
    pasted = paste_masks(probabilities, BOXES, 24, 30)
    for own, mask, box in zip(probabilities, pasted, BOXES.tolist(), strict=True):
        slow = slow_paste(own, box, 24, 30)
        is_clear = (slow - 0.5).abs() > 1e-4
        assert torch.equal(mask[is_clear], slow[is_clear] >= 0.5)
    assert pasted[:3].any(dim=(1, 2)).all()


def test_pasting_into_the_box_matches_the_whole_image() -> None:
    """Paste all masks over the whole image at once, as on a GPU, here on the CPU."""
    probabilities = torch.rand(4, MASK_SIZE, MASK_SIZE) ** 0.3
    regions = paste_masks(probabilities, BOXES, 24, 30)
    whole = torch.zeros_like(regions)
    for i, (x1, y1, x2, y2) in enumerate(BOXES.tolist()):
        xs = (torch.arange(30) + 0.5 - x1) / (x2 - x1) * 2 - 1
        ys = (torch.arange(24) + 0.5 - y1) / (y2 - y1) * 2 - 1
        grid = torch.stack((xs.expand(24, 30), ys[:, None].expand(24, 30)), dim=-1)[None]
        whole[i] = F.grid_sample(probabilities[i][None, None], grid, align_corners=False)[0, 0] >= 0.5
    assert (regions != whole).sum() <= 2


def test_a_box_without_area_has_an_empty_mask() -> None:
    boxes = torch.tensor([[5.5, 5.0, 5.5, 9.0], [5.0, 5.0, 9.0, 9.0]])
    pasted = paste_masks(torch.ones(2, MASK_SIZE, MASK_SIZE), boxes, 12, 12)
    assert pasted.sum(dim=(1, 2)).tolist() == [0, 16]


def slow_target(mask: Tensor, box: list[float]) -> Tensor:
    """The mean of each cell's samples, as many as it has pixels along each side, cut at a half."""
    x1, y1, x2, y2 = box
    cell_h, cell_w = (y2 - y1) / MASK_SIZE, (x2 - x1) / MASK_SIZE
    samples_y, samples_x = -int(-cell_h // 1), -int(-cell_w // 1)
    height, width = mask.shape
    target = torch.zeros(MASK_SIZE, MASK_SIZE)
    for row in range(MASK_SIZE):
        for column in range(MASK_SIZE):
            total = 0.0
            for i in range(samples_y):
                for j in range(samples_x):
                    y = y1 - 0.5 + cell_h * (row + (i + 0.5) / samples_y)
                    x = x1 - 0.5 + cell_w * (column + (j + 0.5) / samples_x)
                    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
                    top, left = min(int(y), height - 2), min(int(x), width - 2)
                    patch = mask[top : top + 2, left : left + 2]
                    line = patch[0] * (1 - (y - top)) + patch[1] * (y - top)
                    total += float(line[0] * (1 - (x - left)) + line[1] * (x - left))
            target[row, column] = total / (samples_y * samples_x)
    return target


def test_mask_targets_match_a_loop_over_cells() -> None:
    ys, xs = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    bitmaps = torch.stack([((xs - 20) ** 2 + (ys - 18) ** 2 < 150), (xs + ys < 50), xs > 100]).to(torch.uint8)
    boxes = torch.tensor(
        [[5.3, 2.1, 40.7, 33.9], [0.0, 0.0, 60.0, 40.0], [10.0, 10.0, 12.5, 11.5], [0.0, 5.0, 9.0, 9.0]]
    )
    numbers = torch.tensor([0, 1, 0, 2])
    targets = mask_targets(bitmaps, boxes, numbers)
    for target, box, number in zip(targets, boxes.tolist(), numbers, strict=True):
        slow = slow_target(bitmaps[number].float(), box)
        is_clear = (slow - 0.5).abs() > 1e-4
        assert torch.equal(target[is_clear], (slow[is_clear] >= 0.5).float())
    assert 0 < targets[0].mean() < 1
    assert not targets[3].any()


def test_boxes_are_clipped_to_the_mask() -> None:
    bitmaps = torch.ones(1, 20, 30, dtype=torch.uint8)
    outside = mask_targets(bitmaps, torch.tensor([[-10.0, -5.0, 50.0, 40.0]]), torch.tensor([0]))
    assert outside.all()
