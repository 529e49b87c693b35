"""Choice of fused modules, and the fallback where kernels cannot run; without Triton."""

import copy
import io
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import MLLA, mlla, prepare_for_inference, use_kernels
from models.kernels import dispatch, inference
from models.kernels.dispatch import KernelsUnavailableError
from models.kernels.fused_modules import FusedDownsample, FusedMLLABlock, FusedStem, mixer_parts, mlp_parts
from models.layers import Downsample, Stem
from models.mlla import MLLABlock
from models.rope import position_tables
from utils.speed.compile import compile_regions

SIZES = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 1), "num_classes": 4, "drop_path_rate": 0.0}
IMAGES = torch.ones(1, 3, 24, 32)


def test_eager_where_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.zeros(1, 4, 4, 32)
    lines: list[str] = []
    monkeypatch.setattr(dispatch.logger, "info", lambda line, *parts: lines.append(line % parts))
    dispatch.log_fallback_once.cache_clear()
    assert not dispatch.can_run("auto", tokens)
    assert not dispatch.can_run("torch", tokens)
    assert lines == []  # nobody expects them on a CPU
    with pytest.raises(
        KernelsUnavailableError, match=r"MODEL\.KERNELS triton: .* no Triton for the device cpu; use auto"
    ):
        dispatch.can_run("triton", tokens)
    with pytest.raises(KernelsUnavailableError, match=r"MODEL\.KERNELS triton"):
        use_kernels(MLLA(**SIZES), "triton")(IMAGES)  # type: ignore[arg-type]
    monkeypatch.setattr(dispatch, "find_missing_triton", lambda _: "the GPU is older than Ampere")
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert not any(dispatch.can_run("auto", on_gpu) for _ in range(3))
    assert lines == ["Triton kernels: falls back to eager PyTorch: the GPU is older than Ampere"]


def test_unsupported_reasons() -> None:
    def reason(width: int = 64, head_dim: int = 32, norm: nn.Module | None = None) -> str:
        return dispatch.unsupported_reason(width, head_dim, norm or nn.LayerNorm(width))

    assert reason() == ""
    with pytest.raises(KernelsUnavailableError, match="float64"):
        dispatch.supports("triton", torch.zeros(1, 4, 4, 32), "mixer", channels=32, dtype=torch.float64)
    assert "heads of 24 channels" in reason(head_dim=24)
    assert "1056 channels are more than 1024" in reason(width=1056, norm=nn.LayerNorm(1056))
    assert "without weight" in reason(norm=nn.LayerNorm(64, bias=False))
    assert "not BatchNorm2d" in reason(norm=nn.BatchNorm2d(64))


def test_prepared_stages_keep_their_rotary_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to NUM_POSITIONS rows and columns, here those of the first images; the second ones' are computed."""
    computed: list[int] = []

    def compute(*args: Any) -> tuple[Tensor, Tensor]:
        computed.append(args[0] + args[1])
        return position_tables(*args)

    monkeypatch.setattr(inference, "NUM_POSITIONS", 14)
    model = MLLA(**SIZES).eval()  # type: ignore[arg-type]
    names = model.state_dict().keys()
    prepared = prepare_for_inference(model, torch.float32)
    assert model.state_dict().keys() == names
    assert not [name for name in prepared.state_dict() if name.endswith(("cos", "sin"))]
    monkeypatch.setattr(mlla, "position_tables", compute)
    with torch.no_grad():
        for images, expected in ((torch.randn(1, 3, 24, 32), []), (torch.randn(1, 3, 32, 32), [16])):
            for copied in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
                computed.clear()
                result = copied(images)
                assert computed == expected
                torch.testing.assert_close(result, model(images), atol=1e-5, rtol=1e-5)
        computed.clear()
        prepared.bfloat16()(IMAGES.bfloat16())
        assert len(computed) == len(SIZES["depths"])  # type: ignore[arg-type]


def test_stages_without_blocks_are_prepared() -> None:
    model = MLLA(**(SIZES | {"depths": (1, 0)})).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(
            prepare_for_inference(model, torch.float32)(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-5
        )


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules() if isinstance(module, MLLABlock | Stem | Downsample)]


def test_use_kernels_changes_classes_and_nothing_else() -> None:
    model = MLLA(**SIZES).eval()  # type: ignore[arg-type]
    names, logits = list(model.state_dict()), model(IMAGES)
    eager, fused = (
        [Stem, MLLABlock, Downsample, MLLABlock],
        [FusedStem, FusedMLLABlock, FusedDownsample, FusedMLLABlock],
    )
    assert kinds(model) == eager
    assert use_kernels(model) is model
    assert kinds(use_kernels(model)) == fused
    assert list(model.state_dict()) == names
    assert model(IMAGES).equal(logits)
    attributes = {name for module in model.modules() for name in vars(module)}
    assert kinds(use_kernels(model, "torch")) == eager
    assert attributes - {name for module in model.modules() for name in vars(module)} == {
        *("kernels", "snapshots", "reasons")
    }
    with pytest.raises(ValueError, match="kernels 'cuda': known are auto, triton, torch"):
        use_kernels(model, "cuda")


