"""Makes timm importable where torchvision's compiled operators cannot be loaded.

The torchvision wheel beside a CPU-only torch is built against a CUDA torch, so its library of compiled operators does
not load. torchvision tolerates that, but then attaches shape functions to `torchvision::nms` and `torchvision::qnms`,
which without the library do not exist: the import fails, and with it the import of timm. Declaring the two schemas
(no kernels) is enough; nothing here or in timm's classification models calls them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import torch

_NMS_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A library's definitions vanish with the object that made them, so it lives as long as the process.
_declared: torch.library.Library | None = None


def make_timm_importable() -> None:
    """Declare the operator schemas torchvision needs, only where its own cannot be loaded.

    Call before timm or torchvision is imported. Where the compiled operators load, or torchvision is absent, nothing
    changes. Safe to call again.
    """
    global _declared
    missing = [name for name in _NMS_SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if not missing or _load_compiled_operators():
        return
    _declared = _declared or torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in missing:
        _declared.define(_NMS_SCHEMAS[name])  # type: ignore[no-untyped-call]


def _load_compiled_operators() -> bool:
    """Load torchvision's compiled library the way torchvision does; False when it refuses, True when there is none."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True
    folder = spec.submodule_search_locations[0]
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    extension = importlib.machinery.FileFinder(folder, loader).find_spec("_C")
    if extension is None or extension.origin is None or not Path(extension.origin).is_file():
        return False
    try:
        torch.ops.load_library(extension.origin)  # type: ignore[no-untyped-call]
    except (ImportError, OSError):
        return False
    return True
