"""Entry points of torch.hub: torch.hub.load(<this folder>, "mlla_tiny", source="local", pretrained=True)."""

import sys
from pathlib import Path

dependencies = ["torch", "timm"]

if "models" in sys.modules and Path(sys.modules["models"].__file__ or "").parent.parent != Path(__file__).parent:
    raise ImportError(
        f"another package named `models` is loaded, from {sys.modules['models'].__file__}; "
        f"`pip install {Path(__file__).parent}` and `import mlla` instead"
    )

from models.variants import mila_base, mila_small, mila_tiny, mlla_base, mlla_small, mlla_tiny  # noqa: E402

__all__ = ["mila_base", "mila_small", "mila_tiny", "mlla_base", "mlla_small", "mlla_tiny"]
