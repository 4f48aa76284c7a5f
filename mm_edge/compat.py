"""Makes timm importable where torchvision's compiled operators cannot be loaded.

The torchvision wheel beside a CPU-only torch is built against a CUDA torch, so its library of compiled operators does
not load. torchvision tolerates that, but then attaches shape functions to `torchvision::nms` and `torchvision::qnms`,
which without the library do not exist: the import fails, and with it the import of timm. Declaring the two schemas
(no kernels) is enough; nothing here or in timm's classification models calls them.

Declaring them takes PyTorch, which is slow to import. `watch_imports` therefore waits until torchvision or timm is
about to be imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_NMS_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_WATCHED = ("torchvision", "timm")

# The object is kept as long as the process runs, because its definitions are removed with it.
_declared: torch.library.Library | None = None


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds no module; calls `make_timm_importable` before the first import of torchvision or timm, once."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._done = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in _WATCHED:
            # Other threads wait until the schemas are declared. This thread comes here again when
            # make_timm_importable looks for torchvision.
            with self._lock:
                if not self._done:
                    self._done = True
                    make_timm_importable()
                    # Assign a new list, because the current import iterates over the old one.
                    sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        return None


def watch_imports() -> None:
    """Make timm importable just before torchvision or timm is first imported; PyTorch is not imported before.

    Nothing changes where torchvision has been imported already. Safe to call again.
    """
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def make_timm_importable() -> None:
    """Declare the operator schemas torchvision needs, only where its own cannot be loaded.

    Called before timm or torchvision is imported. Where the compiled operators load, or torchvision is absent, nothing
    changes. Safe to call again.
    """
    import torch

    global _declared
    missing = [name for name in _NMS_SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if not missing or _load_compiled_operators():
        return
    _declared = _declared or torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in missing:
        _declared.define(_NMS_SCHEMAS[name])  # type: ignore[no-untyped-call]


def _load_compiled_operators() -> bool:
    """Load torchvision's compiled library as torchvision does; return False if that fails, True if there is none."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True
    folder = spec.submodule_search_locations[0]
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    extension = importlib.machinery.FileFinder(folder, loader).find_spec("_C")
    if extension is None or extension.origin is None or not Path(extension.origin).is_file():
        return False
    import torch

    try:
        torch.ops.load_library(extension.origin)  # type: ignore[no-untyped-call]
    except (ImportError, OSError):
        return False
    return True
