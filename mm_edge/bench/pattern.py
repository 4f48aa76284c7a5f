"""2:4 against dense, layer by layer, on a device whose GPU runs it: where the pattern gains and where it does not.

Each product of the model that keeps the pattern is timed alone, at its own size, by PyTorch's semi-structured kernels
in fp16. A convolution over a window is no single product: TensorRT alone has kernels for it, so its time shows only in
the whole model's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mm_edge.bench import stats
from mm_edge.bench.session import measure_products
from mm_edge.bench.target import Target
from mm_edge.bench.transport import Transport
from mm_edge.errors import BenchError
from mm_edge.plan.n_m import PatternLayer, parse_pattern, pattern_layers

# PyTorch's kernels take fp16 weights in tiles of 32 outputs by 64 inputs.
TILE_OUTPUTS, TILE_INPUTS = 32, 64


@dataclass(frozen=True)
class PatternTime:
    """One layer: median microseconds, median ratio and its 95 % interval; None with the reason where not measured."""

    layer: PatternLayer
    dense_us: float | None
    sparse_us: float | None
    speedup: float | None
    speedup_ci: tuple[float, float] | None
    reason: str | None


def time_pattern_layers(model: Path, target: Target, transport: Transport) -> tuple[list[PatternTime], str | None]:
    """Return the times of every layer of `model` that keeps the target's pattern, and why there are none, or None."""
    layers = pattern_layers(model, parse_pattern(target.n_m[0]))
    reasons = [_why_not(layer) for layer in layers]
    sizes = sorted({_size(layer) for layer, reason in zip(layers, reasons, strict=True) if reason is None})
    try:
        samples = dict(zip(sizes, measure_products(sizes, target, transport=transport), strict=True)) if sizes else {}
    except BenchError as error:
        return [], f"2:4 was not measured layer by layer: {error}"
    rows = []
    for layer, reason in zip(layers, reasons, strict=True):
        if reason is not None:
            rows.append(PatternTime(layer, None, None, None, None, reason))
            continue
        dense, sparse = samples[_size(layer)]
        ratios = stats.pair_ratios(dense, sparse)
        middle = [float(np.median(values)) for values in (dense, sparse, ratios)]
        interval = stats.bootstrap_median(ratios, 1)
        rows.append(PatternTime(layer, middle[0] / 1000, middle[1] / 1000, middle[2], interval, None))
    return rows, None


def _why_not(layer: PatternLayer) -> str | None:
    if layer.rows is None:
        return "a convolution over a window: TensorRT has sparse kernels for it, PyTorch has none"
    if layer.inputs % TILE_INPUTS or layer.outputs % TILE_OUTPUTS:
        return (
            f"PyTorch's sparse kernels want multiples of {TILE_INPUTS} inputs and {TILE_OUTPUTS} outputs; "
            f"it has {layer.inputs} and {layer.outputs}"
        )
    return None


def _size(layer: PatternLayer) -> tuple[int, int, int]:
    assert layer.rows is not None
    return layer.rows, layer.inputs, layer.outputs
