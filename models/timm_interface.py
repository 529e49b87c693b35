"""timm's interface of the models beside the forward pass: classifier, maps, pruning, layers, pretrained weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.layers import SelectAdaptivePool2d
from timm.models import clean_state_dict, load_pretrained, load_state_dict
from timm.models._features import feature_take_indices
from torch import Tensor, nn

POOLINGS = ("avg", "max", "avgmax", "catavgmax", "")
FORMATS = ("NCHW", "NHWC")
# The official classifier stores rotary tables for its one image size; here they follow from the grid.
DERIVED_KEY_SUFFIX = "attn.rope.rotations"
# Where files of this project, of the official code and of timm keep weights; EMA weights go first.
WEIGHT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
MAX_NAMES_SHOWN = 3


def not_scriptable(name: str) -> str:
    """Return the message of the error where a model is scripted."""
    return (
        f"{name} cannot be scripted: what it does depends on sizes, devices and dtypes; use torch.export or ONNX, or "
        "torch.jit.trace for one image size (python -m utils.export writes all three)"
    )


class FreezableClassifier(nn.Module):
    """Base of classifiers with timm's `get_classifier` whose other parts can be frozen."""

    is_backbone_frozen = False

    def freeze_backbone(self) -> None:
        """Train only the classifier from now on.

        All other parts take no gradient and stay in evaluation mode whatever `train` says, so that batch norm
        statistics do not move and nothing is dropped.

        Raises:
            ValueError: there is no classifier, or there are several.
        """
        classifier = self.get_classifier()
        if not isinstance(classifier, nn.Module) or isinstance(classifier, nn.Identity):
            raise ValueError("only a model with one classifier can have its backbone frozen")
        self.requires_grad_(False)
        classifier.requires_grad_(True)
        self.is_backbone_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> "FreezableClassifier":
        super().train(mode)
        if self.is_backbone_frozen:
            for child in self.children():
                child.train(False)
            self.get_classifier().train(mode)
        return self

    def get_classifier(self) -> nn.Module:
        """Return the layer from features to classes."""
        return super().get_classifier()  # type: ignore[misc]


