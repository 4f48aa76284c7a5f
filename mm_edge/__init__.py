"""mm-edge: a trained vision model in, a measurably faster model on a named edge device out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# PyTorch's OpenMP threads wait by spinning, which takes the core from whatever else runs: beside one busy program a
# ViT-Tiny with two threads on two cores took 490 ms an image, 76 ms with threads that sleep. Read once, by torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from mm_edge.compat import watch_imports

if TYPE_CHECKING:
    from mm_edge.api import Result, prune_export

watch_imports()

__version__ = "0.1.0"
__all__ = ["Result", "__version__", "prune_export"]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and PyTorch with it, only when it is asked for."""
    if name in ("Result", "prune_export"):
        from mm_edge import api

        return getattr(api, name)
    raise AttributeError(f"module 'mm_edge' has no attribute '{name}'")
