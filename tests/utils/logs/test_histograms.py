import numpy as np
import torch
from torch import nn

from utils.logs.histograms import MAX_PARTS, MAX_VALUES, weight_samples


def test_parts_and_their_sizes() -> None:
    """Up to MAX_VALUES of each part, evenly spaced; lists count by their items, parts without weights do not."""
    model = nn.Module()
    model.stem = nn.Linear(3, 2)
    model.layers = nn.ModuleList([nn.Linear(200, 200), nn.Identity(), nn.Linear(4, 4)])
    model.drop = nn.Dropout()
    samples = weight_samples(model)
    assert {name: len(values) for name, values in samples.items()} == {
        "stem": 8,
        "layers.0": 8040,  # each fifth of 40,000 and of 200
        "layers.2": 20,
    }
    assert np.array_equal(samples["layers.0"][:8000], model.layers[0].weight.detach().flatten()[::5].numpy())


def test_limits_and_values_that_are_not_finite() -> None:
    model = nn.ModuleDict({str(i): nn.Linear(1, 1) for i in range(MAX_PARTS + 3)})
    model["0"].weight.data.fill_(torch.nan)
    samples = weight_samples(model)
    assert len(samples) == MAX_PARTS
    assert samples["0"].tolist() == model["0"].bias.tolist()
    many = nn.ModuleDict({"a": nn.ModuleDict({str(i): nn.Linear(50, 50) for i in range(30)})})
    assert 0.9 * MAX_VALUES < len(weight_samples(many)["a"]) <= MAX_VALUES
