"""Precisions: the number formats a candidate is written in, by the name users type with --precision.

This module imports nothing heavy, so that the command line can name them without ONNX Runtime: what a precision does
lies in a module of its own, imported when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mm_edge.arrays import Float32Array
from mm_edge.bench.target import Target
from mm_edge.errors import UsageError
from mm_edge.progress import Advance


@dataclass(frozen=True)
class CalibrationImages:
    """Images (N, C, H, W): `ranges` to find value ranges on, `held_back` to compare with fp32 on."""

    ranges: Float32Array
    held_back: Float32Array


@dataclass(frozen=True)
class QuantReport:
    """What was made: `precision` "int8" or "fp16", by `method` "static", "dynamic" or "cast".

    `kl_to_fp32` is on held-back images, None where none were given. `layers` counts the weighted layers in 8 bits.
    """

    precision: str
    method: str
    scheme: str | None
    ranges: str | None
    layers: int
    fp32_layers: tuple[str, ...]
    kl_to_fp32: float | None
    agreement_top1: float | None
    file_bytes: int
    notes: tuple[str, ...] = ()


Check = Callable[[Target, bool], None]
Convert = Callable[[Path, Path, Target, CalibrationImages | None, int, Advance | None], QuantReport]


@dataclass(frozen=True)
class Precision:
    """One number format.

    Attributes:
        help: what it is, in a few words, for --help.
        check: takes the target and whether there are calibration images; raises UsageError, with the reason and what
            to use instead, where the target gains nothing from it or images are missing.
        convert: takes an fp32 model, the file to write, the target, images, threads and progress, and writes the
            version in this precision. None for the precision candidates are made in.
    """

    help: str
    check: Check
    convert: Convert | None = None


def require_data_type(target: Target, precision: str) -> None:
    """Refuse a precision that `target` does not list.

    Raises:
        UsageError: with the reason the profile gives.
    """
    if precision in target.data_types:
        return
    have = ", ".join(target.data_types)
    why = target.sources.get("data_types", "the profile does not list it")
    raise UsageError(f"{precision} gains nothing on {target.name}, which lists {have} ({why}); use one of these")


def _check_fp32(target: Target, has_data: bool) -> None:
    """Accept every target."""


def _check_int8(target: Target, has_data: bool) -> None:
    require_data_type(target, "int8")
    if not has_data:
        raise UsageError("--precision int8 needs calibration images; give --data PATH")


def _convert_int8(
    source: Path,
    out: Path,
    target: Target,
    images: CalibrationImages | None,
    threads: int,
    advance: Advance | None,
) -> QuantReport:
    from mm_edge.formats.quantize import quantise

    assert images is not None
    return quantise(source, out, target, [images.ranges], images.held_back, threads=threads, advance=advance)


def _check_fp16(target: Target, has_data: bool) -> None:
    if "fp16" not in target.data_types:
        raise UsageError(
            f"--precision fp16 is not for {target.name}: {target.sources['data_types']}; use fp32"
            + (" or int8" if "int8" in target.data_types else "")
        )


def _convert_fp16(
    source: Path,
    out: Path,
    target: Target,
    images: CalibrationImages | None,
    threads: int,
    advance: Advance | None,
) -> QuantReport:
    from mm_edge.formats.fp16 import convert_fp16

    return convert_fp16(source, out, target)


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("as pruned", _check_fp32),
    "int8": Precision("8-bit integers, ranges from calibration images", _check_int8, _convert_int8),
    "fp16": Precision("16-bit floating point", _check_fp16, _convert_fp16),
}
# The precision candidates are made in; every other is converted from it.
MADE_IN = "fp32"
