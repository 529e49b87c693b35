"""MLLA and the paper's ablations; importing this registers mlla_tiny, mlla_small, mlla_base (and mila_*) in timm."""

from models.ablations import ABLATIONS
from models.build import build_model, input_channels
from models.inference import prepare_for_inference
from models.linear_vit import LinearViT
from models.mlla import MLLA
from models.unified_block import Switches
from models.variants import (
    MLLA_FIGURES,
    PaperFigures,
    mila_base,
    mila_small,
    mila_tiny,
    mlla_base,
    mlla_small,
    mlla_tiny,
)

# What the paper prints of the models that cfgs/ describes, by MODEL.NAME.
PAPER_FIGURES = {**MLLA_FIGURES, **{row.model: PaperFigures(row.parameters_m, row.gmacs) for row in ABLATIONS}}

__all__ = [
    "ABLATIONS",
    "MLLA",
    "PAPER_FIGURES",
    "LinearViT",
    "Switches",
    "build_model",
    "input_channels",
    "mila_base",
    "mila_small",
    "mila_tiny",
    "mlla_base",
    "mlla_small",
    "mlla_tiny",
    "prepare_for_inference",
]
