"""Widths taken by measured latency against widths taken by multiply-adds, at equal measured latency.

    python benchmarks/latency_aware.py --lite0 CHECKPOINT --images IMAGES.tar --cnn CHECKPOINT --cifar FOLDER
        --work WORK [--targets 0.75,0.6] [--target host] [--out FILE.json]

Per network: the dense network's moments on calibration images, the sensitivity of every group, and a latency table
(each group narrowed alone, in turn with the dense network, one thread). For every share of the dense time asked for,
both allocations are drawn, timed, corrected as `--speedup` corrects them, recovered by the closed form, timed again at
length, and judged on images that nothing was chosen by: KL and agreement with dense, top-1. The table's worth as a
model of time is given too: over random widths, the correlation of modelled with measured time beside that of
multiply-adds.

Everything is kept in WORK, so that a run that was stopped goes on. Under ten minutes on a quiet machine, most of it the
sensitivities. Leave out a network by leaving out its options.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mm_edge

# isort: split
import numpy as np
import onnx_ir as ir
import onnxruntime
from safetensors.numpy import load_file, save_file

from mm_edge.bench.session import measure_pair
from mm_edge.bench.target import Target, load_target, resolve_host
from mm_edge.bench.transport import LocalTransport
from mm_edge.formats.device_files import write_model
from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.compact import materialise
from mm_edge.graph.costs import Cost
from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.graph.layers import read_layers
from mm_edge.graph.onnx_graph import read_raw
from mm_edge.graph.widths import AllowedWidths, lead
from mm_edge.load.data import ImageSet, open_data
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.plan.budgets import BudgetCheck, Draft, counts_of, meet
from mm_edge.plan.latency_table import TimedWidth, fit_time, measure_table
from mm_edge.plan.target_widths import allowed_widths_on
from mm_edge.quality.evaluation import compare_logits, run_onnx
from mm_edge.recover.closed_form.context import RecoveryContext, build_context
from mm_edge.recover.closed_form.sensitivity import (
    Sensitivity,
    allocate,
    from_arrays,
    measure_sensitivities,
    select_by_sensitivity,
    to_arrays,
)
from mm_edge.recover.closed_form.structured import recover_closed_form
from mm_edge.run.plan import MEASURED_AIM, MEASURED_WINDOW
from mm_edge.run.timing import DeviceTimer, open_timer
from mm_edge.runtime import cores
from mm_edge.store import RunStore

ROOT = Path(__file__).resolve().parent.parent
RANDOM_PLANS = 10
CALIBRATION = 400
FINAL_PAIRS = 200
BATCH = 50


@dataclass(frozen=True)
class Network:
    """A network with the images it is calibrated and judged on."""

    name: str
    raw: RawGraph
    structure: Structure
    allowed: tuple[AllowedWidths, ...]
    calibration: np.ndarray
    judged: ImageSet
    folder: Path

    @property
    def dense(self) -> Path:
        return self.folder / "dense.onnx"

    def share(self, timer: DeviceTimer, keep: Keep, *, quiet: bool = False) -> float:
        """Return the measured time of what is kept as a share of the dense network's."""
        return timer.share({}, self.raw, self.structure, keep, quiet=quiet)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lite0")
    parser.add_argument("--images")
    parser.add_argument("--cnn")
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--targets", default="0.75,0.6")
    parser.add_argument("--target", default="host")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    target = replace(resolve_host(load_target(args.target)), threads=1)
    shares = [float(item) for item in args.targets.split(",")]
    found = {}
    for name in ("lite0", "cnn"):
        if getattr(args, name):
            network = open_network(args, name, target)
            found[name] = compare(network, target, shares)
    if args.out is not None:
        host = {"machine": platform.processor() or platform.machine(), "onnxruntime": onnxruntime.__version__}
        record = {"host": host, "threads": 1, "mm_edge": mm_edge.__version__, "networks": found}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def open_network(args: argparse.Namespace, name: str, target: Target) -> Network:
    arch = f"{ROOT / 'benchmarks' / 'train_cifar.py'}:make_cnn"
    model = load_model(getattr(args, name), LoadOptions(arch=None if name == "lite0" else arch))
    raw = read_raw(model)
    structure = read_structure(raw)
    if name == "lite0":
        data = open_data(args.images, model.input, model.info.num_classes, (0.5, 0.5, 0.0), 0)
        judged = data.validation
    else:
        data = open_data(str(args.cifar / "cifar10-train.tar"), model.input, 10)
        judged = data.test
    images = np.concatenate([batch for batch, _ in data.calibration.take(CALIBRATION).batches(BATCH)])
    folder = args.work / name
    folder.mkdir(parents=True, exist_ok=True)
    write_model(ir.to_proto(deploy(raw.model.clone())), folder / "dense.onnx")
    allowed = allowed_widths_on(structure, read_layers(raw), target)
    return Network(name, raw, structure, allowed, images, judged, folder)


