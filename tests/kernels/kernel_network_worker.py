"""The network with kernels beside the plain one, in all modes; test_kernels.py runs it, with words of the checks' names
if any: `python tests/kernels/kernel_network_worker.py modes compiled`.
"""

from typing import Any

import torch
from torch import nn

from models import MLLA, prepare_for_inference
from models.kernels import dispatch
from models.layers import Downsample, Stem
from models.mlla import MLLABlock
from models.rope import position_tables
from tests.kernels.kernel_process import DEVICE, run_checks


def check_modes() -> None:
    """Checkpoints (with the trial inside of one), dropout, evaluation with gradients, no bias of q and k, no images,
    and a prepared model where gradients are on. "triton" fails where the plain path would take over.
    """
    images = torch.randn(2, 3, 12, 20, device=DEVICE)

    def results(kernels: str, training: bool, **options: Any) -> tuple[list[torch.Tensor], MLLA]:
        torch.manual_seed(0)
        sizes = {"img_size": 32, "embed_dim": 16, "depths": (1,), "num_heads": (1,), "num_classes": 4}
        model = MLLA(**sizes, **{"drop_path_rate": 0.0, **options}, kernels=kernels).to(DEVICE).train(training)
        torch.manual_seed(1)
        logits = model(images)
        logits.square().sum().backward()
        return [logits, *(p.grad for p in model.parameters() if p.grad is not None)], model

    for kernels, training, options in (
        ("auto", True, {"use_checkpoint": True}),
        ("triton", True, {"use_checkpoint": True}),
        ("triton", True, {"drop_path_rate": 0.5}),
        ("auto", True, {"drop_rate": 0.1}),
        ("triton", False, {}),
        ("triton", False, {"qkv_bias": False, "mlp_ratio": 2.0}),
    ):
        found, model = results(kernels, training, **options)
        expected, plain = results("torch", training, **options)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert model(images[:0]).shape == (0, 4)
    prepared = prepare_for_inference(model, torch.float32)
    torch.testing.assert_close(prepared(images), plain(images), atol=1e-4, rtol=1e-3)


def check_replaced() -> None:
    """Parts that were replaced, or have hooks, are called: in training, in inference, and in a prepared copy."""
    trial, dispatch.remembered_trial = dispatch.remembered_trial, lambda *_: ""  # check_modes and check_trial run it
    images, tokens = torch.randn(1, 3, 8, 16, device=DEVICE), torch.randn(1, 2, 4, 16, device=DEVICE)
    inputs = {"stem": (images,), "block": (tokens, position_tables(2, 4, 16, tokens.device)), "down": (tokens,)}

    def made(part: str, kernels: str) -> torch.nn.Module:
        torch.manual_seed(0)
        parts = {"stem": Stem(3, 16, kernels), "block": MLLABlock(16, 1, kernels=kernels)}
        module = (parts | {"down": Downsample(16, kernels=kernels)})[part]
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
        return module.to(DEVICE)

    def in_all_modes(part: str, module: torch.nn.Module) -> list[torch.Tensor]:
        trained = module.train()(*inputs[part])
        with torch.no_grad():
            module.eval()
            return [trained, *(m(*inputs[part]) for m in (module, prepare_for_inference(module, torch.float32)))]

    replacements = [("stem", "conv1.act", nn.Tanh()), ("stem", "conv1.conv", nn.Conv2d(3, 8, 3, 2, 1))]
    replacements += [("stem", "conv1.conv", nn.Conv2d(3, 8, 7, 2, 3, bias=False))]
    replacements += [("down", "conv.1.conv", nn.Conv2d(128, 128, 3, 2, 1))]
    replacements += [("down", f"conv.{name}", nn.Tanh()) for name in ("0.act", "0.norm", "1.norm", "2.act")]
    replacements += [("block", "mlp.act", nn.GELU("tanh")), ("block", "out_proj", nn.Linear(16, 16, bias=False))]
    replacements += [("block", name, nn.Tanh()) for name in ("norm2", "mlp.act", "mlp.norm", "attn.lepe", "dwc")]
    for part, name, replacement in replacements:
        modules = made(part, "auto"), made(part, "torch")
        for module in modules:
            module.set_submodule(name, replacement.to(DEVICE))
        found, expected = (in_all_modes(part, module) for module in modules)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=f"{name} {replacement}")

    called: list[str] = []
    for part in inputs:
        module = made(part, "auto").eval()
        for name, watched in module.named_modules():
            called.clear()
            hook = watched.register_forward_hook(lambda *_, name=name: called.append(name))
            with torch.no_grad():
                module(*inputs[part])
                prepare_for_inference(module, torch.float32)(*inputs[part])
            hook.remove()
            assert called == [name] * 2 or name == "drop_path", name  # which does nothing in inference
    block, called = made("block", "auto"), []
    for part in (block.in_proj, block.mlp.fc1):
        for register in (part.register_full_backward_hook, part.register_full_backward_pre_hook):
            hook = register(lambda *_: called.append("backward"))
            block(tokens.clone().requires_grad_(), inputs["block"][1]).sum().backward()
            hook.remove()
    assert called == ["backward"] * 4
    dispatch.remembered_trial = trial


def check_gradients_of_some() -> None:
    """Where only some parameters are trained, what their gradients need is kept."""
    for trained in ("lepe.weight", "dwc.bias", "attn.qk.bias", "fc2.bias"):
        gradients = []
        for kernels in ("triton", "torch"):
            torch.manual_seed(0)
            model = MLLA(img_size=32, embed_dim=16, depths=(1,), num_heads=(1,), kernels=kernels, drop_path_rate=0.0)
            model.to(DEVICE).requires_grad_(False)
            (parameter,) = [p for name, p in model.named_parameters() if name.endswith(trained)]
            parameter.requires_grad_()
            model(torch.ones(1, 3, 16, 24, device=DEVICE)).square().sum().backward()
            assert parameter.grad is not None
            gradients.append(parameter.grad)
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def check_compiled() -> None:
    """torch.compile sees one graph of each block, in whatever sizes, with and without gradient."""
    model = MLLA(img_size=32, embed_dim=16, depths=(1,), num_heads=(1,), drop_path_rate=0.0).to(DEVICE)
    for block in model.layers[0].blocks:
        block.compile(fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for height, width in ((8, 16), (16, 8)):
        images = torch.randn(2, 3, height, width, device=DEVICE)
        gradients = []
        for kernels in ("triton", "torch"):
            for module in model.modules():
                if hasattr(module, "kernels"):
                    module.kernels = kernels
            model.train().zero_grad()
            model(images).square().sum().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        torch.testing.assert_close(*gradients, atol=2e-3, rtol=2e-3)


if __name__ == "__main__":
    run_checks(check_modes, check_replaced, check_gradients_of_some, check_compiled)
