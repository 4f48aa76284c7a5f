"""EfficientNet-Lite0 without labels and without training: what width, blocks and input size keep under a budget.

    python benchmarks/lite0.py CHECKPOINT IMAGES.tar --work FOLDER [--seeds 0,1,2] [--tune 0.7]
    python benchmarks/lite0.py CHECKPOINT IMAGES.tar --work FOLDER --report [--measure]

Per seed the images are split in half: one half to calibrate, unlabelled, the other to evaluate. The rows are those that
`mm-edge prune-export CHECKPOINT --data IMAGES.tar --split 0.5,0.5,0 --seed SEED --recover closed-form` makes with

    full    --macs 0.85,0.80,0.70,0.60                                  width and blocks at 224 pixels
    sizes   --macs 0.75,0.63,0.59,0.52 --input-sizes 224,192,160        input size too; with the dense controls
    tune    --macs TUNED --recover tune                                 the same networks, tuned block by block

the ten strategies left out. Runs are kept in FOLDER: one that was stopped goes on. --report gathers what FOLDER holds
into benchmarks/results/lite0.json; with --measure every network is first timed against the dense one, inferences in
turn, one thread (do that on a quiet machine).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mm_edge

# isort: split
import numpy as np
import onnxruntime
from rich.console import Console

from mm_edge.api import Setting, make_request, run_job
from mm_edge.bench.session import measure_pair
from mm_edge.bench.transport import LocalTransport
from mm_edge.models import LoadOptions, load_model
from mm_edge.progress import Stages
from mm_edge.target import load_target, resolve_host

RESULTS = Path(__file__).resolve().parent / "results" / "lite0.json"
FULL = (0.85, 0.8, 0.7, 0.6)
SIZED = (0.75, 0.63, 0.59, 0.52)
SIDES = (224, 192, 160)
PAIRS = 200


def run(options: argparse.Namespace, seed: int, name: str, recover: str, macs: tuple[float, ...], sizes: Any) -> None:
    """Do one job and keep what its report says in FOLDER, unless it is there."""
    kept = options.work / f"{name}-{seed}.json"
    if kept.exists():
        return
    out = options.work / f"run-{seed}"
    setting = Setting(out=out, data=options.images, bench=False, split=(0.5, 0.5, 0.0))
    fields: dict[str, Any] = {"signals": ("magnitude",), "macs": macs, "input_sizes": sizes, "seed": seed}
    request = replace(make_request(setting, recover=recover, **fields), strategies=())
    stages = Stages(Console(stderr=True))
    started = time.monotonic()
    report = run_job(lambda: load_model(options.checkpoint, LoadOptions()), setting, request, stages)
    dense = report.dense
    rows = []
    for row in report.candidates:
        if row.signal != "sensitivity" and not row.is_control:
            continue
        rows.append(
            {
                "id": row.id,
                "side": row.input_shape[-1],
                "macs": round(row.macs / dense.macs, 4),
                "top1": row.accuracy_top1,
                "drop_points": row.accuracy_drop,
                "agreement": row.agreement_top1,
                "kl": row.kl_to_dense,
                "parity": None if row.parity is None else row.parity.max_abs_err,
                "removed_blocks": row.removed_blocks,
                "recovered_by": row.recovered_by,
                "stopped": row.stopped,
                "artifact": str(out / str(row.artifact)),
            }
        )
    found = {
        "seed": seed,
        "dense_top1": dense.accuracy_top1,
        "dense": str(out / "dense.onnx"),
        "rows": rows,
        "seconds": {**report.seconds, "all": round(time.monotonic() - started, 1)},
        "warnings": report.warnings,
    }
    kept.write_text(json.dumps(found, indent=1))
    for item in rows:
        print(json.dumps({key: item[key] for key in ("id", "macs", "drop_points", "agreement", "kl")}), flush=True)


def measure(found: dict[str, Any]) -> None:
    """Time every row of a run against its dense network."""
    target = replace(resolve_host(load_target("host")), threads=1)
    with LocalTransport() as transport:
        for row in found["rows"]:
            timed = measure_pair(Path(found["dense"]), Path(row["artifact"]), target, transport=transport, pairs=PAIRS)
            row["speedup"], row["speedup_ci"] = timed.speedup, timed.speedup_ci
            print(found["seed"], row["id"], row["macs"], row["drop_points"], timed.speedup, flush=True)


def report(options: argparse.Namespace) -> None:
    """Gather the runs of FOLDER, with means over the seeds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(options.work.glob("*-[0-9].json")):
        found = json.loads(path.read_text())
        if options.measure:
            measure(found)
            path.write_text(json.dumps(found, indent=1))
        for row in found["rows"]:
            row.pop("artifact")
        found.pop("dense")
        runs.setdefault(path.stem.rpartition("-")[0], []).append(found)
    means: dict[str, Any] = {}
    for name, parts in runs.items():
        for identity in dict.fromkeys(row["id"] for part in parts for row in part["rows"]):
            rows = [row for part in parts for row in part["rows"] if row["id"] == identity]
            keys = ("macs", "drop_points", "agreement", "kl", "speedup")
            mean = {key: _mean([row.get(key) for row in rows]) for key in keys}
            means[f"{name}: {identity}"] = {**mean, "seeds": len(rows)}
    host = {"machine": platform.machine(), "onnxruntime": onnxruntime.__version__, "threads": 1}
    RESULTS.write_text(json.dumps({"host": host, "means": means, "runs": runs}, indent=1) + "\n")
    for name, mean in means.items():
        print(name, mean)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 4) if known and len(known) == len(values) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("images")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--parts", default="full,sizes")
    parser.add_argument("--tune", default="", help="budgets to tune too")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.report:
        report(options)
        return
    tuned = tuple(float(item) for item in options.tune.split(",") if item)
    for seed in (int(item) for item in options.seeds.split(",")):
        if "full" in options.parts:
            run(options, seed, "full", "closed-form", FULL, "none")
        if "sizes" in options.parts:
            run(options, seed, "sizes", "closed-form", SIZED, SIDES)
        if tuned:
            run(options, seed, "tune", "tune", tuned, "none")


if __name__ == "__main__":
    print(f"mm-edge {mm_edge.__version__}", flush=True)
    main()
