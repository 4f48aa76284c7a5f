"""EfficientNet-Lite0 without labels and without training: what width, blocks and input size keep under a budget.

    python benchmarks/lite0.py CHECKPOINT IMAGES.tar --work FOLDER [--seeds 0,1,2] [--tune 0.7,0.52]
    python benchmarks/lite0.py CHECKPOINT IMAGES.tar --work FOLDER --report [--measure]

Per seed the images are split in half: one half to calibrate, unlabelled, the other to evaluate. As `--macs` of
`mm-edge prune-export --split 0.5,0.5,0 --recover closed-form` does, every budget is spent on widths with none to three
residual blocks removed, whichever diverges least on held-back calibration images; the winner is walked.

    control   the dense network on smaller pictures
    full      at 224 pixels
    sized     at 192 pixels, and at 160 where the whole network is within the budget
    ...-tuned the networks of the budgets that --tune names, tuned where that is better: block by block, and at fewer
              pixels then taught by the network at 224

Networks and rows are kept in FOLDER, so that a run that was stopped goes on. --report gathers them into
benchmarks/results/lite0.json; with --measure every network that was not yet is first timed against the dense one,
inferences in turn, one thread (do that on a quiet machine).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from latency_aware import read_sensitivities

from mm_edge.bench.session import measure_pair
from mm_edge.bench.target import load_target, resolve_host
from mm_edge.bench.transport import LocalTransport
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import materialise
from mm_edge.graph.deploy import deploy
from mm_edge.graph.depth import find_branches, renamed
from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.graph.layers import read_layers
from mm_edge.graph.onnx_graph import read_raw
from mm_edge.graph.sizes import export_at, match_groups, remake
from mm_edge.load.data import DataSplits, open_data
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.plan.target_widths import allowed_widths_on
from mm_edge.quality.evaluation import compare_logits, run_onnx
from mm_edge.recover.closed_form.branches import allocate_rest, measure_branches, offers
from mm_edge.recover.closed_form.context import RecoveryContext, build_context
from mm_edge.recover.training.adapt import tune_for
from mm_edge.run.closed_form import recover_keep
from mm_edge.run.networks import recovery_images
from mm_edge.runtime import cores

RESULTS = Path(__file__).resolve().parent / "results" / "lite0.json"
FULL = (0.6, 0.7, 0.75, 0.8, 0.85)
# Sides and budgets. Where the whole network is within a budget nothing is pruned, and only tuning changes it.
SIZED = ((192, 0.75), (192, 0.63), (192, 0.59), (192, 0.52), (160, 0.52))
CONTROLS = (192, 176, 160)
PAIRS = 120


@dataclass(frozen=True)
class At:
    """The network at one input size: its graph, its images, and how its leaves are called at 224 pixels."""

    side: int
    module: torch.nn.Module
    raw: RawGraph
    structure: Structure
    allowed: Any
    data: DataSplits
    leaves: Mapping[Any, Any]


@dataclass(frozen=True)
class Spent:
    """A budget spent: what stays without some blocks, and its divergence when screened."""

    kl: float
    keep: Keep
    sensitivities: Any
    removed: tuple[str, ...]


class Seed:
    """One split of the images."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.model = load_model(options.checkpoint, LoadOptions())
        self.target = resolve_host(load_target("host"))
        raw = read_raw(self.model)
        structure, layers = read_structure(raw), read_layers(raw)
        data = open_data(options.images, self.model.input, self.model.info.num_classes, (0.5, 0.5, 0.0), seed)
        allowed = allowed_widths_on(structure, layers, self.target)
        module = self.model.module
        self.full = At(
            224, module, raw, structure, allowed, data, {group.leaf: group.leaf for group in structure.groups}
        )
        self.labels = data.validation.labels
        self.answers = run_onnx(_bytes(raw.model.clone()), data.validation.batches(50), cores())
        self.contexts: dict[int, RecoveryContext] = {}
        self.sizes: dict[int, At] = {}

    def run(self) -> None:
        self.record("dense", 1.0, self.full, {}, {}, {})
        for side in CONTROLS:
            self.record("control", 1.0, self.at(side), {}, {}, {})
        full = [fraction for fraction in FULL if self.lacks("full", self.full.side, fraction)]
        sized = [(side, fraction) for side, fraction in SIZED if self.lacks("sized", side, fraction)]
        if not full and not sized:
            return
        started = time.monotonic()
        context = self.context(self.full)
        kept = self.options.work / f"sensitivities-{self.seed}.safetensors"
        sensitivities = read_sensitivities(kept, context, self.full.allowed)
        branches = measure_branches(context, find_branches(self.full.raw.model, self.full.structure))
        shared = {"shared_seconds": round(time.monotonic() - started, 1)}
        for fraction in full:
            self.make("full", fraction, self.full, context, sensitivities, branches, shared)
        for side, fraction in sized:
            smaller = self.at(side)
            # The network to come near to is the one given, not what it says of smaller pictures.
            own = replace(self.context(smaller), logits=context.logits)
            self.make("sized", fraction, smaller, own, sensitivities, branches, shared)

    def context(self, at: At) -> RecoveryContext:
        if at.side not in self.contexts:
            images = recovery_images(at.data)
            self.contexts[at.side] = build_context(at.raw, at.structure, images, threads=cores(), module=at.module)
        return self.contexts[at.side]

    def lacks(self, kind: str, side: int, fraction: float) -> bool:
        """Return whether a row is missing, or its tuned one that is asked for."""
        kinds = (kind, f"{kind}-tuned") if fraction in self.options.tune else (kind,)
        return not all(self.path(name, side, fraction).exists() for name in kinds)

    def search(
        self, at: At, context: RecoveryContext, sensitivities: Any, branches: Any, fraction: float, known: Any
    ) -> list[Spent]:
        """Return the ways of spending a budget at one size, recovered by the dense moments; one, where it is known."""
        own = {at.leaves[leaf]: item for leaf, item in sensitivities.items()}
        budget = fraction * self.full.structure.macs()
        tried = []
        for removed in offers(branches, lambda branch: branch.macs):
            if known is not None and known != [item.id for item in removed]:
                continue
            if at.structure.macs() <= budget and removed:
                continue
            gone = [renamed(item, at.leaves) for item in removed]
            keep = allocate_rest(at.structure, at.structure.mac_cost, own, gone, budget, at.allowed)
            found = recover_keep(context, keep, "auto", own, walked=False)
            tried.append(Spent(found.kl_held_back or 0.0, keep, own, tuple(item.id for item in removed)))
        return tried

    def make(
        self,
        kind: str,
        fraction: float,
        at: At,
        context: RecoveryContext,
        sensitivities: Any,
        branches: Any,
        more: dict[str, Any],
    ) -> None:
        """Spend a budget, walk what diverges least, keep it; and tune it where that is asked for."""
        started = time.monotonic()
        kept = self.path(kind, at.side, fraction)
        known = json.loads(kept.read_text())["removed_blocks"] if kept.exists() else None
        tried = self.search(at, context, sensitivities, branches, fraction, known)
        best = min(tried, key=lambda item: item.kl)
        searched = time.monotonic()
        found = recover_keep(context, best.keep, "auto", best.sensitivities, walked=True)
        keep = {**best.keep, **found.keep}
        more = {
            **more,
            "removed_blocks": best.removed,
            "search_seconds": round(searched - started, 1),
            "walk_seconds": round(time.monotonic() - searched, 1),
            "screened": [{"removed": item.removed, "kl": round(item.kl, 4)} for item in tried],
            "kl_held_back": found.kl_held_back,
            "notes": found.notes,
        }
        self.record(kind, fraction, at, keep, found.tensors, more)
        if fraction in self.options.tune:
            started = time.monotonic()
            tuned = tune_for(context, self.context(self.full), keep, found.fitted, seed=self.seed)
            more = {"tune_seconds": round(time.monotonic() - started, 1), "note": tuned.note}
            tensors = tuned.tensors if tuned.better else found.tensors
            self.record(f"{kind}-tuned", fraction, at, keep, tensors, more)

    def at(self, side: int) -> At:
        if side not in self.sizes:
            self.sizes[side] = self.remade(side)
        return self.sizes[side]

    def remade(self, side: int) -> At:
        model = remake(self.model, side)
        raw = export_at(model)
        structure = read_structure(raw)
        layers = tuple(layer for layer in read_layers(raw) if layer.fqn in raw.weights)
        allowed = allowed_widths_on(structure, layers, self.target)
        leaves = match_groups(self.full.structure, structure, side)
        data = self.full.data.prepared_for(model.input)
        return At(side, model.module, raw, structure, allowed, data, leaves)

    def path(self, kind: str, side: int, fraction: float) -> Path:
        return self.options.work / f"row-{self.seed}-{kind}-{side}-{fraction:.3f}.json"

    def record(self, kind: str, fraction: float, at: At, keep: Any, tensors: Any, more: dict[str, Any]) -> None:
        path = self.path(kind, at.side, fraction)
        if path.exists():
            return
        artifact = path.with_suffix(".onnx")
        artifact.write_bytes(_bytes(materialise(at.raw, at.structure, keep, tensors)))
        result = compare_logits(run_onnx(artifact, at.data.validation.batches(50), cores()), self.labels, self.answers)
        dense = compare_logits(self.answers, self.labels, None)
        macs = at.structure.macs({leaf: float(kept.sum()) for leaf, kept in keep.items()})
        row = {
            "seed": self.seed,
            "kind": kind,
            "side": at.side,
            "budget": fraction,
            "macs": round(macs / self.full.structure.macs(), 4),
            "top1": result.accuracy_top1,
            "drop_points": round(100 * (dense.accuracy_top1 - result.accuracy_top1), 2),
            "agreement": result.agreement_top1,
            "kl": round(result.kl_to_dense, 4),
            "artifact": artifact.name,
            **more,
        }
        path.write_text(json.dumps(row))
        print(json.dumps(row), flush=True)


