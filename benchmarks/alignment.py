"""What channel multiples are worth: widths on the target's multiples against widths off them, at equal multiply-adds.

    python benchmarks/alignment.py [--macs 0.5] [--rounds 3]

Both networks of a pair are pruned by the same ranges to the same budget, one with the multiples of the target that
`host` stands for, one with every width allowed and the widths that happen to lie on a multiple moved one off it. They
are timed against each other, interleaved, with one thread; weights are timm's random ones, since only time is asked.
Results: benchmarks/results/alignment-HOST.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mm_edge  # noqa: F401  (first: makes timm importable beside CPU-only torch)

# isort: split
import onnx_ir as ir
import timm
import torch

from mm_edge.bench.session import environment, measure_pair
from mm_edge.bench.target import Target, load_target, resolve_host
from mm_edge.bench.transport import LocalTransport
from mm_edge.formats.device_files import write_model
from mm_edge.graph.compact import materialise
from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import export_raw
from mm_edge.graph.groups import read_structure
from mm_edge.graph.layers import read_layer_weights, read_layers
from mm_edge.graph.widths import Counts, allowed_widths, group_scores, select_indices
from mm_edge.plan.ranges import apply_constraints, rule_ranges
from mm_edge.plan.scaling import plan_budget
from mm_edge.plan.scores import score_weights
from mm_edge.plan.target_widths import allowed_widths_on, channel_multiple
from mm_edge.store import write_atomically

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = ("resnet18", "tf_efficientnet_lite0")
PAIRS = 400


def make_both(name: str, fraction: float, target: Target, folder: Path) -> dict[str, Any]:
    """Write the dense network and the two pruned ones; return what is left of the multiply-adds and the files."""
    torch.manual_seed(0)
    module = timm.create_model(name).eval()
    raw = export_raw(module, torch.zeros(1, *module.pretrained_cfg["input_size"]))
    structure, layers = read_structure(raw), read_layers(raw)
    scores = score_weights(read_layer_weights(raw, layers), {}, ("magnitude",))["magnitude"]
    ranges = apply_constraints(layers, rule_ranges(layers, type(module).__name__), structured=True)
    multiples = {group.leaf: channel_multiple(group, layers, target, ("fp32",)) for group in structure.groups}
    fine = tuple(allowed_widths(group, 1) for group in structure.groups)
    _, aligned = plan_budget(structure, layers, allowed_widths_on(structure, layers, target), ranges, fraction)
    _, loose = plan_budget(structure, layers, fine, ranges, fraction)
    sizes = {group.leaf: group.size for group in structure.groups}
    unaligned: Counts = {
        leaf: count - 1 if count < sizes[leaf] and count > 1 and count % multiples[leaf] == 0 else count
        for leaf, count in loose.items()
    }
    found: dict[str, Any] = {"dense": {"macs": 1.0, "file": folder / f"{name}.onnx"}}
    write_model(ir.to_proto(deploy(raw.model.clone())), found["dense"]["file"])
    for kind, counts in (("aligned", aligned), ("unaligned", unaligned)):
        keep = select_indices(counts, group_scores(structure, scores))
        path = folder / f"{name}-{kind}.onnx"
        write_model(ir.to_proto(deploy(materialise(raw, structure, keep))), path)
        found[kind] = {
            "macs": structure.macs({leaf: float(count) for leaf, count in counts.items()}) / structure.macs(),
            "on_a_multiple": sum(count % multiples[leaf] == 0 for leaf, count in counts.items()),
            "groups": len(counts),
            "file": path,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    target = replace(resolve_host(load_target("host")), threads=1)
    transport = LocalTransport()
    env = environment(target, transport)
    document: dict[str, Any] = {"macs": arguments.macs, "threads": 1, "target": target.name}
    document["environment"] = {key: env.get(key) for key in ("cpu_model", "cores", "onnxruntime", "os")}
    with tempfile.TemporaryDirectory() as scratch:
        for name in NETWORKS:
            found = make_both(name, arguments.macs, target, Path(scratch))
            dense, aligned, unaligned = (found[kind]["file"] for kind in ("dense", "aligned", "unaligned"))
            pairs = {"aligned over unaligned": (unaligned, aligned)}
            pairs |= {"aligned": (dense, aligned), "unaligned": (dense, unaligned)}
            rows: dict[str, list[Any]] = {what: [] for what in pairs}
            for _ in range(arguments.rounds):
                for what, (reference, model) in pairs.items():
                    timed = measure_pair(reference, model, target, transport=transport, pairs=PAIRS)
                    row = {"speedup": timed.speedup, "ci": timed.speedup_ci, "p50_ms": timed.latency.p50}
                    rows[what].append({**row, "doubts": [doubt.kind for doubt in timed.doubts]})
            kept = {kind: {k: v for k, v in found[kind].items() if k != "file"} for kind in ("aligned", "unaligned")}
            document[name] = {"networks": kept, "rounds": rows}
            print(name, json.dumps(document[name], indent=1))
    out = ROOT / "benchmarks" / "results" / f"alignment-{'-'.join(str(env.get('cpu_model')).lower().split())}.json"
    write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
