"""What the formats are written with."""

from __future__ import annotations

from dataclasses import dataclass

from mm_edge.arrays import Float32Array
from mm_edge.bench.target import Target
from mm_edge.records import InputSpec


@dataclass(frozen=True)
class FormatContext:
    """What formats are written with.

    Attributes:
        input: the preprocessing that the model expects.
        target: the device.
        inputs: images (N, C, H, W) on which a converted model must agree with the .onnx.
        kind: what `inputs` are, "images" or "noise".
    """

    input: InputSpec
    target: Target
    inputs: Float32Array
    kind: str
