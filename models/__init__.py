"""MLLA models; importing this package registers mlla_tiny, mlla_small and mlla_base in timm."""

from models.build import build_model
from models.mlla import MLLA
from models.variants import PAPER_FIGURES, mlla_base, mlla_small, mlla_tiny

__all__ = ["MLLA", "PAPER_FIGURES", "build_model", "mlla_base", "mlla_small", "mlla_tiny"]
