"""What a classifier of stages shares with others: timm's interface, freezing, and the way from tokens to logits."""

from typing import Any

from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

POOLINGS = ("avg", "max", "avgmax", "catavgmax", "")


class PyramidClassifier(nn.Module):
    """A patch embedding, `layers` of stages and `norm`; the models set these, call `make_classifier`, and give
    `forward_features`.
    """

    layers: nn.ModuleList
    global_pool: SelectAdaptivePool2d
    head: nn.Module
    num_classes: int
    num_features: int
    is_backbone_frozen = False

    def make_classifier(self, num_classes: int, global_pool: str = "avg", **factory: Any) -> None:
        """Set `global_pool`, `head` and `head_hidden_size`, the width of what the head takes.

        Raises:
            ValueError: an unknown pooling.
        """
        if global_pool not in POOLINGS:
            raise ValueError(f"global_pool {global_pool!r}: known are {', '.join(map(repr, POOLINGS))}")
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool), input_fmt="NHWC")
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Linear(self.head_hidden_size, num_classes, **factory) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers, from the stem to the head: a block each, or with `coarse` a stage each.

        A downsampling belongs to the block before it, the final norm to the last block.
        """
        joins_previous = (99999,)  # timm's mark for what joins the layer before
        blocks = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", joins_previous)]
        return {
            "stem": r"^patch_embed|^absolute_pos_embed",
            "blocks": r"^layers\.(\d+)" if coarse else [*blocks, (r"^norm", joins_previous)],
        }

    def freeze_backbone(self) -> None:
        """Leave only the classifier to training.

        All else takes no gradient and stays in evaluation mode whatever `train` says, so that batch norm's statistics
        do not move and nothing is dropped.

        Raises:
            ValueError: there is no classifier.
        """
        if not self.num_classes:
            raise ValueError("only a model with a classifier can have its backbone frozen; num_classes is 0")
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        self.is_backbone_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> "PyramidClassifier":
        super().train(mode)
        if self.is_backbone_frozen:
            for child in self.children():
                child.train(mode and child is self.head)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass, or stop doing so."""
        for stage in self.layers:
            stage.use_checkpoint = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        """The linear layer from features to classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, on the device, in the dtype and in the mode of the model.

        Args:
            num_classes: width of the new one; 0 for none.
            global_pool: how tokens become one vector: avg, max, avgmax, catavgmax, or "" to leave the map (then a
                classifier gives logits (B, H, W, num_classes)); None keeps what there is.
        """
        example = next(self.parameters())
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.make_classifier(num_classes, pool, device=example.device, dtype=example.dtype)
        self.global_pool.train(self.training)
        self.head.apply(init_weights).train(self.training)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to normalized tokens of the last stage, (B, H / 32, W / 32, num_features)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, H, W, C) to logits (B, num_classes), or if pre_logits to one vector (B, head_hidden_size)."""
        x = self.global_pool(x)  # (B, C), the mean in the paper
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def init_weights(module: nn.Module) -> None:
    """Linear weights truncated normal 0.02 and biases 0; norms and convolutions keep PyTorch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