def compare(network: Network, target: Target, shares: list[float]) -> dict[str, Any]:
    """Return the rows of both allocations, and how well either model tells time."""
    structure = network.structure
    context = build_context(network.raw, structure, network.calibration, threads=cores())
    sensitivities = read_sensitivities(network.folder / "sensitivities.safetensors", context, network.allowed)
    answers = run_onnx(network.dense, network.judged.batches(BATCH), cores())
    with LocalTransport() as transport:
        timer = open_timer(network.dense, target, transport, RunStore(network.folder / "store"))
        assert timer is not None
        start = time.monotonic()
        timed = partial(network.share, timer)
        table = measure_table(structure, network.allowed, partial(timed, quiet=True))
        seconds = round(time.monotonic() - start, 1)
        costs = {"macs": structure.mac_cost, "latency": fit_time(structure.mac_cost, table)}
        result: dict[str, Any] = {
            "dense_ms": round(timer.dense_ms(), 3),
            "table_seconds_this_run": seconds,
            "fixed_share": round(costs["latency"].fixed, 3),
            "time_per_macs_of_groups": ratios(structure, table),
            "models": judge_models(network, costs, timed),
            "rows": [],
        }
        print(network.name, json.dumps({key: value for key, value in result.items() if key != "rows"}), flush=True)
        for share in shares:
            for name, cost in costs.items():
                row = network.folder / f"row-{share}-{name}.json"
                if not row.exists():
                    found = run_row(network, context, sensitivities, cost, share, timed, answers, timer, transport)
                    row.write_text(json.dumps({"asked": share, "by": name, **found}))
                result["rows"].append(json.loads(row.read_text()))
                print(network.name, row.read_text(), flush=True)
    return result


def read_sensitivities(
    path: Path, context: RecoveryContext, allowed: Sequence[AllowedWidths]
) -> dict[Axis, Sensitivity]:
    """Return the sensitivities kept at `path`; measured and kept where there are none."""
    if path.exists():
        return from_arrays(context.structure, load_file(path))
    found = measure_sensitivities(context, allowed)
    save_file(to_arrays(context.structure, found), path)
    return found


def ratios(structure: Structure, table: tuple[TimedWidth, ...]) -> dict[str, float]:
    """Return, per group, the share of time that goes for each share of multiply-adds that goes, at its narrowest."""
    names = {group.leaf: group.id for group in structure.groups}
    found = {}
    for entry in table:
        fewer = 1 - structure.macs({entry.leaf: float(entry.count)}) / structure.macs()
        found[names[entry.leaf]] = round((1 - entry.share) / fewer, 2)
    return found


def judge_models(network: Network, costs: dict[str, Cost], timed: Any) -> dict[str, float]:
    """Return the correlation of measured time with either model's over random widths."""
    rng = np.random.default_rng(0)
    modelled: dict[str, list[float]] = {name: [] for name in costs}
    measured = []
    for _ in range(RANDOM_PLANS):
        least = rng.uniform(0.3, 0.9)
        counts = {item.leaf: item.nearest(rng.uniform(least, 1.0) * item.widths[-1]) for item in network.allowed}
        keep = lead(network.structure, counts)
        measured.append(timed(keep, quiet=True))
        for name, cost in costs.items():
            modelled[name].append(cost.total(counts) / cost.total())
    return {name: round(float(np.corrcoef(values, measured)[0, 1]), 4) for name, values in modelled.items()}


def run_row(
    network: Network,
    context: RecoveryContext,
    sensitivities: Any,
    cost: Cost,
    share: float,
    timed: Any,
    answers: np.ndarray,
    timer: DeviceTimer,
    transport: LocalTransport,
) -> dict[str, Any]:
    structure = network.structure

    def draw(aim: float) -> Draft:
        counts = allocate(cost, sensitivities, aim * cost.total(), network.allowed)
        whole = {group.leaf: np.ones(group.size, dtype=np.bool_) for group in structure.groups}
        return Draft({**whole, **select_by_sensitivity(sensitivities, counts)})

    ruler = BudgetCheck(share, cost, cost.total(), 1.0, timed, MEASURED_AIM, MEASURED_WINDOW)
    met = meet(draw, ruler)
    counts = counts_of(met.draft.keep)
    pruned = {leaf: kept for leaf, kept in met.draft.keep.items() if not kept.all()}
    start = time.monotonic()
    found = recover_closed_form(context, pruned, counts, sensitivities=sensitivities, walked=True)
    seconds = time.monotonic() - start
    artifact = network.folder / f"{share}-{'macs' if cost.fixed == 0 else 'latency'}.onnx"
    model = materialise(network.raw, structure, {**met.draft.keep, **found.keep}, found.tensors)
    write_model(ir.to_proto(deploy(model)), artifact)
    final = measure_pair(network.dense, artifact, timer.target, transport=transport, pairs=FINAL_PAIRS)
    logits = run_onnx(artifact, network.judged.batches(BATCH), cores())
    judged = compare_logits(logits, network.judged.labels, answers)
    dense = compare_logits(answers, network.judged.labels, None)
    assert final.speedup is not None and judged.kl_to_dense is not None
    return {
        "macs": round(structure.macs({leaf: float(count) for leaf, count in counts.items()}) / structure.macs(), 4),
        "planned_share": round(met.share, 4),
        "corrections": met.corrections,
        "share": round(1 / final.speedup, 4),
        "speedup_ci": final.speedup_ci,
        "dense_top1": dense.accuracy_top1,
        "top1": judged.accuracy_top1,
        "agreement": judged.agreement_top1,
        "kl": round(judged.kl_to_dense, 4),
        "kl_held_back": found.kl_held_back,
        "recovery_s": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
