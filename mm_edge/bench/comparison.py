"""What `mm-edge bench` measures: several ONNX models on one device, the first compared with each of the others.

Two things need more than the harness knows, so the caller passes them in: how outputs are compared (`compare`), and
which layers of a model keep an n:m pattern (`find_layers`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.arrays import Float32Array
from mm_edge.bench import worker
from mm_edge.bench.audit import Audit, audit_model
from mm_edge.bench.pattern import PatternLayer, PatternTime, time_pattern_layers
from mm_edge.bench.session import (
    EMULATED,
    Measurement,
    environment,
    measure_footprint,
    measure_null,
    measure_pair,
    merge_doubts,
    run_model,
)
from mm_edge.bench.target import Target, pattern_options
from mm_edge.bench.transport import Transport
from mm_edge.records import Parity

BENCH_SCHEMA_VERSION = 1
NOISE_INPUTS = 8
AUDIT_FOLDER = Path("mm-edge-audit")

# (model, outputs of the device, inputs, kind of the inputs) -> how the outputs differ from this machine's
Compare = Callable[[Path, Float32Array, Float32Array, str], Parity]
# (model, pattern such as "2:4") -> the layers that keep it
FindLayers = Callable[[Path, str], Sequence[PatternLayer]]


@dataclass(frozen=True)
class Comparison:
    """What to measure, on what, and what to keep.

    Attributes:
        models: the .onnx files; the first is the one the others are compared with.
        target: gives threads, affinity, provider, session options and n:m patterns.
        transport: the open transport to the device.
        pairs: how many interleaved pairs of runs for each comparison.
        samples: the folder that keeps the raw samples; None keeps none.
        audit: whether to name the kernel of each convolution and matrix product.
    """

    models: tuple[Path, ...]
    target: Target
    transport: Transport
    pairs: int
    samples: Path | None
    audit: bool


def compare_models(
    comparison: Comparison,
    *,
    compare: Compare,
    find_layers: FindLayers,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure everything and return the document that `mm-edge bench --json` prints; `tell` is given each step's name.

    Raises:
        BenchError: the device cannot measure, or a measurement failed.
    """
    target, transport, models = comparison.target, comparison.transport, comparison.models
    machine = environment(target, transport)
    tell("measuring the harness itself")
    null_ms = measure_null(target, transport=transport)
    measurements = []
    others = models[1:] or models[:1]
    for index, model in enumerate(others, start=1):
        tell(f"{model.name} ({index} of {len(others)})")
        measurements.append(_measure_one(comparison, model, index, machine["fingerprint"]))
    tell("memory and cold start")
    entries = [_describe_model(comparison, model, compare) for model in models]
    tell("kernels")
    audits = {model.name: _audit(comparison, model, machine) for model in models if comparison.audit}
    tell("2:4 layer by layer")
    layers, notes = _time_patterns(comparison, find_layers)
    entries[0] |= {"latency_ms": measurements[0].dense_latency}
    for entry, measurement in zip(entries[1:], measurements if len(models) > 1 else (), strict=True):
        entry |= {
            "latency_ms": measurement.latency,
            "dense_latency_ms": measurement.dense_latency,
            "speedup": measurement.speedup,
            "speedup_ci": measurement.speedup_ci,
            "samples_file": measurement.samples_file,
        }
    return {
        "schema_version": BENCH_SCHEMA_VERSION,
        "target": target,
        "environment": machine,
        "harness_ms": null_ms,
        "pairs": comparison.pairs,
        "models": entries,
        "audit": audits if comparison.audit else None,
        "n_m_layers": layers,
        "warnings": [*machine["doubts"], *merge_doubts(measurements), *notes],
    }


def _measure_one(comparison: Comparison, model: Path, index: int, fingerprint: str) -> Measurement:
    folder = comparison.samples
    return measure_pair(
        comparison.models[0],
        model,
        comparison.target,
        transport=comparison.transport,
        pairs=comparison.pairs,
        raw_samples=folder / f"{index:03}-{model.stem}.json" if folder else None,
        fingerprint=fingerprint,
    )


def _describe_model(comparison: Comparison, model: Path, compare: Compare) -> dict[str, Any]:
    """Return the entry of one model with its memory, cold start and size; the latencies are filled in later."""
    on, off = (
        measure_footprint(model, comparison.target, transport=comparison.transport, arena=arena)
        for arena in (True, False)
    )
    return {
        "model": str(model),
        "latency_ms": None,
        "dense_latency_ms": None,
        "speedup": None,
        "speedup_ci": None,
        "peak_memory_bytes": on.peak_rss_bytes,
        "peak_memory_no_arena_bytes": off.peak_rss_bytes,
        "load_ms": on.session_ms,
        "first_run_ms": on.first_run_ms,
        "file_bytes": on.file_bytes,
        "samples_file": None,
        "parity": _compare_on_noise(comparison, model, compare),
    }


def _compare_on_noise(comparison: Comparison, model: Path, compare: Compare) -> Parity | None:
    """Compare an emulated device's outputs with this machine's on noise; None for a real device."""
    if comparison.transport.source != EMULATED.kind:
        return None
    session = worker.make_session(str(model), {"threads": 1})
    inputs = [next(iter(worker.make_inputs(session, {"seed": seed}).values())) for seed in range(NOISE_INPUTS)]
    noise = np.concatenate(inputs)
    with tempfile.TemporaryDirectory(prefix="mm-edge-noise-") as folder:
        images = Path(folder) / "noise.npy"
        np.save(images, noise)
        outputs = run_model(model, images, comparison.target, transport=comparison.transport)
    return compare(model, outputs, noise, "noise")


def _audit(comparison: Comparison, model: Path, machine: Mapping[str, Any]) -> Audit:
    save_to = (comparison.samples or AUDIT_FOLDER) / f"{model.stem}.optimised.onnx"
    return audit_model(model, comparison.target, machine, transport=comparison.transport, save_to=save_to)


def _time_patterns(comparison: Comparison, find_layers: FindLayers) -> tuple[dict[str, list[PatternTime]], list[str]]:
    """Return, by model, the times of its layers that keep the target's pattern, and what to warn of.

    Both are empty where the target has no kernels for a pattern.
    """
    target = comparison.target
    found: dict[str, list[PatternTime]] = {}
    notes: list[str] = []
    for model in comparison.models if target.n_m else ():
        times, why = time_pattern_layers(find_layers(model, target.n_m[0]), target, comparison.transport)
        if times:
            found[model.name] = times
        notes += [why] if why else []
    if pattern_options(target):
        notes.append("TensorRT may use fp16 for every model here, the dense one too: ratios show 2:4, not fp16")
    return found, list(dict.fromkeys(notes))
