"""The one peer that prunes a user's .onnx: onnxsim's structured pruning, at a share of the multiply-adds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from mm_edge.graph.groups import read_structure
from mm_edge.graph.onnx_graph import raw_from_onnx
from mm_edge.load.network import ModelInput

HALVINGS = 7


def count_macs(model: Path, name: str, shape: tuple[int, ...]) -> int:
    """Return the multiply-adds of a file whose input `name` has a `shape`."""
    return int(read_structure(raw_from_onnx(model, [ModelInput(name, shape, shape, shape, "float32")])).macs())


def prune_by_onnxsim(source: Path, name: str, shape: tuple[int, ...], fraction: float, out: Path) -> dict[str, Any]:
    """Write the file of fewest multiply-adds, at least `fraction` of dense, and return its sparsity and share.

    The sparsity is found by bisection on the simplified file. Without a fitting one, a reason is returned.
    """
    import onnxsim  # in an environment of its own, with an onnx it goes with

    simplified, _ = onnxsim.simplify(str(source))
    dense = count_macs(source, name, shape)
    low, high, best = 0.0, 1.0, 1.0
    for _ in range(HALVINGS):
        sparsity = (low + high) / 2
        pruned = onnxsim.apply_structured_pruning_cpp(simplified, sparsity=sparsity)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pruned.onnx"
            onnx.save(pruned, str(path))
            left = count_macs(path, name, shape) / dense
            if left >= fraction:
                low, best = sparsity, left
                out.write_bytes(path.read_bytes())
            else:
                high = sparsity
    if not out.is_file():
        return {"reason": f"no sparsity leaves {fraction} of the MACs or more"}
    return {"sparsity": low, "macs_fraction": round(best, 4)}


def try_onnxsim(
    source: Path, name: str, shape: tuple[int, ...], fraction: float, out: Path, judge: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Return onnxsim's row at a share of the multiply-adds, with what `judge` says of its file."""
    try:
        found = prune_by_onnxsim(source, name, shape, fraction, out)
        return found | (judge(out) if "sparsity" in found else {})
    except Exception as error:  # a peer may fail in any way; its row says how
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
