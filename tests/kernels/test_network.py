"""The network with kernels beside the eager one, in all modes; replaced and hooked parts are called."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import MLLA, prepare_for_inference, use_kernels
from models.layers import Downsample, Stem
from models.mlla import MLLABlock
from models.rope import position_tables
from utils.speed.compile import remember_autograd_functions
from utils.speed.compile_fallback import with_fallback

pytest.importorskip("triton")

SIZES: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depths": (1,), "num_heads": (1,)}


def train_once(kernels: str, images: Tensor, *, training: bool, **changes: Any) -> tuple[list[Tensor], nn.Module]:
    """(logits and all gradients, the model)."""
    torch.manual_seed(0)
    model = use_kernels(MLLA(**{**SIZES, "num_classes": 4, "drop_path_rate": 0.0, **changes}), kernels)
    model.to(images.device).train(training)
    torch.manual_seed(1)
    logits = model(images)
    logits.square().sum().backward()
    return [logits, *(p.grad for p in model.parameters() if p.grad is not None)], model


@pytest.mark.parametrize(
    ("kernels", "training", "changes"),
    [
        ("auto", True, {"use_checkpoint": True}),  # with the self-test inside of a checkpoint
        ("triton", True, {"use_checkpoint": True, "drop_path_rate": 0.5}),
        ("auto", True, {"drop_rate": 0.1}),
        ("triton", False, {}),
        ("triton", False, {"qkv_bias": False, "mlp_ratio": 2.0}),
    ],
    ids=str,
)
def test_modes(
    request: pytest.FixtureRequest, device: torch.device, kernels: str, training: bool, changes: dict[str, Any]
) -> None:
    """ "triton" fails where eager PyTorch would take over."""
    if "drop_rate" in changes:
        request.getfixturevalue("trusted")
    images = torch.randn(2, 3, 12, 20, device=device)
    results, model = train_once(kernels, images, training=training, **changes)
    expected, eager = train_once("torch", images, training=training, **changes)
    torch.testing.assert_close(results, expected, atol=1e-4, rtol=1e-3)
    if training:
        return
    assert model(images[:0]).shape == (0, 4)
    prepared = prepare_for_inference(model, torch.float32)  # also where gradients are on
    torch.testing.assert_close(prepared(images), eager(images), atol=1e-4, rtol=1e-3)


@pytest.fixture
def inputs(device: torch.device) -> dict[str, tuple[Any, ...]]:
    tokens = torch.randn(1, 2, 4, 16, device=device)
    rotary = position_tables(2, 4, 16, device)
    return {"stem": (torch.randn(1, 3, 8, 16, device=device),), "block": (tokens, rotary), "down": (tokens,)}


def make(part: str, kernels: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    makers: dict[str, Callable[[], nn.Module]] = {"stem": lambda: Stem(3, 16), "block": lambda: MLLABlock(16, 1)}
    module = (makers | {"down": lambda: Downsample(16)})[part]()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return use_kernels(module, kernels).to(device)


def outputs_in_all_modes(module: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    """[training, inference, a prepared copy]."""
    trained = module.train()(*args)
    with torch.no_grad():
        module.eval()
        return [trained, *(m(*args) for m in (module, prepare_for_inference(module, torch.float32)))]


REPLACEMENTS: list[tuple[str, str, Callable[[], nn.Module]]] = [
    ("stem", "conv1.act", nn.Tanh),
    ("stem", "conv1.conv", lambda: nn.Conv2d(3, 8, 3, 2, 1)),
    ("stem", "conv1.conv", lambda: nn.Conv2d(3, 8, 7, 2, 3, bias=False)),
    ("down", "conv.1.conv", lambda: nn.Conv2d(128, 128, 3, 2, 1)),
    *(("down", f"conv.{name}", nn.Tanh) for name in ("0.act", "0.norm", "1.norm", "2.act")),
    ("block", "mlp.act", lambda: nn.GELU("tanh")),
    ("block", "out_proj", lambda: nn.Linear(16, 16, bias=False)),
    *(("block", name, nn.Tanh) for name in ("norm2", "mlp.act", "mlp.norm", "attn.lepe", "dwc")),
    ("block", "drop_path", nn.Identity),
]
CASES = [(*replacement, False) for replacement in REPLACEMENTS]
CASES += [(*replacement, True) for replacement in REPLACEMENTS if replacement[1] in ("conv.0.act", "out_proj", "dwc")]


@pytest.mark.parametrize(("part", "name", "replacement", "is_examined"), CASES)
@pytest.mark.usefixtures("trusted")
def test_replaced_parts_are_called(
    inputs: dict[str, tuple[Any, ...]],
    device: torch.device,
    part: str,
    name: str,
    replacement: Callable[[], nn.Module],
    is_examined: bool,
) -> None:
    new = replacement().to(device)
    modules = make(part, "auto", device), make(part, "torch", device)
    for module in modules:
        if is_examined:
            module(*inputs[part])
            module.eval()  # batch norm has seen the same in both
        module.set_submodule(name, new)
    results, expected = (outputs_in_all_modes(module, inputs[part]) for module in modules)
    torch.testing.assert_close(results, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("part", ["stem", "block", "down"])
@pytest.mark.usefixtures("trusted")
def test_hooks_are_called(inputs: dict[str, tuple[Any, ...]], device: torch.device, part: str) -> None:
    """Hooks of every part are called, in inference and in a prepared copy; drop_path does nothing there."""
    module = make(part, "auto", device).eval()
    called: list[str] = []
    for name, watched in module.named_modules():
        called.clear()
        hook = watched.register_forward_hook(lambda *_, name=name: called.append(name))
        module(*inputs[part])
        prepare_for_inference(module, torch.float32)(*inputs[part])
        hook.remove()
        assert called == [name] * 2 or name == "drop_path", name


@pytest.mark.parametrize("part", ["in_proj", "mlp.fc1"])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.usefixtures("trusted")
def test_backward_hooks_are_called(
    inputs: dict[str, tuple[Any, ...]], device: torch.device, part: str, register: str
) -> None:
    block, (tokens, rotary), called = make("block", "auto", device), inputs["block"], []
    block(tokens, rotary)  # before the hook, so that the change is noticed
    getattr(block.get_submodule(part), register)(lambda *_: called.append("backward"))
    block(tokens.clone().requires_grad_(), rotary).sum().backward()
    assert called == ["backward"]


@pytest.mark.parametrize("trained", ["lepe.weight", "dwc.bias", "attn.qk.bias", "fc2.bias"])
def test_gradients_where_only_one_parameter_is_trained(device: torch.device, trained: str) -> None:
    """Activations that the single gradient needs are saved."""
    gradients = []
    for kernels in ("triton", "torch"):
        torch.manual_seed(0)
        model = use_kernels(MLLA(**SIZES, drop_path_rate=0.0), kernels)
        model.to(device).requires_grad_(False)
        (parameter,) = [p for name, p in model.named_parameters() if name.endswith(trained)]
        parameter.requires_grad_()
        model(torch.ones(1, 3, 16, 24, device=device)).square().sum().backward()
        assert parameter.grad is not None
        gradients.append(parameter.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_compiled(device: torch.device) -> None:
    """torch.compile sees one graph of each block, in whatever sizes, with and without kernels."""
    model = MLLA(**SIZES, drop_path_rate=0.0).to(device)
    for block in model.layers[0].blocks:
        block.compile(fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    for height, width in ((8, 16), (16, 8)):
        images = torch.randn(2, 3, height, width, device=device)
        gradients = []
        for kernels in ("triton", "torch"):
            use_kernels(model, kernels).train().zero_grad()
            model(images).square().sum().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        torch.testing.assert_close(*gradients, atol=2e-3, rtol=2e-3)


def test_a_compiled_block_looks_into_no_kernel_and_notices_a_changed_part(device: torch.device, trusted: None) -> None:  # noqa: ARG001
    """Its graph has each half as one operation; the parts are examined before each call, outside of it."""
    if not hasattr(torch._functorch.config, "autograd_cache_allow_custom_autograd_functions"):
        pytest.skip("this torch would not keep such code on disk")
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = use_kernels(MLLABlock(32, 2)).to(device)
    eager = copy.deepcopy(block)
    graphs: list[list[str]] = []

    def backend(module: torch.fx.GraphModule, _: object) -> Any:
        graphs.append([node.target.__name__ for node in module.graph.nodes if node.op == "call_function"])
        return module

    remember_autograd_functions([block])
    block.compile(backend=backend, fullgraph=True)
    block._compiled_call_impl = with_fallback(block, set())
    x, rotary = torch.randn(2, 6, 6, 32, device=device), position_tables(6, 6, 32, device)
    assert block(x, rotary).equal(eager(x, rotary))
    assert "mixer" in graphs[0]
    assert "mlp_branch" in graphs[0]
    for each in (block, eager):
        each(x, rotary).square().sum().backward()
    for trained, expected in zip(block.parameters(), eager.parameters(), strict=True):
        assert trained.grad.equal(expected.grad)
    assert len(graphs) == 1
    for each in (block, eager):
        each.out_proj.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    assert block(x, rotary).equal(eager(x, rotary))
    assert len(graphs) == 2
    assert "mixer" not in graphs[1]
    assert "mlp_branch" in graphs[1]


def test_training_mode_without_gradient(device: torch.device) -> None:
    """A pass that only updates batch norm statistics: stochastic depth draws the same numbers in both modes."""
    images, logits = torch.randn(2, 3, 16, 16, device=device), []
    for kernels in ("triton", "torch"):
        torch.manual_seed(0)
        model = use_kernels(MLLA(**SIZES, num_classes=4, drop_path_rate=0.5), kernels).to(device).train()
        torch.manual_seed(1)
        with torch.no_grad():
            logits.append(model(images))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-3)
