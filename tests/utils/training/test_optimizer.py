import pytest
import torch

from downstream.backbone import MLLABackbone
from models import MLLA
from tests.helpers import MICRO
from utils.training.optimizer import dense_parameter_groups, make_optimizer, matched_state, parameter_groups


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


def test_layer_wise_rates_by_hand() -> None:
    """Stem, five blocks with what follows each of them, head: the factor halves with each layer from the head down."""
    model = MLLA(**MICRO, num_classes=10, ape=True)
    scale_of_layer = {
        "absolute_pos_embed": 1 / 64,
        "patch_embed": 1 / 64,
        "layers.0.blocks.0": 1 / 32,
        "layers.0.downsample": 1 / 32,
        "layers.1.blocks.0": 1 / 16,
        "layers.1.downsample": 1 / 16,
        "layers.2.blocks.0": 1 / 8,
        "layers.2.blocks.1": 1 / 4,
        "layers.2.downsample": 1 / 4,
        "layers.3.blocks.0": 1 / 2,
        "norm": 1 / 2,
        "head": 1.0,
    }
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    decay = {id(p): group["weight_decay"] for group in parameter_groups(model, 0.05) for p in group["params"]}
    for name, parameter in model.named_parameters():
        (scale,) = [scale for layer, scale in scale_of_layer.items() if f"{name}.".startswith(f"{layer}.")]
        assert found[id(parameter)] == (scale, decay[id(parameter)]), name


def test_rates_follow_the_layers() -> None:
    model = MLLA(**MICRO, num_classes=10)
    model.freeze_backbone()
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    assert [(len(group["params"]), group["lr_scale"]) for group in groups] == [(1, 1.0), (1, 1.0)]
    assert not any("lr_scale" in group for group in parameter_groups(model, 0.05, layer_decay=1.0))


def test_a_saved_state_that_does_not_fit() -> None:
    model, other = MLLA(**MICRO, num_classes=10), MLLA(**MICRO, num_classes=7)
    optimizer = make_optimizer("adamw", parameter_groups(model, 0.05))
    saved = make_optimizer("adamw", parameter_groups(other, 0.05))
    for group in saved.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    saved.step()
    with pytest.raises(ValueError, match=r"exp_avg of head.weight is \(7, 256\) float32, the weight \(10, 256\)"):
        matched_state(saved.state_dict(), model.state_dict(), model, optimizer)
    layer_wise = make_optimizer("adamw", parameter_groups(model, 0.05, layer_decay=0.5))
    with pytest.raises(ValueError, match=r"groups of \[65, \d+\] parameters where this run has \[5, 10, 13"):
        matched_state(saved.state_dict(), model.state_dict(), model, layer_wise)
    fresh = make_optimizer("adamw", parameter_groups(model, 0.05)).state_dict()
    assert matched_state(fresh, model.state_dict(), model, optimizer)["state"] == {}


def test_dense_groups_exempt_norms_and_position_tables_but_not_biases() -> None:
    model = MLLABackbone(**MICRO, ape=True)
    decayed, others = dense_parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for p in others["params"]}
    assert {"norm0.bias", "absolute_pos_embed", "layers.0.downsample.conv.2.norm.weight"} <= kept
    assert {"patch_embed.conv1.norm.weight", "layers.0.blocks.0.norm1.weight"} <= kept
    assert len(decayed["params"]) + len(kept) == len(names)
    assert "layers.0.blocks.0.in_proj.bias" in {names[id(p)] for p in decayed["params"]}
