"""Precisions: the number formats a candidate is written in, by the name users type with --precision.

This module imports nothing heavy, so that the command line can name them without ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Precision:
    """One number format.

    Attributes:
        help: what it is, in a few words, for --help.
    """

    help: str
    check: Callable[..., None] | None = None
    convert: Callable[..., Any] | None = None


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("as pruned"),
    "int8": Precision("8-bit integers, ranges from calibration images"),
    "fp16": Precision("16-bit floating point"),
}


@dataclass(frozen=True)
class CalibrationImages:
    ranges: Any
    held_back: Any


QuantReport = Any
