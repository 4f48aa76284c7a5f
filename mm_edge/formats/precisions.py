"""Precisions: the number formats a candidate is written in, by the name users type with --precision.

This module imports nothing heavy, so that the command line can name them without ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mm_edge.deferred import Deferred


@dataclass(frozen=True)
class Precision:
    """One number format.

    Attributes:
        help: what it is, in a few words, for --help.
        check: takes the target and whether there are calibration images; raises UsageError, with the reason and what
            to use instead, where the target gains nothing from it or images are missing. None accepts everything.
        convert: takes an fp32 model, the file to write, the target, the images (conversion.CalibrationImages or None),
            threads and progress, writes the version in this precision and returns a conversion.QuantReport. None for
            the precision candidates are made in.
    """

    help: str
    check: Callable[..., None] | None = None
    convert: Callable[..., Any] | None = None


# The precision candidates are made in; every other is converted from it.
MADE_IN = "fp32"

PRECISIONS: dict[str, Precision] = {
    MADE_IN: Precision("as pruned"),
    "int8": Precision(
        "8-bit integers, ranges from calibration images",
        Deferred("mm_edge.formats.conversion:check_int8"),
        Deferred("mm_edge.formats.quantize:convert_int8"),
    ),
    "fp16": Precision(
        "16-bit floating point",
        Deferred("mm_edge.formats.conversion:check_fp16"),
        Deferred("mm_edge.formats.fp16:convert_fp16"),
    ),
}