def measure(options: argparse.Namespace, row: dict[str, Any]) -> None:
    """Time a row's network against the dense one of its seed."""
    target = replace(resolve_host(load_target("host")), threads=1)
    dense = options.work / f"row-{row['seed']}-dense-224-1.000.onnx"
    with LocalTransport() as transport:
        found = measure_pair(dense, options.work / row["artifact"], target, transport=transport, pairs=PAIRS)
    row["speedup"], row["speedup_ci"] = found.speedup, found.speedup_ci


def report(options: argparse.Namespace) -> None:
    """Gather the rows, with means over the seeds, into RESULTS."""
    rows = []
    for path in sorted(options.work.glob("row-*.json")):
        row = json.loads(path.read_text())
        if options.measure and row["kind"] != "dense" and "speedup" not in row:
            measure(options, row)
            path.write_text(json.dumps(row))
        rows.append(row)
    means = []
    for key in sorted({(row["kind"], row["side"], row["budget"]) for row in rows}):
        same = [row for row in rows if (row["kind"], row["side"], row["budget"]) == key]
        names = ("macs", "top1", "drop_points", "agreement", "kl", "speedup", "walk_seconds", "tune_seconds")
        found = {name: _mean([row.get(name) for row in same]) for name in names}
        means.append({"kind": key[0], "side": key[1], "budget": key[2], "seeds": len(same), **found})
        print(json.dumps(means[-1]))
    host = {"machine": platform.machine(), "onnxruntime": onnxruntime.__version__, "threads": 1}
    RESULTS.write_text(json.dumps({"host": host, "means": means, "rows": rows}, indent=1) + "\n")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 4) if known and len(known) == len(values) else None


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(deploy(model)).SerializeToString()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("images")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tune", default="", help="budgets whose networks are tuned too")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    options.tune = tuple(float(item) for item in options.tune.split(",") if item)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.report:
        report(options)
        return
    for seed in options.seeds.split(","):
        Seed(options, int(seed)).run()


if __name__ == "__main__":
    main()
