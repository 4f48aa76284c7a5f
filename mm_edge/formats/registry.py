"""Formats: files that are written beside the chosen .onnx for a device, by the name of the flag that asks for them.

This module imports nothing heavy, so that the command line can name them without ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One kind of file written beside the chosen model.

    Attributes:
        help: what is written, for --help.
    """

    help: str


FORMATS: dict[str, Format] = {
    "ort": Format("Also write the chosen model in ONNX Runtime's .ort format."),
    "bake-preprocess": Format("Also write it with preprocessing inside, for raw uint8 images."),
}
