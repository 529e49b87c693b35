"""MLLA and the paper's ablations; the import registers mlla_tiny, mlla_small, mlla_base (and mila_*) in timm."""

from models.build import build_model, input_channels
from models.kernels.fused_modules import use_kernels
from models.kernels.inference import prepare_for_inference
from models.mlla import MLLA
from models.unified.block import Switches
from models.unified.linear_vit import LinearViT
from models.unified.paper_rows import ABLATIONS
from models.variants import (
    MLLA_PROFILES,
    PaperProfile,
    mila_base,
    mila_small,
    mila_tiny,
    mlla_base,
    mlla_small,
    mlla_tiny,
)

# Profiles in the paper of the models in cfgs/, by MODEL.NAME.
PAPER_PROFILES = {**MLLA_PROFILES, **{row.model: PaperProfile(row.parameters_m, row.gmacs) for row in ABLATIONS}}

__all__ = [
    "ABLATIONS",
    "MLLA",
    "PAPER_PROFILES",
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
    "use_kernels",
]
