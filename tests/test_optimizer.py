import pytest
import torch
from conftest import MICRO

from models import MLLA
from utils.optimizer import make_optimizer, parameter_groups


def test_what_is_decayed() -> None:
    model = MLLA(**MICRO, num_classes=10, ape=True)
    decayed, others = parameter_groups(model, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    other_names = {names[id(p)] for p in others["params"]}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    assert decayed_names | other_names == set(names.values())
    assert {"head.weight", "layers.0.blocks.0.cpe1.weight", "patch_embed.conv1.conv.weight"} <= decayed_names
    assert {"absolute_pos_embed", "head.bias", "norm.weight", "layers.0.blocks.0.cpe1.bias"} <= other_names
    assert len(decayed_names) == 65  # as in the golden trajectory


def test_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1, 0]


def test_sgd_whose_first_step_is_skipped() -> None:
    """The next step is that of a fresh optimizer; the momentum is not whatever was in memory."""
    results = []
    for skips in (0, 1, 3):
        parameter = torch.nn.Parameter(torch.ones(1000))
        optimizer = make_optimizer("sgd", [{"params": [parameter]}], momentum=0.9)
        optimizer.param_groups[0]["lr"] = 0.1
        for skip in [True] * skips + [False, False]:
            parameter.grad = torch.full((1000,), 2.0)
            optimizer.found_inf = torch.tensor(float(skip))  # type: ignore[attr-defined]
            optimizer.step()
        results.append(parameter.detach())
    # By hand, Nesterov: momenta 2 and 3.8, steps 0.1 * (2 + 0.9 * 2) and 0.1 * (2 + 0.9 * 3.8).
    torch.testing.assert_close(results[0], torch.full((1000,), 1 - 0.38 - 0.542))
    assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_found_inf_leaves_everything_unchanged(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(name, [{"params": [parameter], "weight_decay": 0.1}])
    optimizer.param_groups[0]["lr"] = 0.1
    parameter.grad = torch.tensor([float("nan"), 1.0, 1.0])
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert (parameter < 1).all()


def test_sgd_is_nesterov() -> None:
    optimizer = make_optimizer("sgd", [{"params": [torch.nn.Parameter(torch.ones(1))]}], momentum=0.8)
    assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["nesterov"]) == (0.8, True)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="known are adamw and sgd"):
        make_optimizer("lion", [])
