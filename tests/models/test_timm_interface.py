"""The models as timm's tools use them: a small set of the checks in timm's own tests, and of values."""

import copy
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules, group_parameters, save_for_hf
from timm.models._manipulate import adapt_input_conv
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from models.layers import DropPath
from models.timm_interface import checkpoint_filter_fn
from models.variants import RELEASED
from tests.helpers import fill_weights, random_values
from utils.checkpoint import download

THIN = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "drop_path_rate": 0.0}
WIDTHS = [8, 16, 32, 64]
NAMES = [f"{family}_{size}" for family in ("mlla", "mila") for size in ("tiny", "small", "base")]
IMAGES = random_values(0, 2, 3, 64, 96)


def thin(**changes: object) -> nn.Module:
    model = timm.create_model("mlla_tiny", **{**THIN, **changes}).eval()
    fill_weights(model)
    return model


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server whose every URL gives <tmp_path>/served.pth, as a share's download link does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = (tmp_path / "served.pth").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{service.server_port}"
        service.shutdown()


def test_registered_with_tags_and_weights() -> None:
    assert set(timm.list_models("mlla_*") + timm.list_models("mila_*")) == set(NAMES)
    assert set(timm.list_pretrained("m[il]la_*")) == {f"{name}.in1k" for name in NAMES}
    with torch.device("meta"):
        for name in NAMES:
            model = timm.create_model(f"{name}.in1k")
            assert model.pretrained_cfg["architecture"] == name
            assert model.pretrained_cfg["tag"] == "in1k"


def test_links_and_file_names_are_those_of_the_training_code() -> None:
    """So that main.py --pretrained mlla-t and timm share one download."""
    for size, (url, name) in RELEASED.items():
        assert url == download.released_url(f"mlla-{size[0]}")
        assert name == download.cache_path(url, f"mlla-{size[0]}").name


def test_mila_is_mlla() -> None:
    a, b = thin(), timm.create_model("mila_tiny", **THIN).eval()
    b.load_state_dict(a.state_dict())
    assert a(IMAGES).equal(b(IMAGES))


@pytest.mark.parametrize("form", ["model", "state_dict_ema", "bare", "wrapped"])
def test_released_weights_by_name(hub: Path, form: str) -> None:
    """The file is where the download puts it; in each form that released files have."""
    model = thin(num_classes=1000)
    weights = {**model.state_dict(), "layers.0.blocks.0.attn.rope.rotations": torch.zeros(56, 56, 4, 2)}
    if form == "wrapped":
        weights = {f"module.{name}": value for name, value in weights.items()}
    torch.save(weights if form in ("bare", "wrapped") else {form: weights}, hub / RELEASED["tiny"][1])
    loaded = timm.create_model("mlla_tiny.in1k", pretrained=True, **THIN).eval()
    assert loaded(IMAGES).equal(model(IMAGES))
    other = timm.create_model("mlla_tiny", pretrained=True, num_classes=5, in_chans=1, **THIN).eval()
    assert other(IMAGES[:, :1]).shape == (2, 5)
    first = "patch_embed.conv1.conv.weight"
    assert other.state_dict()[first].equal(adapt_input_conv(1, model.state_dict()[first]))
    maps = timm.create_model("mlla_tiny", pretrained=True, features_only=True, **THIN).eval()(IMAGES)
    for found, expected in zip(maps, model.forward_intermediates(IMAGES, intermediates_only=True), strict=True):
        assert found.equal(expected)


