"""Whether int8 artifacts answer alike on x86 and on arm64 kernels: top-1 agreement on 32 images, under emulation.

Each .onnx given is quantised for an arm64 target (signed activations) and run here, on an emulated Cortex-A72 (no dot
product) and on an emulated Cortex-A76, which need `mm-edge targets setup arm64-qemu` once. Nothing is timed.

    python benchmarks/int8_arm64.py RUN/dense.onnx RUN/candidates/FILE.onnx --data TAR --split 0.3,0.5,0.2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import mm_edge  # noqa: F401  (first: makes timm importable beside CPU-only torch)

# isort: split
import numpy as np

from mm_edge.bench.qemu import QemuTransport
from mm_edge.bench.session import run_model
from mm_edge.bench.target import load_target
from mm_edge.formats.quantize import quantise
from mm_edge.load.data import DataSplits, open_data
from mm_edge.quality.evaluation import run_onnx
from mm_edge.records import InputSpec, to_json
from mm_edge.store import write_atomically

ROOT = Path(__file__).resolve().parent.parent
CORES = {"cortex-a72": "raspberry-pi-4", "cortex-a76": "raspberry-pi-5"}
IMAGES, CALIBRATION, HELD_BACK, BATCH = 32, 150, 64, 50


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def compare(model: Path, data: DataSplits, folder: Path) -> dict[str, Any]:
    images = np.concatenate([x for x, _ in data.calibration.take(CALIBRATION + HELD_BACK).batches(BATCH)])
    (tested, labels), *_ = data.validation.take(IMAGES).batches(IMAGES)
    np.save(folder / "images.npy", tested)
    fp32 = run_onnx(model, [(tested, labels)], 1).argmax(axis=1)
    found: dict[str, Any] = {}
    for core, name in CORES.items():
        target = load_target(name)
        artifact = folder / f"{core}.onnx"
        report = quantise(model, artifact, target, [images[:CALIBRATION]], images[CALIBRATION:])
        here = run_onnx(artifact, [(tested, labels)], 1)
        there = run_model(artifact, folder / "images.npy", target, transport=QemuTransport(core))
        found[core] = {
            "scheme": report.scheme,
            "images": len(tested),
            "same_top1_as_x86": int((here.argmax(axis=1) == there.argmax(axis=1)).sum()),
            "same_top1_as_fp32": int((there.argmax(axis=1) == fp32).sum()),
            "max_rel_err": float(np.abs(here - there).max() / np.abs(here).max()),
            "quantisation": to_json(report),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", type=numbers, default=(0.5, 0.25, 0.25))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "int8_arm64.json")
    args = parser.parse_args()
    spec = InputSpec((3, 224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.875)
    data = open_data(args.data, spec, None, args.split, 0)
    document: dict[str, Any] = {"data": {**data.describe(), "source": Path(args.data).name}}
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            document[model.stem] = compare(model, data, Path(folder))
        write_atomically(args.out, (json.dumps(document, indent=1) + "\n").encode())
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