class PyramidClassifier(FreezableClassifier):
    """Base of classifiers with a patch embedding, `layers` of stages and a `norm`, which they set themselves.

    They call `make_classifier` and define the forward pass.
    """

    layers: nn.ModuleList
    global_pool: SelectAdaptivePool2d
    head: nn.Module
    num_classes: int
    num_features: int

    def make_classifier(self, num_classes: int, global_pool: str = "avg", **factory: Any) -> None:
        """Set `global_pool`, `head` and `head_hidden_size`, the width of the head's input.

        Raises:
            ValueError: an unknown pooling.
        """
        if global_pool not in POOLINGS:
            raise ValueError(f"global_pool {global_pool!r}: known are {', '.join(map(repr, POOLINGS))}")
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool), input_fmt="NHWC")
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Linear(self.head_hidden_size, num_classes, **factory) if num_classes else nn.Identity()

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which calls this, with what to use instead.

        Raises:
            ValueError: always.
        """
        raise ValueError(not_scriptable(type(self).__name__))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's description of the layers from stem to head: one per block, or with `coarse` per stage.

        A downsampling belongs to the block before it, the final norm to the last block.
        """
        joins_previous = (99999,)  # timm's mark of a part that joins the previous layer
        blocks = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", joins_previous)]
        return {
            "stem": r"^patch_embed|^absolute_pos_embed",
            "blocks": r"^layers\.(\d+)" if coarse else [*blocks, (r"^norm", joins_previous)],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, or stop doing so."""
        for stage in self.layers:
            stage.use_checkpoint = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        """Return the linear layer from features to classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialized one on the model's device, in its dtype and mode.

        Args:
            num_classes: width of the new classifier; 0 for none.
            global_pool: how tokens become one vector: avg, max, avgmax, catavgmax, or "" to keep the map (then the
                classifier returns logits (B, H, W, num_classes)); None keeps the present pooling.
        """
        example = next(self.parameters())
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.make_classifier(num_classes, pool, device=example.device, dtype=example.dtype)
        self.global_pool.train(self.training)
        self.head.apply(init_weights).train(self.training)


def init_weights(module: nn.Module) -> None:
    """Initialize linear layers: weights truncated normal (std 0.02), biases 0; all others keep PyTorch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class TimmInterface(PyramidClassifier):
    """Methods that timm's tools call, beyond those of `PyramidClassifier`.

    Stages return their blocks' output and the next stage's tokens; the model has `embed(images)` and sets `in_chans`.
    """

    output_fmt = "NHWC"  # of forward_features
    in_chans: int
    layers: Any
    norm: nn.Module
    pretrained_cfg: dict[str, Any]  # set by timm

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters with two or more dimensions that take no weight decay."""
        return {"absolute_pos_embed"}

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Width, stride and module name of each stage's map."""
        return [
            {"num_chs": stage.dim, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks.{len(stage.blocks) - 1}"}
            for i, stage in enumerate(self.layers)
        ]

    def embed(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the first stage's tokens (B, H / 4, W / 4, C)."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the stages' maps before downsampling.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages; None for all, a number n for the last n; negative indices count from the end.
            norm: apply the final norm to the last stage's map; it fits no other.
            stop_early: skip the stages after the last requested one.
            output_fmt: format of the maps, NCHW or NHWC.
            intermediates_only: return the maps alone.

        Returns:
            (final tokens (B, H, W, C), maps), or maps if intermediates_only; each map is (B, C, H, W) or (B, H, W, C).
            The final tokens are normalized if the last stage was reached.

        Raises:
            ValueError: an unknown format.
        """
        if output_fmt not in FORMATS:
            raise ValueError(f"output_fmt {output_fmt!r}: known are {' and '.join(FORMATS)}")
        taken, last_taken = feature_take_indices(len(self.layers), indices)  # type: ignore[arg-type]
        stages = self.layers[: last_taken + 1] if stop_early else self.layers
        reaches_end = len(stages) == len(self.layers)
        maps = []
        x = output = self.embed(x)  # (B, H, W, C)
        for i, stage in enumerate(stages):
            output, x = stage(x)  # (B, H, W, C), and (B, H / 2, W / 2, 2 C) for the next
            if i in taken:
                maps.append(output)
        final = self.norm(output) if reaches_end else output
        if norm and reaches_end and len(stages) - 1 in taken:
            maps[-1] = final
        if output_fmt == "NCHW":
            maps = [tokens.permute(0, 3, 1, 2) for tokens in maps]  # (B, C, H, W)
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the parts that the wanted maps do not need; the model still runs, up to its last kept stage.

        Args:
            indices: stages whose maps are wanted, as in `forward_intermediates`.
            prune_norm: remove the final norm, even if the last stage is kept.
            prune_head: remove classifier and pooling, even if the last stage is kept.

        Returns:
            The wanted stages, counted from 0.
        """
        taken, last_taken = feature_take_indices(len(self.layers), indices)  # type: ignore[arg-type]
        shortens = last_taken < len(self.layers) - 1
        self.layers = self.layers[: last_taken + 1]
        self.layers[-1].downsample = None
        self.num_features = self.layers[-1].dim
        if prune_norm or shortens:
            self.norm = nn.Identity()
        if prune_head or shortens:
            self.reset_classifier(0, "")
        return taken

    def load_pretrained(self, path: str | Path) -> None:
        """Load a file that timm downloaded, fitted to in_chans; a classifier of another width is re-initialized.

        Raises:
            ValueError: the file cannot be read as weights, or they are of another model.
        """
        try:
            weights = load_state_dict(str(path))
        except Exception as error:  # torch.load raises many kinds for a file that is not its own, or is cut short
            raise ValueError(
                f"{path}: cannot be read as weights ({type(error).__name__}); delete it to download it again, or name "
                f"another file with pretrained_cfg_overlay=dict(file=...)"
            ) from error
        load_pretrained(
            self,
            {**self.pretrained_cfg, "state_dict": weights},
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            filter_fn=checkpoint_filter_fn,
        )


def checkpoint_filter_fn(content: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights in a file's content: of this project, the official code or timm, also EMA or bare ones.

    Raises:
        ValueError: the weights are of another model.
    """
    weights = next((content[key] for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), content)
    weights = {
        name: value for name, value in clean_state_dict(weights).items() if not name.endswith(DERIVED_KEY_SUFFIX)
    }
    own = {name for name in model.state_dict() if not name.startswith("head.")}
    missing, unknown = sorted(own - set(weights)), sorted(set(weights) - own - {"head.weight", "head.bias"})
    if missing or unknown:
        raise ValueError(
            f"these weights are of another model than {type(model).__name__} with {len(own)} tensors: "
            f"{len(missing)} are missing ({', '.join(missing[:MAX_NAMES_SHOWN])}), "
            f"{len(unknown)} are unknown ({', '.join(unknown[:MAX_NAMES_SHOWN])})"
        )
    return weights
