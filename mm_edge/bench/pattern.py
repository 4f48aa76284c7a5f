"""How much 2:4 weights gain over dense ones, layer by layer, on a device whose GPU has 2:4 kernels.

Each matrix product of the model that keeps the pattern is timed alone, at its own size, by PyTorch's semi-structured
kernels in fp16. A convolution over a window is no single product: only TensorRT has sparse kernels for it, so its gain
shows only in the time of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mm_edge.bench import stats
from mm_edge.bench.session import measure_products
from mm_edge.bench.target import Target
from mm_edge.bench.transport import Transport
from mm_edge.errors import BenchError

# PyTorch's kernels take fp16 weights in tiles of 32 outputs by 64 inputs.
TILE_OUTPUTS, TILE_INPUTS = 32, 64


@dataclass(frozen=True)
class PatternLayer:
    """One product of a deployed model with its size: `rows` positions, each mapped from `inputs` to `outputs`.

    `rows` is None for a convolution over a window, which is no single matrix product.
    """

    name: str
    op_type: str
    rows: int | None
    inputs: int
    outputs: int

    @property
    def size(self) -> tuple[int | None, int, int]:
        """Rows, inputs and outputs."""
        return self.rows, self.inputs, self.outputs


@dataclass(frozen=True)
class PatternTime:
    """The times of one layer: median microseconds, median ratio dense / 2:4 and its 95 % interval.

    A layer that was not measured has None in their place and the `reason`.
    """

    layer: PatternLayer
    dense_us: float | None
    sparse_us: float | None
    speedup: float | None
    speedup_ci: tuple[float, float] | None
    reason: str | None


def time_pattern_layers(
    layers: Sequence[PatternLayer], target: Target, transport: Transport
) -> tuple[list[PatternTime], str | None]:
    """Return the times of `layers`, and why none could be taken (the list is then empty) or None."""
    reasons = [_why_not(layer) for layer in layers]
    sizes = sorted({_size(layer) for layer, reason in zip(layers, reasons, strict=True) if reason is None})
    try:
        samples = dict(zip(sizes, measure_products(sizes, target, transport=transport), strict=True)) if sizes else {}
    except BenchError as error:
        return [], f"2:4 was not measured layer by layer: {error}"
    times = []
    for layer, reason in zip(layers, reasons, strict=True):
        if reason is not None:
            times.append(PatternTime(layer, None, None, None, None, reason))
            continue
        dense, sparse = samples[_size(layer)]
        ratios = stats.pair_ratios(dense, sparse)
        middle = [float(np.median(values)) for values in (dense, sparse, ratios)]
        interval = stats.bootstrap_median(ratios, 1)
        times.append(PatternTime(layer, middle[0] / 1000, middle[1] / 1000, middle[2], interval, None))
    return times, None


def _why_not(layer: PatternLayer) -> str | None:
    """Return why PyTorch has no sparse kernel for `layer`, or None where it has one."""
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