def test_download_from_a_link_without_a_file_name(hub: Path, server: str, tmp_path: Path) -> None:
    model = thin(num_classes=1000)
    torch.save({"model": model.state_dict()}, tmp_path / "served.pth")
    overlay = {"url": (f"{server}/f/7a19712877/?dl=1", "mlla-t.pth"), "custom_load": True}
    loaded = timm.create_model("mlla_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **THIN).eval()
    assert loaded(IMAGES).equal(model(IMAGES))
    assert (hub / "mlla-t.pth").exists()


@pytest.mark.parametrize("where", ["file", "url"])
def test_weights_of_ones_own(hub: Path, tmp_path: Path, where: str) -> None:  # noqa: ARG001
    model = thin(num_classes=1000)
    torch.save({"model": model.state_dict()}, path := tmp_path / "own.pth")
    overlay = {where: str(path) if where == "file" else path.as_uri()}
    loaded = timm.create_model("mlla_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **THIN).eval()
    assert loaded(IMAGES).equal(model(IMAGES))


def test_wrong_weights_are_refused_in_one_line(hub: Path) -> None:
    path = hub / RELEASED["tiny"][1]
    path.write_text("<html>moved</html>")
    with pytest.raises(ValueError, match=r"mlla-t_\w+\.pth: cannot be read as weights .* delete it") as caught:
        timm.create_model("mlla_tiny", pretrained=True, **THIN)
    assert "\n" not in str(caught.value)
    torch.save({"model": thin(depths=(1, 1, 1, 1)).state_dict()}, path)
    with pytest.raises(ValueError, match=r"24 are missing \(layers\.2\.blocks\.1\.act_proj\.bias, .* 0 are unknown"):
        timm.create_model("mlla_tiny", pretrained=True, num_classes=7, **THIN)  # not strict in timm: the head differs


def test_filter_keeps_the_average() -> None:
    model = thin()
    content = {"model": {}, "state_dict_ema": model.state_dict(), "epoch": 3}
    assert checkpoint_filter_fn(content, model).keys() == model.state_dict().keys()


def test_features_only() -> None:
    model = timm.create_model("mlla_tiny", features_only=True, **THIN).eval()
    assert model.feature_info.channels() == WIDTHS
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(x.shape) for x in model(IMAGES)] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]
    assert [tuple(x.shape[2:]) for x in model(IMAGES[..., :61, :90])] == [(16, 23), (8, 12), (4, 6), (2, 3)]
    chosen = timm.create_model("mlla_tiny", features_only=True, out_indices=(1, 2), **THIN)
    assert [x.shape[1] for x in chosen(IMAGES)] == [16, 32]
    assert len(chosen.model.layers) == 3  # the last stage is left out
    last = timm.create_model("mlla_tiny", features_only=True, out_indices=(-1,), **THIN)
    assert [x.shape[1] for x in last(IMAGES)] == [64]


@pytest.mark.parametrize("kind", ["hook", "fx"])
def test_other_feature_extractors_give_the_same_maps(kind: str) -> None:
    model = thin()
    expected = model.forward_intermediates(IMAGES, intermediates_only=True, output_fmt="NHWC")
    extractor = timm.create_model("mlla_tiny", features_only=True, feature_cls=kind, **THIN).eval()
    fill_weights(getattr(extractor, "body", getattr(extractor, "graph_module", extractor)))
    for found, wanted in zip(extractor(IMAGES), expected, strict=True):
        assert found.equal(wanted)


@torch.no_grad()
def test_forward_intermediates() -> None:
    model = thin()
    final, maps = model.forward_intermediates(IMAGES)
    assert final.equal(model.forward_features(IMAGES))
    assert [x.shape[1] for x in maps] == WIDTHS
    x = model.embed(IMAGES)
    for stage, found in zip(model.layers, maps, strict=True):
        output, x = stage(x)
        assert found.equal(output.permute(0, 3, 1, 2))
    _, tokens = model.forward_intermediates(IMAGES, output_fmt="NHWC", norm=True)
    assert tokens[2].equal(maps[2].permute(0, 2, 3, 1))
    assert tokens[3].equal(final)
    assert [x.shape[1] for x in model.forward_intermediates(IMAGES, indices=2, intermediates_only=True)] == [32, 64]
    with pytest.raises(ValueError, match="output_fmt 'NLC': known are NCHW and NHWC"):
        model.forward_intermediates(IMAGES, output_fmt="NLC")


def test_stopping_early_runs_no_later_stage() -> None:
    model = thin()
    expected = model.forward_intermediates(IMAGES, intermediates_only=True)[1]
    model.layers[2].forward = None  # cannot be called
    final, maps = model.forward_intermediates(IMAGES, indices=[1], norm=True, stop_early=True)
    assert maps[0].equal(expected)
    assert final.permute(0, 3, 1, 2).equal(expected)


@pytest.mark.parametrize("index", range(4))
def test_pruned_models_use_all_they_keep(index: int) -> None:
    model = thin(num_classes=5)
    wanted = model.forward_intermediates(IMAGES, indices=[index], intermediates_only=True)[0].detach()
    logits = model(IMAGES)
    whole = copy.deepcopy(model)
    whole.prune_intermediate_layers([3], prune_head=False)
    assert whole(IMAGES).equal(logits)
    taken = model.prune_intermediate_layers([index], prune_norm=True)
    assert model.forward_intermediates(IMAGES, indices=taken, intermediates_only=True)[0].equal(wanted)
    assert model.forward_features(IMAGES).permute(0, 3, 1, 2).equal(wanted)
    assert model(IMAGES).permute(0, 3, 1, 2).equal(wanted)  # neither pooling nor classifier is left
    model.train().forward_features(IMAGES).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model.reset_classifier(3, "avg")
    assert model(IMAGES).shape == (2, 3)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_classifier_and_pooling(pool: str) -> None:
    model = thin(global_pool=pool, num_classes=5)
    features = model.forward_features(IMAGES)  # (2, 2, 3, 64)
    mean, largest = features.mean((1, 2)), features.amax((1, 2))
    expected = {
        "avg": mean,
        "max": largest,
        "avgmax": (mean + largest) / 2,
        "catavgmax": torch.cat((mean, largest), 1),
        "": features,
    }[pool]
    vectors = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(vectors, expected)
    assert vectors.shape[-1] == model.head_hidden_size
    assert model(IMAGES).equal(model.head(vectors))
    assert model(IMAGES).shape == ((2, 5) if pool else (2, 2, 3, 5))
    model.reset_classifier(0)
    assert model(IMAGES).equal(vectors)
    model.reset_classifier(7, "avg")
    assert model.get_classifier() is model.head
    assert model(IMAGES).shape == (2, 7)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), mean)
    with pytest.raises(ValueError, match="global_pool 'token': known are 'avg', 'max'"):
        model.reset_classifier(7, "token")


