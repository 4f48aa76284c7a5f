"""Width against input size on EfficientNet-Lite0: which of the two a budget of multiply-adds is better spent on.

    python benchmarks/input_size.py CHECKPOINT IMAGES.tar --work FOLDER [--seeds 0,1,2] [--out FILE.json]

Per seed the images are split in half: one half to calibrate, unlabelled, the other to evaluate; nothing is trained.

    control   the dense network on smaller pictures
    width     closed-form recovery at the dense size
    as is     what `width` gave, on smaller pictures
    joint     closed-form recovery at the smaller size, of the same widths

Every row is then timed against the dense network, inferences in turn, one thread. Rows are kept in FOLDER, so that a
run that was stopped goes on; --measure-only times them anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from safetensors.numpy import load_file, save_file

from mm_edge.bench.session import measure_pair
from mm_edge.bench.transport import LocalTransport
from mm_edge.candidates import make_ladders
from mm_edge.data import DataSplits, open_data
from mm_edge.evaluate import compare_logits, run_onnx
from mm_edge.export import RawGraph, deploy
from mm_edge.graph.compact import materialise
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.layers import read_layers
from mm_edge.models import LoadedModel, LoadOptions, load_model
from mm_edge.pipeline import read_raw
from mm_edge.recover.closed_form import recover_closed_form
from mm_edge.recover.context import RecoveryContext, build_context
from mm_edge.recover.sensitivity import (
    allocate,
    from_arrays,
    measure_sensitivities,
    select_by_sensitivity,
    to_arrays,
)
from mm_edge.sizes import export_at, remake
from mm_edge.target import load_target, resolve_host

CONTROLS = (208, 192, 176, 160)
# Fractions of the dense multiply-adds that widths keep, and at which of them what smaller size is tried.
WIDTHS = (0.85, 0.8, 0.75, 0.7, 0.6)
AS_IS = {192: (0.85, 0.7)}
JOINT = {192: (0.85, 0.8, 0.7)}
PAIRS = 200


@dataclass(frozen=True)
class At:
    """The network at one input size with its images."""

    side: int
    raw: RawGraph
    structure: Structure
    layers: Any
    data: DataSplits
    leaves: Any = None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("images")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--target", default="host")
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.measure_only:
        for seed in options.seeds.split(","):
            Seed(options, int(seed)).run()
    rows = [json.loads(path.read_text()) for path in sorted(options.work.glob("row-*.json"))]
    rows = [row for row in rows if str(row["seed"]) in options.seeds.split(",")]
    measure(options, rows)
    if options.out is not None:
        host = {"machine": platform.processor() or platform.machine(), "onnxruntime": onnxruntime.__version__}
        options.out.write_text(json.dumps({"host": host, "threads": 1, "rows": rows}, indent=1) + "\n")


class Seed:
    """One split of the images."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.model = load_model(options.checkpoint, LoadOptions())
        self.full = _at(
            self.model, open_data(options.images, self.model.input, self.model.info.num_classes, (0.5, 0.5, 0.0), seed)
        )
        self.target = resolve_host(load_target(options.target))
        self.labels = self.full.data.validation.labels
        self.answers = run_onnx(_bytes(self.full.raw.model.clone()), self.full.data.validation.batches(50), 1)

    def run(self) -> None:
        self.record("dense", 1.0, self.full, {}, {}, {})
        for side in CONTROLS:
            if not self.path("control", side, 1.0).exists():
                self.record("control", 1.0, self.at(side), {}, {}, {})
        wanted = [("width", 224, fraction) for fraction in WIDTHS]
        wanted += [("as is", side, fraction) for side, fractions in AS_IS.items() for fraction in fractions]
        wanted += [("joint", side, fraction) for side, fractions in JOINT.items() for fraction in fractions]
        if all(self.path(*item).exists() for item in wanted):
            return
        start = time.monotonic()
        context = build_context(self.full.raw, self.full.structure, _calibration(self.full))
        context_s = time.monotonic() - start
        sensitivities = self.sensitivities(context)
        own = {side: self.own_context(side, context) for side in JOINT}
        shared = {"context_s": round(context_s, 1), "sensitivity_s": round(time.monotonic() - start - context_s, 1)}
        for fraction in WIDTHS:
            budget = fraction * self.full.structure.macs()
            counts = allocate(self.full.structure.mac_cost, sensitivities, budget, self.ladders(self.full))
            if not all(self.path(*item).exists() for item in wanted if item[0] != "joint" and item[2] == fraction):
                found, more = _recover(context, sensitivities, counts)
                kept = {group.id: counts[group.leaf] for group in self.full.structure.groups}
                narrowed = {g.id: kept[g.id] for g in self.full.structure.groups if kept[g.id] < g.size}
                more = {**more, **shared, "widths": narrowed}
                self.record("width", fraction, self.full, found.keep, found.tensors, more)
                for side in (side for side, fractions in AS_IS.items() if fraction in fractions):
                    at = self.at(side)
                    keep = {at.leaves[leaf]: kept for leaf, kept in found.keep.items()}
                    self.record("as is", fraction, at, keep, found.tensors, {})
            for side in (side for side, fractions in JOINT.items() if fraction in fractions):
                if not self.path("joint", side, fraction).exists():
                    at, there = own[side]
                    here = {at.leaves[leaf]: item for leaf, item in sensitivities.items()}
                    found, more = _recover(there, here, {at.leaves[leaf]: count for leaf, count in counts.items()})
                    self.record("joint", fraction, at, found.keep, found.tensors, more)

    def own_context(self, side: int, context: RecoveryContext) -> tuple[At, RecoveryContext]:
        """Return the network at `side` with its moments; held back, it is compared with the network given."""
        at = self.at(side)
        own = build_context(at.raw, at.structure, _calibration(at)[: len(context.images)])
        return at, replace(own, logits=context.logits)

    def sensitivities(self, context: RecoveryContext) -> Any:
        path = self.options.work / f"sensitivities-{self.seed}.safetensors"
        if path.exists():
            return from_arrays(self.full.structure, load_file(path))
        found = measure_sensitivities(context, self.ladders(self.full))
        save_file(to_arrays(self.full.structure, found), path)
        return found

    def at(self, side: int) -> At:
        model = remake(self.model, side)
        sized = export_at(model, self.full.structure)
        data = self.full.data.prepared_for(model.input)
        return At(side, sized.raw, sized.structure, sized.layers, data, sized.leaves)

    def ladders(self, at: At) -> Any:
        return make_ladders(at.structure, at.layers, self.target)

    def path(self, kind: str, side: int, fraction: float) -> Path:
        return self.options.work / f"row-{self.seed}-{kind.replace(' ', '-')}-{side}-{fraction:.3f}.json"

    def record(self, kind: str, fraction: float, at: At, keep: Any, tensors: Any, more: dict[str, Any]) -> None:
        path = self.path(kind, at.side, fraction)
        if path.exists():
            return
        artifact = path.with_suffix(".onnx")
        artifact.write_bytes(_bytes(materialise(at.raw, at.structure, keep, tensors)))
        logits = run_onnx(artifact, at.data.validation.batches(50), 1)
        result = compare_logits(logits, self.labels, self.answers)
        dense = compare_logits(self.answers, self.labels, None)
        macs = at.structure.macs({leaf: float(kept.sum()) for leaf, kept in keep.items()})
        row = {
            "seed": self.seed,
            "kind": kind,
            "side": at.side,
            "width": fraction,
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


def _recover(context: RecoveryContext, sensitivities: Any, counts: Any) -> tuple[Any, dict[str, Any]]:
    start = time.monotonic()
    planned = select_by_sensitivity(sensitivities, counts)
    found = recover_closed_form(context, planned, counts, sensitivities=sensitivities, walked=True)
    more = {"seconds": round(time.monotonic() - start, 1), "notes": found.notes, "kl_held_back": found.kl_held_back}
    return found, more


def measure(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Time every row's model against the dense one of its seed."""
    target = replace(resolve_host(load_target(options.target)), threads=1)
    with LocalTransport() as transport:
        for row in rows:
            dense = options.work / f"row-{row['seed']}-dense-224-1.000.onnx"
            found = measure_pair(dense, options.work / row["artifact"], target, transport=transport, pairs=PAIRS)
            row["latency"] = None if found.speedup is None else round(1 / found.speedup, 4)
            row["speedup_ci"] = found.speedup_ci
            print(row["seed"], row["kind"], row["side"], row["macs"], row["top1"], row["latency"], flush=True)


def _at(model: LoadedModel, data: DataSplits) -> At:
    raw = read_raw(model)
    return At(model.input.shape[1], raw, read_structure(raw), read_layers(raw), data)


def _calibration(at: At) -> np.ndarray:
    return np.concatenate([batch for batch, _ in at.data.calibration.batches(50)])


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(deploy(model)).SerializeToString()


if __name__ == "__main__":
    main()
