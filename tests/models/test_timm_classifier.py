from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from config import load_config
from models import build_model
from models.timm_classifier import create_timm_classifier, parse_args
from tests.helpers import fill_weights
from utils.config.errors import ConfigError
from utils.training.optimizer import parameter_groups


def timm_model(name: str = "test_resnet", **options: Any) -> Any:
    return create_timm_classifier(name, **{"num_classes": 5, "img_size": 32, **options})


def takes_large_windows() -> bool:
    """Return whether the device "meta" takes a window larger than its map, as in torch 2.6."""
    conv = nn.Conv2d(1, 1, 2, device="meta")
    try:
        return conv(torch.empty(1, 1, 1, 1, device="meta")).numel() == 0
    except RuntimeError:
        return False


SMALL_SWIN = "embed_dim=16 depths=[1,1,1,1] num_heads=[1,1,1,1]"


# The second and third are made for images of one size, the last has no stochastic depth.
@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "swin_tiny_patch4_window7_224", "ghostnet_050"])
def test_models_take_the_configured_image_size(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    args = SMALL_SWIN if name.startswith("swin") else ""
    config = load_config("cfgs/digits.yaml", ["MODEL.TYPE", f"timm:{name}", "MODEL.TIMM.ARGS", args])
    assert build_model(config)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert ("has no drop_path_rate, MODEL.DROP_PATH_RATE is not used" in caplog.text) == (name == "ghostnet_050")


def test_settings_reach_the_model() -> None:
    opts = ["MODEL.TYPE", "timm:convnext_atto", "MODEL.DROP_PATH_RATE", "0.3", "TRAIN.USE_CHECKPOINT", "True"]
    args = "depths=[1,1,1,2] dims=(8,16,24,32)"
    model: Any = build_model(
        load_config("cfgs/digits.yaml", [*opts, "MODEL.DROP_RATE", "0.2", "MODEL.TIMM.ARGS", args])
    )
    assert [stage.blocks[0].conv_dw.in_channels for stage in model.stages] == [8, 16, 24, 32]
    assert model.stages[3].blocks[1].drop_path.drop_prob == pytest.approx(0.3)
    assert model.head.drop.p == 0.2
    assert model.stages[0].grad_checkpointing
    assert parse_args("a=1 b=[1,2] c=gelu d=None") == {"a": 1, "b": [1, 2], "c": "gelu", "d": None}


@pytest.mark.parametrize(
    ("opts", "complaint"),
    [
        (
            ["MODEL.TYPE", "timm:resnt18"],
            "MODEL.TYPE timm:resnt18: timm has no such model; did you mean timm:resnet18?",
        ),
        (["MODEL.TYPE", "timm:"], "MODEL.TYPE timm:: timm has no such model"),
        (["MODEL.TYPE", "timm:resnet18.no_tag"], "MODEL.TYPE timm:resnet18.no_tag: timm has no such model"),
        (["MODEL.TIMM.ARGS", "a=1"], "MODEL.TIMM.ARGS 'a=1': works with MODEL.TYPE timm:NAME, not mlla"),
        (["MODEL.TYPE", "timm:test_resnet", "MODEL.TIMM.ARGS", "nothing=1"], "timm:test_resnet: .* 'nothing'"),
        (
            ["MODEL.TYPE", "timm:test_resnet", "MODEL.TIMM.ARGS", "layers"],
            "timm:test_resnet: 'layers' is not key=value",
        ),
        pytest.param(
            ["MODEL.TYPE", "timm:test_convnext", "DATA.IMG_SIZE", "8"],
            "timm:test_convnext: timm cannot make it for 8x8",
            marks=pytest.mark.skipif(takes_large_windows(), reason="this torch finds it in the first forward pass"),
        ),
        (["MODEL.TYPE", "timm:test_vit", "DATA.IMG_SIZE", "30"], "timm:test_vit: timm cannot make it for 30x30"),
        (["MODEL.TYPE", "timm:test_vit", "MODEL.TIMM.ARGS", "global_pool='' num_classes=3"], "timm:test_vit: "),
        (["BENCHMARK.BASELINES", "timm:resnet18,timm:x", "THROUGHPUT_MODE", "True"], "BENCHMARK.BASELINES timm:x: "),
    ],
)
def test_mistakes_are_one_line(opts: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        build_model(load_config("cfgs/digits.yaml", opts))
    assert "\n" not in str(caught.value)


def test_frozen_backbone() -> None:
    """Only the classifier learns, and batch norm does not move, also in a copy."""
    for model in ((frozen := timm_model(drop_rate=0.5)), deepcopy(frozen)):
        model.freeze_backbone()
        statistics = model.bn1.running_mean.clone()
        model.train()(torch.randn(4, 3, 32, 32)).sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
            "fc.weight",
            "fc.bias",
        ]
        assert model.bn1.running_mean.equal(statistics)
        assert {name for name, module in model.named_modules() if module.training} == {"", "fc"}
    config = load_config(
        "cfgs/digits.yaml",
        [
            "MODEL.TYPE",
            "timm:deit_tiny_distilled_patch16_224",
            "MODEL.TIMM.ARGS",
            "depth=1",
            "TRAIN.FREEZE",
            "True",
            "MODEL.PRETRAINED",
            "x",
        ],
    )
    with pytest.raises(ConfigError, match=r"TRAIN\.FREEZE with timm:deit_tiny.*: only a model with one"):
        build_model(config)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_layer_decay(name: str) -> None:
    model = timm_model(name)
    groups = parameter_groups(model, 0.05, layer_decay=0.5)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert all(scales[id(parameter)] == 1 for parameter in model.get_classifier().parameters())
    assert min(scales.values()) <= 0.25
    assert len(scales) == len(list(model.parameters()))


def test_it_computes_what_timms_model_computes() -> None:
    import timm

    ours, theirs = timm_model(), timm.create_model("test_resnet", num_classes=5)
    for model in (ours, theirs):
        fill_weights(model)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, type(theirs))
    assert isinstance(ours.fc, nn.Linear)
    images = torch.randn(2, 3, 32, 32)
    assert ours.eval()(images).equal(theirs.eval()(images))