def test_new_classifiers_are_like_the_model() -> None:
    for mode in (True, False):
        model = thin(dtype=torch.float64).train(mode)
        model.reset_classifier(2, "max")
        assert model.head.weight.dtype == torch.float64
        assert all(module.training == mode for module in model.modules())
        model.to("meta").reset_classifier(2)
        assert model.head.weight.is_meta


def test_device_and_dtype_of_a_new_model() -> None:
    model = timm.create_model("mlla_tiny", device="meta", dtype=torch.bfloat16, **THIN)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(b.is_meta for b in model.buffers())
    assert model(torch.empty(1, 3, 64, 64, device="meta", dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_channels_and_sizes() -> None:
    model = thin(in_chans=5, img_size=(64, 96), ape=True)
    assert model.in_chans == 5
    assert model.absolute_pos_embed.shape == (1, 16 * 24, 8)
    assert model(random_values(0, 1, 5, 64, 96)).shape == (1, 1000)
    assert model(random_values(0, 1, 5, 97, 33)).shape == (1, 1000)


def test_dropout_and_stochastic_depth() -> None:
    model = thin(drop_rate=0.3, drop_path_rate=0.2)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert model(IMAGES).equal(model(IMAGES))
    assert not model.train()(IMAGES).equal(model(IMAGES))


def test_layers_for_layer_wise_rates() -> None:
    model = thin()
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    assert len(set(fine.values())) == 1 + 5 + 1  # stem, blocks, classifier
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == 1 + 4 + 1  # stem, stages, norm with classifier
    optimizer = create_optimizer_v2(thin(ape=True), opt="adamw", weight_decay=0.1, layer_decay=0.5)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.5**i for i in range(7)}
    assert "absolute_pos_embed" in model.no_weight_decay()


@pytest.mark.skipif(TorchVersion(timm.__version__) < (1, 0, 31), reason="timm before 1.0.31 drops the arguments")
@pytest.mark.parametrize("kwargs", [{"num_classes": 3}, {"num_classes": 3, "global_pool": "max", "in_chans": 1}])
def test_folders_of_the_hugging_face_hub(tmp_path: Path, kwargs: dict[str, object]) -> None:
    model = thin(**kwargs)
    model.reset_classifier(4)
    save_for_hf(model, tmp_path)
    restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = IMAGES[:, : kwargs.get("in_chans", 3)]  # type: ignore[misc]
    assert restored(images).equal(model(images))


def test_torch_fx() -> None:
    model = thin(num_classes=5)
    options = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    _, nodes = get_graph_node_names(model, tracer_kwargs=options)
    graph = create_feature_extractor(model, [nodes[-1]], tracer_kwargs=options)
    for images in (IMAGES, IMAGES[..., :50, :33]):
        assert graph(images)[nodes[-1]].equal(model(images))


@pytest.mark.slow
def test_scripting_is_refused_in_one_line_and_tracing_works() -> None:
    with timm.set_scriptable(True), pytest.raises(ValueError, match=r"mlla_tiny cannot be scripted: .* torch\.export"):
        timm.create_model("mlla_tiny", **THIN)
    model = thin()
    with pytest.raises(ValueError, match=r"MLLA cannot be scripted: .* torch\.export or ONNX"):
        torch.jit.script(model)
    traced = torch.jit.trace(model, IMAGES)
    other = random_values(3, 5, 3, 64, 96)
    torch.testing.assert_close(traced(other), model(other))


def test_every_parameter_has_a_gradient_with_and_without_checkpointing() -> None:
    grads: list[dict[str, Tensor]] = []
    for enable in (False, True):
        model = thin(num_classes=5).train()
        model.set_grad_checkpointing(enable)
        model(IMAGES).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(value is not None for value in grads[0].values())
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value)


def test_transforms_follow_from_the_model() -> None:
    config = timm.data.resolve_model_data_config(thin())
    assert config["input_size"] == (3, 224, 224)
    assert config["crop_pct"] == 0.875
    assert config["interpolation"] == "bicubic"
    create = functools.partial(timm.data.create_transform, **config)
    assert create(is_training=False) is not None
