"""What recovery brings back on two other kinds of network than EfficientNet: a residual CNN and a transformer.

The dense networks come from benchmarks/train_cifar.py, as do the images in three parts (train, val, test). With
default settings throughout:

    recovery   30 % fewer MACs; not recovered, BatchNorm re-estimated, closed form: which part of what pruning lost is
               back, for the plan of the same ranges and for the one allocated by measured sensitivity
    finetune   50 % fewer MACs, the closed form, then fine-tuning under the masks for a few epochs
    sizes      30 and 45 % fewer MACs, spent on input size, blocks and width, beside the dense network at smaller
               sizes; every row timed against the dense one, inferences in turn, one thread

Accuracy is on the 10,000 test images, which neither training, recovery, early stopping nor any choice has seen. The
runs are those of `mm-edge prune-export CKPT --arch FILE:CALLABLE --data DATA/cifar10-train.tar --signals magnitude
--macs 0.7 --recover HOW --no-bench`; only the rows of the budget are made, the strategies are left out. Accuracy
is taken at each row's own input size.

    python benchmarks/cifar.py recovery cnn --checkpoint cnn_cifar10 --data DATA --work WORK
    python benchmarks/cifar.py sizes cnn --checkpoint cnn_cifar10 --data DATA --work WORK
    python benchmarks/cifar.py finetune cnn --checkpoint cnn_cifar10 --data DATA --work WORK --epochs 4

Each part goes under its network's name into benchmarks/results/cifar.json, or --results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mm_edge

# isort: split
import numpy as np
import torch
from rich.console import Console

from mm_edge.api import run_job
from mm_edge.bench.session import measure_pair
from mm_edge.bench.target import load_target, resolve_host
from mm_edge.bench.transport import LocalTransport
from mm_edge.load.data import ImageSet, open_data
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.progress import Stages
from mm_edge.quality.evaluation import compare_logits, run_onnx
from mm_edge.records import Candidate, Report
from mm_edge.run.request import make_request

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cifar.json"
SIDES = (32, 28, 24)
SIZED = (0.7, 0.55)
RECOVERIES = ("none", "bn", "closed-form")


def run(
    args: argparse.Namespace, fraction: float | tuple[float, ...], recover: str, **fields: Any
) -> tuple[Report, Path]:
    """Run the job for one budget; return its report and folder."""
    out = args.work / args.network
    setting = {"out": out, "data": str(args.data / "cifar10-train.tar"), "bench": False}
    fractions = fraction if isinstance(fraction, tuple) else (fraction,)
    request = make_request(**setting, signals=("magnitude",), macs=fractions, recover=recover, **fields)
    request = replace(request, strategies=())  # only what the budget asks for: the others are not reported here
    arch = f"{ROOT / 'benchmarks' / 'train_cifar.py'}:make_{args.network}"
    stages = Stages(Console(stderr=True))
    return run_job(lambda: load_model(str(args.checkpoint), LoadOptions(arch=arch)), request, stages), out


def pruned_rows(report: Report) -> list[Candidate]:
    """Return the rows that are pruned: the dense network at other sizes stands beside them, as a control."""
    return [row for row in report.candidates if row.kind != "dense"]


def test_images(args: argparse.Namespace) -> Callable[[tuple[int, ...]], ImageSet]:
    """Return what gives the test images for an input of some shape."""
    spec = load_model(
        str(args.checkpoint),
        LoadOptions(arch=f"{ROOT / 'benchmarks' / 'train_cifar.py'}:make_{args.network}"),
    ).input
    data = open_data(str(args.data / "cifar10-train.tar"), spec, 10)
    return lambda shape: data.prepared_for(replace(spec, shape=tuple(shape))).test


def measure(model: Path, test: ImageSet, dense: np.ndarray | None) -> tuple[dict[str, Any], np.ndarray]:
    """Return accuracy, agreement with dense and KL on the test images, and the logits."""
    logits = run_onnx(model, test.batches(100), 1)
    found = compare_logits(logits, test.labels, dense)
    entry = {
        "accuracy_top1_test": found.accuracy_top1,
        "agreement_top1_test": found.agreement_top1,
        "kl_to_dense_test": found.kl_to_dense,
    }
    return entry, logits


def describe(row: Candidate, report: Report, found: dict[str, Any], dense: float) -> dict[str, Any]:
    return {
        **found,
        "drop_points_test": round(100 * (dense - found["accuracy_top1_test"]), 2),
        "accuracy_top1_validation": row.accuracy_top1,
        "macs_fraction": round(row.macs / report.dense.macs, 4),
        "params": row.params,
        "recovered_by": row.recovered_by,
        "epochs": row.epochs,
        "stopped": row.stopped,
    }


def recovery(args: argparse.Namespace) -> dict[str, Any]:
    """What each recovery brings back at 30 % fewer MACs."""
    test = test_images(args)
    rows: dict[str, Any] = {}
    logits = None
    seconds: dict[str, Any] = {}
    for recover in RECOVERIES:
        started = time.monotonic()
        report, out = run(args, args.macs or 0.7, recover)
        seconds[recover] = {**report.seconds, "all": round(time.monotonic() - started, 1)}
        if logits is None:
            dense, logits = measure(out / "dense.onnx", test((3, 32, 32)), None)
            rows["dense"] = {"accuracy_top1_test": dense["accuracy_top1_test"], "macs": report.dense.macs}
        for row in pruned_rows(report):
            found, _ = measure(out / str(row.artifact), test(row.input_shape), logits)
            rows[f"{row.signal}, {recover}"] = describe(row, report, found, rows["dense"]["accuracy_top1_test"])
    lost = rows["magnitude, none"]["drop_points_test"]
    back = {
        name: round(1 - row["drop_points_test"] / lost, 3)
        for name, row in rows.items()
        if name not in ("dense", "magnitude, none")
    }
    return {"rows": rows, "points_lost_without_recovery": lost, "share_recovered": back, "seconds": seconds}


def finetuned(args: argparse.Namespace) -> dict[str, Any]:
    """What fine-tuning reaches at 50 % fewer MACs."""
    test = test_images(args)
    started = time.monotonic()
    report, out = run(args, args.macs or 0.5, "finetune", epochs=args.epochs)
    seconds = {**report.seconds, "all": round(time.monotonic() - started, 1)}
    dense, logits = measure(out / "dense.onnx", test((3, 32, 32)), None)
    rows: dict[str, Any] = {"dense": {"accuracy_top1_test": dense["accuracy_top1_test"], "macs": report.dense.macs}}
    for row in pruned_rows(report):
        images = test(row.input_shape)
        found, _ = measure(out / str(row.artifact), images, logits)
        rows[row.signal] = describe(row, report, found, dense["accuracy_top1_test"])
        if row.recovered_by == "finetune":
            before = out / str(row.artifact).replace("-finetuned.onnx", "-walked.onnx")
            found, _ = measure(before, images, logits)
            drop = round(100 * (dense["accuracy_top1_test"] - found["accuracy_top1_test"]), 2)
            rows[row.signal]["before"] = {**found, "drop_points_test": drop}
    return {"rows": rows, "epochs_at_most": args.epochs, "seconds": seconds}


def sized(args: argparse.Namespace) -> dict[str, Any]:
    """What input size, blocks and width keep under two budgets, and the dense network on smaller pictures."""
    test = test_images(args)
    report, out = run(args, SIZED, "closed-form", input_sizes=SIDES)
    dense, logits = measure(out / "dense.onnx", test((3, 32, 32)), None)
    top1 = dense["accuracy_top1_test"]
    rows: dict[str, Any] = {"dense": {"accuracy_top1_test": top1, "macs": report.dense.macs}}
    target = replace(resolve_host(load_target("host")), threads=1)
    with LocalTransport() as transport:
        for row in report.candidates:
            artifact = out / str(row.artifact)
            found, _ = measure(artifact, test(row.input_shape), logits)
            timed = measure_pair(out / "dense.onnx", artifact, target, transport=transport, pairs=200)
            speed = {"speedup": timed.speedup, "speedup_ci": timed.speedup_ci, "removed_blocks": row.removed_blocks}
            rows[row.id] = {**describe(row, report, found, top1), **speed}
    return {"rows": rows, "seconds": report.seconds, "warnings": report.warnings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("network", choices=("cnn", "vit"))
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--macs", type=float, help="another budget than the part's own")
    parser.add_argument("--machine", default="one core of two, shared with other jobs", help="what seconds are of")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = PARTS[args.part](args)
    found["version"] = mm_edge.__version__
    found["machine"] = f"{args.machine}: seconds are of that"
    known = json.loads(args.results.read_text()) if args.results.exists() else {}
    known.setdefault(args.network, {})[args.part] = found
    args.results.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, indent=1))


PARTS = {"recovery": recovery, "finetune": finetuned, "sizes": sized}

if __name__ == "__main__":
    main()
