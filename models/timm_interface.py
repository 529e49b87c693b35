"""What timm expects of a model beside its forward pass: classifier, maps, pruning, layers, pretrained weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import clean_state_dict, load_pretrained, load_state_dict
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from models.classifier import PyramidClassifier
from models.layers import DERIVED_KEY_SUFFIX

FORMATS = ("NCHW", "NHWC")
# Where weights are kept in files of this project, of the official code and of timm; an average goes first.
WEIGHT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
MAX_NAMES_SHOWN = 3


class TimmInterface(PyramidClassifier):
    """The part of a classifier that timm's tools call, beyond what all classifiers here have.

    The stages give their blocks' output and the next stage's tokens; the model has `embed(images)` and sets `in_chans`.
    """

    output_fmt = "NHWC"  # of forward_features
    in_chans: int
    layers: Any
    norm: nn.Module
    pretrained_cfg: dict[str, Any]  # set by timm

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more dimensions that are not decayed all the same."""
        return {"absolute_pos_embed"}

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Width, stride and place of each stage's map."""
        return [
            {"num_chs": stage.dim, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks.{len(stage.blocks) - 1}"}
            for i, stage in enumerate(self.layers)
        ]

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the first stage's tokens (B, H / 4, W / 4, C)."""
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
        """The stages' maps, before downsampling.

        Args:
            x: images (B, in_chans, H, W).
            indices: which stages; None: all, a number: the last so many, negative ones count from the end.
            norm: put the last stage's map through the final norm, which fits no other.
            stop_early: leave out the stages after the last one that is asked for.
            output_fmt: NCHW or NHWC, of the maps.
            intermediates_only: give the maps alone.

        Returns:
            Maps (B, C, H, W) or (B, H, W, C), after the final tokens (B, H, W, C) unless intermediates_only; these are
            normalized if the last stage was reached.

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
        """Remove what the stages' maps do not need; what is left runs, and its features end at the last kept stage.

        Args:
            indices: which stages' maps are wanted, as in `forward_intermediates`.
            prune_norm: remove the final norm, which goes anyway if the last stage does.
            prune_head: remove the classifier and pooling, which go anyway if the last stage does.

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
        """Load a file that timm has downloaded, fitted to in_chans; a classifier of another width starts fresh.

        Raises:
            ValueError: not a file of weights, or not of this model.
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
    """The weights in what a file holds: of this project, the official code or timm, also as the average's, or bare.

    Raises:
        ValueError: they are another model's.
    """
    found = next((content[key] for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), content)
    weights = {name: value for name, value in clean_state_dict(found).items() if not name.endswith(DERIVED_KEY_SUFFIX)}
    own = {name for name in model.state_dict() if not name.startswith("head.")}
    missing, unknown = sorted(own - set(weights)), sorted(set(weights) - own - {"head.weight", "head.bias"})
    if missing or unknown:
        raise ValueError(
            f"these weights are of another model than {type(model).__name__} with {len(own)} tensors: "
            f"{len(missing)} are missing ({', '.join(missing[:MAX_NAMES_SHOWN])}), "
            f"{len(unknown)} are unknown ({', '.join(unknown[:MAX_NAMES_SHOWN])})"
        )
    return weights
