"""fp32 dense, int8 dense, fp32 pruned, int8 pruned of one network in one table: accuracy, p50, memory, bytes.

Takes the dense and a pruned .onnx of an `mm-edge prune-export` run, makes the int8 versions with calibration images of
that run's own split, and measures all four on this machine. Accuracy is on images that neither pruning, recovery nor
calibration saw; without --data only latency, memory and bytes are given (calibrated on noise).

    mm-edge prune-export MODEL --data TAR --split 0.3,0.5,0.2 --macs 0.7 --no-bench --out RUN
    python benchmarks/int8_table.py --name NAME --dense RUN/dense.onnx --pruned RUN/candidates/FILE.onnx \
        --data TAR --split 0.3,0.5,0.2 --evaluate validation

Results go under NAME into benchmarks/results/int8_table.json; int8 files and raw samples go beside the dense model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mm_edge  # noqa: F401  (first: makes timm importable beside CPU-only torch)

# isort: split
import numpy as np

from mm_edge.bench.session import environment, measure_memory, measure_pair
from mm_edge.bench.stats import bootstrap_median
from mm_edge.bench.target import load_target, resolve_host
from mm_edge.bench.transport import LocalTransport
from mm_edge.formats.conversion import QuantReport
from mm_edge.formats.quantize import quantise
from mm_edge.load.data import DataSplits, noise_of, open_data
from mm_edge.quality.evaluation import compare_logits, run_onnx
from mm_edge.records import InputSpec, to_json
from mm_edge.store import write_atomically

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION, HELD_BACK, BATCH, PAIRS = 150, 64, 50, 400


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--what", default="", help="what the network and the pruning are, for the reader")
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--pruned", type=Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--split", type=numbers, default=(0.5, 0.25, 0.25))
    parser.add_argument("--evaluate", choices=("validation", "test"), default="validation")
    parser.add_argument("--input-size", type=numbers, default=(3, 224, 224))
    parser.add_argument("--mean", type=numbers, default=(0.5, 0.5, 0.5))
    parser.add_argument("--std", type=numbers, default=(0.5, 0.5, 0.5))
    parser.add_argument("--crop-pct", type=float, default=0.875)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "int8_table.json")
    return parser.parse_args()


def calibration(spec: InputSpec, data: DataSplits | None) -> Iterator[np.ndarray]:
    """Yield the images for calibration, then those held back, in one stream of batches."""
    if data is None:
        yield noise_of(spec, (), CALIBRATION + HELD_BACK)
        return
    for images, _ in data.calibration.take(CALIBRATION + HELD_BACK).batches(BATCH):
        yield images


def judge(models: dict[str, Path], data: DataSplits, part: str) -> dict[str, dict[str, Any]]:
    """Return accuracy and, for int8, agreement with its own fp32 model, on one part of the data."""
    images = getattr(data, part)
    logits = {name: run_onnx(path, images.batches(BATCH), 1) for name, path in models.items()}
    rows = {}
    for name in models:
        own = logits[name.replace("int8", "fp32")] if name.startswith("int8") else logits["fp32 dense"]
        found = compare_logits(logits[name], images.labels, own)
        rows[name] = {
            "accuracy_top1": found.accuracy_top1,
            "agreement_top1": found.agreement_top1,
            "kl": found.kl_to_dense,
        }
    return rows


def time_all(models: dict[str, Path], samples: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Time each model against the fp32 dense one, interleaved; memory in a fresh process each."""
    transport = LocalTransport()
    target = resolve_host(load_target("host"))
    env = environment(target, transport)
    rows: dict[str, dict[str, Any]] = {}
    for name, path in models.items():
        if name == "fp32 dense":
            continue
        raw = samples / f"{path.stem}.json"
        found = measure_pair(models["fp32 dense"], path, target, transport=transport, pairs=PAIRS, raw_samples=raw)
        result = json.loads(raw.read_text())["result"]
        for row, key, latency in (
            (name, "candidate_ns", found.latency),
            ("fp32 dense", "dense_ns", found.dense_latency),
        ):
            interval = bootstrap_median(np.asarray(result[key], dtype=np.float64), result["block"])
            rows[row] = {"p50_ms": latency.p50, "p50_ms_ci": [bound / 1e6 for bound in interval]}
        rows[name] |= {"speedup": found.speedup, "speedup_ci": found.speedup_ci, "doubts": to_json(found.doubts)}
    for name, path in models.items():
        rows[name]["peak_rss_bytes"] = measure_memory(path, target, transport=transport)
        rows[name]["file_bytes"] = path.stat().st_size
    return rows, env


def main() -> None:
    args = parse()
    spec = InputSpec(tuple(int(n) for n in args.input_size), args.mean, args.std, "bicubic", args.crop_pct)
    data = open_data(args.data, spec, None, args.split, 0) if args.data else None
    images = np.concatenate(list(calibration(spec, data)))
    target = resolve_host(load_target("host"))
    models, reports = {"fp32 dense": args.dense}, {}
    for name, path in (("dense", args.dense), ("pruned", args.pruned)):
        out = path.with_name(f"{path.stem}.int8.onnx")
        started = time.perf_counter()
        report: QuantReport = quantise(path, out, target, [images[:CALIBRATION]], images[CALIBRATION:])
        reports[name] = {**to_json(report), "seconds": round(time.perf_counter() - started, 1)}
        models |= {f"fp32 {name}": path, f"int8 {name}": out}
    quality = judge(models, data, args.evaluate) if data else {name: {} for name in models}
    rows, env = time_all(models, args.dense.parent / "int8_samples")
    document = json.loads(args.out.read_text()) if args.out.is_file() else {}
    document[args.name] = {
        "what": args.what,
        "images": None if data is None else {"evaluated": len(getattr(data, args.evaluate)), **data.describe()},
        "calibration": {"images": CALIBRATION, "held_back": HELD_BACK, "kind": "images" if data else "noise"},
        "rows": {name: {**quality[name], **rows[name]} for name in models},
        "quantisation": reports,
        "environment": {key: env.get(key) for key in ("cpu_model", "isa", "cores", "threads_auto", "onnxruntime")},
    }
    if data is not None:
        document[args.name]["images"]["source"] = Path(args.data).name
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, (json.dumps(document, indent=1, default=list) + "\n").encode())
    print(json.dumps(document[args.name], indent=1, default=list))


if __name__ == "__main__":
    main()