def test_subclasses_with_a_forward_pass_of_their_own_stay() -> None:
    class Quiet(MLLABlock):
        def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:  # noqa: ARG002
            return x

    block = Quiet(16, 1)
    assert type(use_kernels(block)) is Quiet


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_fused_and_watch_their_own_parts(how: str, device: torch.device, trusted: None) -> None:  # noqa: ARG001
    """Changes of the original do not affect a copy, such as the EMA, nor the other way round."""
    block: FusedMLLABlock = use_kernels(MLLABlock(16, 1)).eval().to(device)  # type: ignore[assignment]
    assert block.unsupported(mixer_parts) == ""
    duplicate = {"deepcopy": copy.deepcopy, "pickle": lambda b: pickle.loads(pickle.dumps(b)), "torch.save": saved}[
        how
    ](block)
    assert type(duplicate) is FusedMLLABlock
    assert not duplicate.snapshots
    block.norm1.register_forward_hook(lambda *_: None)
    assert (block.unsupported(mixer_parts) == "", duplicate.unsupported(mixer_parts)) == (False, "")
    duplicate.out_proj = nn.Linear(16, 16, bias=False)
    assert duplicate.unsupported(mixer_parts)


def test_copies_of_compiled_modules_compute_with_their_own_weights() -> None:
    """As those that an evaluation within a run prepares: the compiled call is of the original, in training mode."""
    model = use_kernels(MLLA(**SIZES)).eval()
    images = torch.randn(1, 3, 32, 32)
    duplicate = copy.deepcopy(model)
    expected = duplicate(images)
    for region in model.modules():
        if getattr(region, "is_region", False):
            region.compile(backend="eager")
    for copied in (copy.deepcopy(model), prepare_for_inference(model, torch.float32)):
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        assert all(module._compiled_call_impl is None for module in copied.modules())
        torch.testing.assert_close(copied(images), expected, atol=1e-4, rtol=1e-4)
        model.load_state_dict(duplicate.state_dict())


def saved(block: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_parts_are_examined_again_only_when_one_has_changed() -> None:
    block: FusedMLLABlock = use_kernels(MLLABlock(16, 1))  # type: ignore[assignment]

    def snapshot() -> object:
        block.unsupported(mixer_parts)
        return block.snapshots

    first = snapshot()
    block.double().train().float()
    block.load_state_dict(block.state_dict(), assign=True)
    assert snapshot() is first
    handle = block.attn.qk.register_full_backward_hook(lambda *_: None)
    assert snapshot() is not first
    assert block.unsupported(mixer_parts)
    handle.remove()
    assert not block.unsupported(mixer_parts)
    bias, block.out_proj.bias = block.out_proj.bias, None  # type: ignore[assignment]
    assert block.unsupported(mixer_parts)
    block.out_proj.bias = bias
    assert not block.unsupported(mixer_parts)
    nn.utils.parametrizations.weight_norm(block.in_proj)
    assert block.unsupported(mixer_parts)
    assert not block.unsupported(mlp_parts)
    block.mlp.act.approximate = "tanh"
    assert block.unsupported(mlp_parts)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_compiled_blocks_of_several_widths_ask_for_constants(
    monkeypatch: pytest.MonkeyPatch, is_prepared: bool
) -> None:
    """Compiled once for all widths, a block's width would be a symbol, for which there is no verdict."""
    cases: set[tuple[str, int]] = set()

    def verdict(kernel: str, _device: torch.device, _dtype: torch.dtype, channels: int, *_: int) -> str:
        cases.add((kernel, channels))
        return "not here"

    monkeypatch.setattr(dispatch, "find_missing_triton", lambda _: "")
    monkeypatch.setattr(dispatch, "self_test_verdict", verdict)
    torch._dynamo.reset()
    compile_regions(nn.Identity(), "default")  # sets what torch's version needs
    model = use_kernels(MLLA(img_size=32, embed_dim=16, depths=(1, 1, 1), num_heads=(1, 2, 4), num_classes=3))
    if is_prepared:
        model = prepare_for_inference(model, torch.float32)
    for module in model.modules():
        if getattr(module, "is_region", False):
            module.compile(backend="eager", fullgraph=True)
    with torch.set_grad_enabled(not is_prepared):
        for size in (32, 64):
            model(torch.randn(2, 3, size, size))
    mixer = "inference_mixer" if is_prepared else "mixer"
    assert {(mixer, 16), (mixer, 32), (mixer, 64)} <= cases
    assert {("wide_conv", 128), ("wide_conv", 256)} <= cases
