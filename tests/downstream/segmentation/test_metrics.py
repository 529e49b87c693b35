import math

import numpy as np
import pytest
import torch

from downstream.segmentation.metrics import ConfusionMatrix, scores_table

CPU = torch.device("cpu")


def test_scores_by_hand() -> None:
    """Class 2 is nowhere, class 3 is only predicted."""
    matrix = ConfusionMatrix(4, CPU)
    labels = torch.tensor([[0, 0, 0, 1, 1, 255]])
    predictions = torch.tensor([[0, 0, 1, 1, 3, 2]], dtype=torch.uint8)
    matrix.update(predictions, labels)
    assert matrix.counts.tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    scores = matrix.compute()
    iou = [2 / 3, 1 / 3, math.nan, 0.0]
    assert scores.class_iou == pytest.approx([100 * x for x in iou], nan_ok=True)
    assert scores.class_accuracy == pytest.approx([200 / 3, 50.0, math.nan, math.nan], nan_ok=True)
    assert scores.mean_iou == pytest.approx(100 / 3)
    assert scores.mean_accuracy == pytest.approx((200 / 3 + 50) / 2)
    assert scores.pixel_accuracy == pytest.approx(60)
    assert scores.num_pixels == 5


def test_counts_match_a_loop_over_pixels() -> None:
    rng = np.random.default_rng(0)
    matrix, counts = ConfusionMatrix(5, CPU), np.zeros((5, 5), dtype=int)
    for _ in range(3):
        labels, predictions = rng.integers(0, 6, (7, 9)), rng.integers(0, 5, (7, 9))
        labels[labels == 5] = 255
        matrix.update(torch.from_numpy(predictions.astype(np.uint8)), torch.from_numpy(labels.astype(np.uint8)))
        for label, prediction in zip(labels.ravel(), predictions.ravel(), strict=True):
            if label != 255:
                counts[label, prediction] += 1
    assert np.array_equal(matrix.counts.numpy(), counts)


def test_without_labeled_pixels() -> None:
    matrix = ConfusionMatrix(2, CPU)
    matrix.update(torch.zeros(3, 3, dtype=torch.uint8), torch.full((3, 3), 255))
    with pytest.raises(ValueError, match="no labeled pixel"):
        matrix.compute()


def test_table() -> None:
    matrix = ConfusionMatrix(3, CPU)
    matrix.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    lines = scores_table(matrix.compute(), ["wall", "chest of drawers", "sky"]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["wall", "50.00", "50.00"],
        ["chest", "of", "drawers", "0.00", "-"],
        ["sky", "-", "-"],
        ["mean", "25.00", "50.00"],
        ["pixels", "right", "50.00"],
    ]
    assert len({len(line) for line in lines}) == 1
