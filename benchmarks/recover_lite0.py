"""Closed-form recovery of EfficientNet-Lite0 under budgets of multiply-adds, without labels and without training.

    python benchmarks/recover_lite0.py CHECKPOINT IMAGES.tar [--seeds 0,1,2] [--macs 0.85,0.8,0.7,0.6] [--tune 0.7]
        [--out FILE.json]

Per seed the images are split in half: one half to calibrate, unlabelled, the other to evaluate. Prints one line per
candidate: accuracy, its drop in points, agreement with and divergence from the dense network, and seconds. The budgets
named by --tune are tuned block-wise too, from the closed form's weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from mm_edge.candidates import make_ladders
from mm_edge.data import open_data
from mm_edge.evaluate import compare_logits, run_onnx
from mm_edge.export import deploy, export_raw
from mm_edge.graph.compact import materialise
from mm_edge.graph.groups import read_structure
from mm_edge.layers import read_layers
from mm_edge.models import LoadOptions, load_model
from mm_edge.recover.closed_form import recover_closed_form
from mm_edge.recover.context import build_context
from mm_edge.recover.sensitivity import allocate, measure_sensitivities, select_by_sensitivity
from mm_edge.recover.tune import tune
from mm_edge.target import load_target


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("images")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--macs", default="0.85,0.8,0.7,0.6")
    parser.add_argument("--tune", default="")
    parser.add_argument("--target", default="x86_64-avx512")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for seed in options.seeds.split(","):
        for row in run_seed(options, int(seed), [float(item) for item in options.macs.split(",")]):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if options.out is not None:
        host = {"machine": platform.processor() or platform.machine(), "onnxruntime": onnxruntime.__version__}
        options.out.write_text(json.dumps({"host": host, "threads": 1, "rows": rows}, indent=1) + "\n")


def run_seed(options: argparse.Namespace, seed: int, fractions: list[float]):
    loaded = load_model(options.checkpoint, LoadOptions())
    raw = export_raw(loaded.module, torch.zeros(1, *loaded.input.shape))
    structure, layers = read_structure(raw), read_layers(raw)
    ladders = make_ladders(structure, layers, load_target(options.target))
    splits = open_data(options.images, loaded.input, loaded.info.num_classes, (0.5, 0.5, 0.0), seed)
    images = np.concatenate([batch for batch, _ in splits.calibration.batches(50)])
    answers = run_onnx(_bytes(raw.model.clone()), splits.validation.batches(50), 1)
    labels = splits.validation.labels
    dense = compare_logits(answers, labels, answers)
    start = time.monotonic()
    context = build_context(raw, structure, images)
    after_context = time.monotonic()
    sensitivities = measure_sensitivities(context, ladders)
    shared = {"context_s": round(after_context - start, 1), "sensitivity_s": round(time.monotonic() - after_context, 1)}
    tuned = [float(item) for item in options.tune.split(",") if item]
    for fraction in fractions:
        counts = allocate(structure.mac_cost, sensitivities, fraction * structure.macs(), ladders)
        planned = select_by_sensitivity(sensitivities, counts)

        def row(stage: str, keep, tensors, kl_held_back: float, seconds: float, notes) -> dict:
            logits = run_onnx(_bytes(materialise(raw, structure, keep, tensors)), splits.validation.batches(50), 1)
            result = compare_logits(logits, labels, answers)
            return {
                "seed": seed,
                "budget": fraction,  # noqa: B023 (called before the next turn)
                "macs": round(structure.macs({k: float(v.sum()) for k, v in keep.items()}) / structure.macs(), 4),
                "stage": stage,
                "dense_top1": dense.accuracy_top1,
                "top1": result.accuracy_top1,
                "drop_points": round(100 * (dense.accuracy_top1 - result.accuracy_top1), 2),
                "agreement": result.agreement_top1,
                "kl": round(result.kl_to_dense, 4),
                "kl_held_back": round(kl_held_back, 4),
                "seconds": round(seconds, 1),
                **shared,
                "notes": notes,
                "widths": {g.id: counts[g.leaf] for g in structure.groups if counts[g.leaf] < g.size},  # noqa: B023
            }

        for walked in (False, True):
            start = time.monotonic()
            found = recover_closed_form(context, planned, counts, sensitivities=sensitivities, walked=walked)
            seconds = time.monotonic() - start
            stage = "walked" if walked else "screened"
            yield row(stage, found.keep, found.tensors, found.kl_held_back, seconds, found.notes)
        if fraction in tuned:
            start = time.monotonic()
            further = tune(context, loaded.module, found.keep, found.fitted, seed=seed)
            seconds = time.monotonic() - start
            yield row("tuned", found.keep, further.tensors, further.kl_held_back, seconds, (further.note,))


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(deploy(model)).SerializeToString()


if __name__ == "__main__":
    main()
