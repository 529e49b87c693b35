"""Rows of the paper's tables 1 and 2, with the results it reports; cfgs/ablation/<name>.yaml is each one's model."""

from typing import NamedTuple


class Ablation(NamedTuple):
    """One row: a LinearViT at 224x224, trained on ImageNet-1K for 300 epochs.

    Args:
        name: name of the configuration in cfgs/ablation.
        label: difference from the baseline.
        table: 1 or 2.
        parameters_m: parameters, in millions.
        gmacs: multiply-accumulates per image, in 10^9; the paper calls them FLOPs.
        images_per_second: inference speed on an RTX 3090, batch size and precision not stated.
        top1: top-1 accuracy, in percent.
    """

    name: str
    label: str
    table: int
    parameters_m: float
    gmacs: float
    images_per_second: int
    top1: float

    @property
    def model(self) -> str:
        """MODEL.NAME of the configuration."""
        return f"linear_vit_{self.name}"


ABLATIONS = (
    Ablation("baseline", "baseline", 1, 28, 4.5, 1152, 77.6),
    Ablation("input_gate", "+ input gate", 1, 29, 4.5, 1069, 77.8),
    Ablation("forget_gate", "+ forget gate", 1, 29, 4.8, 743, 78.4),
    Ablation("shortcut", "+ shortcut", 1, 28, 4.5, 1066, 77.8),
    Ablation("no_norm", "- normalization", 1, 28, 4.5, 1215, 72.4),
    Ablation("single_head", "- multi-head", 1, 24, 3.9, 1540, 73.5),
    Ablation("block_all", "+ block design, all", 1, 28, 4.7, 915, 79.4),
    Ablation("block_sub", "+ block design, sub", 1, 31, 4.8, 1010, 80.9),
    Ablation("ape", "+ APE", 2, 30, 4.5, 1132, 80.0),
    Ablation("lepe", "+ LePE", 2, 28, 4.5, 1074, 81.6),
    Ablation("cpe", "+ CPE", 2, 28, 4.5, 1099, 81.7),
    Ablation("rope", "+ RoPE", 2, 28, 4.5, 1113, 80.0),
)
