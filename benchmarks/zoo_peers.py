"""What Torch-Pruning and onnxsim leave of the zoo's networks at channel ratio 0.5, beside our `--macs 0.50`.

    pip install torch-pruning==1.6.1 onnxsim==0.8.1        (for this benchmark only, in an environment of its own)
    python benchmarks/zoo_peers.py --work DIR [--only FAMILY,...] [--limit SECONDS]

The same networks as benchmarks/zoo.py, one process each, resumable. Torch-Pruning is given the classifier to ignore
and the number of heads of every attention whose queries, keys and values are one layer, which it is told to prune by
heads; the model counts as working when it runs afterwards and its output keeps its shape. onnxsim simplifies the
exported graph and removes channels of it. Its multiply-adds are counted by our reader, Torch-Pruning's by PyTorch's
FlopCounterMode, each against the dense network counted the same way.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mm_edge  # noqa: F401  before timm, which it makes importable beside CPU-only torch

# isort: split
import numpy as np
import onnx
import onnx_ir as ir
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import ROOT, randomise_, representatives

from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import export_raw
from mm_edge.graph.groups import read_structure
from mm_edge.graph.onnx_graph import raw_from_onnx
from mm_edge.quality.parity import onnx_runner

RESULT = ROOT / "benchmarks" / "results" / "zoo_peers.json"
RATIO = 0.5


def torch_macs(module: nn.Module, inputs: torch.Tensor) -> float:
    """Return the multiply-adds of one forward pass, as PyTorch's own counter finds them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(inputs)
    return counter.get_total_flops() / 2


def by_torch_pruning(module: nn.Module, inputs: torch.Tensor) -> dict[str, Any]:
    """Prune `module` in place."""
    import torch_pruning

    classes = module(inputs).shape[-1]
    heads = {part.qkv: part.num_heads for part in module.modules() if _is_fused_attention(part)}
    ignored = [part for part in module.modules() if isinstance(part, nn.Linear) and part.out_features == classes]
    dense, shape = torch_macs(module, inputs), module(inputs).shape
    pruner = torch_pruning.pruner.BasePruner(
        module,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=ignored,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=RATIO,
    )
    pruner.step()
    for part in module.modules():
        if _is_fused_attention(part) and part.qkv in pruner.num_heads:
            part.num_heads = pruner.num_heads[part.qkv]
            part.head_dim = part.qkv.out_features // (3 * part.num_heads)
            if hasattr(part, "attn_dim"):
                part.attn_dim = part.qkv.out_features // 3
    return {
        "macs_ratio": torch_macs(module, inputs) / dense,
        "runs": True,
        "same_shape": module(inputs).shape == shape,
    }


def _is_fused_attention(part: nn.Module) -> bool:
    return isinstance(getattr(part, "qkv", None), nn.Linear) and isinstance(getattr(part, "num_heads", None), int)


def by_onnxsim(module: nn.Module, inputs: torch.Tensor) -> dict[str, Any]:
    """Prune the exported graph of `module`."""
    import onnxsim

    raw = export_raw(module, inputs)
    dense = read_structure(raw).macs()
    shapes = [out.shape for out in onnx_runner(raw.model)(inputs.numpy())]
    simplified, _ = onnxsim.simplify(ir.to_proto(deploy(raw.model.clone())))
    pruned = onnxsim.apply_structured_pruning(simplified, sparsity=RATIO)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.onnx"
        onnx.save(pruned, str(path))
        outputs = onnx_runner(path)(inputs.numpy())
        macs = read_structure(raw_from_onnx(path)).macs()
    finite = all(bool(np.isfinite(out).all()) for out in outputs)
    return {"macs_ratio": macs / dense, "runs": finite, "same_shape": [out.shape for out in outputs] == shapes}


PEERS: dict[str, Callable[[nn.Module, torch.Tensor], dict[str, Any]]] = {
    "torch-pruning": by_torch_pruning,
    "onnxsim": by_onnxsim,
}


def run_child(peer: str, name: str, shape: Sequence[int]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = timm.create_model(name).eval()
    randomise_(module, shape)
    try:
        row = PEERS[peer](module, torch.randn(1, *shape))
    except Exception as error:
        row = {"runs": False, "error": f"{type(error).__name__}: {str(error)[:200]}"}
    print(json.dumps(row))


def run_one(peer: str, chosen: dict[str, Any], limit: float) -> dict[str, Any]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--one",
        peer,
        chosen["name"],
        *map(str, chosen["input_shape"]),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"runs": False, "error": f"not done after {limit:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"runs": False, "error": f"exit {done.returncode}: {done.stderr[-200:]}"}


def works(row: dict[str, Any]) -> bool:
    return bool(row["runs"] and row["same_shape"])


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"ratio": RATIO, "families": len(rows), "rows": rows}
    summary["versions"] = {name: importlib.metadata.version(name) for name in ("timm", "torch", "onnxruntime", *PEERS)}
    for peer in PEERS:
        ratios = [row[peer]["macs_ratio"] for row in rows if works(row[peer])]
        summary[peer] = {
            "works": len(ratios),
            "median_macs_ratio": statistics.median(ratios) if ratios else None,
            "at_most_0.75": sum(ratio <= 0.75 for ratio in ratios),
            "at_most_0.50": sum(ratio <= 0.50 for ratio in ratios),
            "not_pruned": sum(ratio > 0.999 for ratio in ratios),
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description="Torch-Pruning and onnxsim on the zoo's networks, at ratio 0.5.")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", default="", help="comma-separated families, done again")
    parser.add_argument("--limit", type=float, default=120)
    parser.add_argument("--one", nargs=5, metavar=("PEER", "NAME", "C", "H", "W"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_child(arguments.one[0], arguments.one[1], [int(size) for size in arguments.one[2:]])
        return
    if arguments.work is None:
        parser.error("--work DIR is needed")
    arguments.work.mkdir(parents=True, exist_ok=True)
    listing = arguments.work / "families.list"
    if not listing.exists():
        listing.write_text(json.dumps(representatives(), indent=1))
    families: dict[str, dict[str, Any]] = json.loads(listing.read_text())
    only = [name for name in arguments.only.split(",") if name]
    for family in only or families:
        path = arguments.work / f"{family}.json"
        if only or not path.exists():
            row = {peer: run_one(peer, families[family], arguments.limit) for peer in PEERS}
            path.write_text(json.dumps({"family": family, "name": families[family]["name"], **row}))
            print(path.read_text(), flush=True)
    if all((arguments.work / f"{family}.json").exists() for family in families):
        rows = [json.loads((arguments.work / f"{family}.json").read_text()) for family in families]
        RESULT.write_text(json.dumps(summarise(rows), indent=1) + "\n")
        print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
