"""Formats: files that are written beside the chosen .onnx for a device, by the name of the flag that asks for them.

This module imports nothing heavy, so that the command line can name them without ONNX Runtime: what a format does lies
in a module of its own, imported when it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Format:
    """One kind of file written beside the chosen model.

    Attributes:
        help: what is written, for --help.
        write: takes the .onnx, the folder to write to and the context, and returns the files written.
    """

    help: str
    write: Callable[[Path, Path, FormatContext], list[Path]]


def _write_ort(source: Path, folder: Path, context: FormatContext) -> list[Path]:
    from mm_edge.formats.ort_file import convert_to_ort

    files = convert_to_ort(source, folder, context.target, context.inputs, context.kind)
    return [files.ort, files.operators]


def _write_baked(source: Path, folder: Path, context: FormatContext) -> list[Path]:
    from mm_edge.formats.preprocess import write_baked

    return [write_baked(source, folder, context.input)]


FORMATS: dict[str, Format] = {
    "ort": Format("Also write the chosen model in ONNX Runtime's .ort format.", _write_ort),
    "bake-preprocess": Format("Also write it with preprocessing inside, for raw uint8 images.", _write_baked),
}
