"""Formats: files that are written beside the chosen .onnx for a device, by the name of the flag that asks for them.

This module imports nothing heavy, so that the command line can name them without ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mm_edge.deferred import Deferred


@dataclass(frozen=True)
class Format:
    """One kind of file written beside the chosen model.

    Attributes:
        help: what is written, for --help.
        write: takes the .onnx, the folder to write to and the context (context.FormatContext), and returns the files
            written.
    """

    help: str
    write: Callable[..., list[Path]]


FORMATS: dict[str, Format] = {
    "ort": Format(
        "Also write the chosen model in ONNX Runtime's .ort format.", Deferred("mm_edge.formats.ort_file:write_ort")
    ),
    "bake-preprocess": Format(
        "Also write it with preprocessing inside, for raw uint8 images.",
        Deferred("mm_edge.formats.preprocess:write_baked"),
    ),
}
