"""MLLA models; importing this package registers mlla_tiny, mlla_small, mlla_base (and mila_*) in timm."""

from models.build import build_model
from models.mlla import MLLA
from models.variants import PAPER_FIGURES, mila_base, mila_small, mila_tiny, mlla_base, mlla_small, mlla_tiny

__all__ = [
    "MLLA",
    "PAPER_FIGURES",
    "build_model",
    "mila_base",
    "mila_small",
    "mila_tiny",
    "mlla_base",
    "mlla_small",
    "mlla_tiny",
]
