"""Candidates in smaller numbers: int8 and fp16 versions of a finished fp32 candidate.

Channels go first, numbers are made smaller after: the int8 version is made from the pruned fp32 artifact, calibrated on
calibration images, judged on the rest of them, and evaluated on validation images like any other row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mm_edge.arrays import Float32Array
from mm_edge.bench.target import Target
from mm_edge.errors import UsageError
from mm_edge.formats.quantize import QuantReport, convert_fp16, quantise, scheme_for
from mm_edge.records import Candidate
from mm_edge.run.make import Workbench, evaluate_artifact

CALIBRATION_IMAGES = 100
HELD_BACK_IMAGES = 64
PRECISIONS = ("fp32", "int8", "fp16")


@dataclass(frozen=True)
class CalibrationImages:
    """Images (N, C, H, W) to find value ranges on, and others to judge by."""

    ranges: Float32Array
    held_back: Float32Array


def check_precisions(precisions: tuple[str, ...], target: Target, has_data: bool) -> None:
    """Refuse a precision the target gains nothing from, or that needs images there are none of.

    Raises:
        UsageError: with the reason and what to use instead.
    """
    if "int8" in precisions:
        scheme_for(target)
        if not has_data:
            raise UsageError("--precision int8 needs calibration images; give --data PATH")
    if "fp16" in precisions and "fp16" not in target.data_types:
        raise UsageError(
            f"--precision fp16 is not for {target.name}: {target.sources['data_types']}; use fp32"
            + (" or int8" if "int8" in target.data_types else "")
        )


def convert_candidate(
    bench: Workbench,
    candidate: Candidate,
    precision: str,
    target: Target,
    images: CalibrationImages | None,
    advance: Callable[[int, int], None] | None = None,
) -> Candidate:
    """Make, save and evaluate the `precision` version of an fp32 `candidate`.

    Parity is left out: smaller numbers are not exact, agreement with the dense model says what they changed.

    Raises:
        JobError: it cannot be quantised.
    """
    assert candidate.artifact is not None
    source = bench.folder / candidate.artifact
    out = (
        source.with_name(source.name.replace("fp32", precision)) if "fp32" in source.name else _named(source, precision)
    )
    report = _convert(source, out, precision, target, images, bench.threads, advance)
    evaluation = evaluate_artifact(bench, out)
    return replace(
        candidate,
        id=_rename(candidate.id, precision),
        precision=precision,
        file_bytes=out.stat().st_size,
        parity=None,
        artifact=out.relative_to(bench.folder).as_posix(),
        recovered_by=_recovered(candidate.recovered_by, report),
        **evaluation,
    )


def _rename(candidate: str, precision: str) -> str:
    """Return the id of the `precision` version; a control such as dense@192 does not name its own."""
    if "fp32" in candidate:
        return candidate.replace("fp32", precision)
    return candidate.replace("dense", f"dense/{precision}", 1)


def _convert(
    source: Path,
    out: Path,
    precision: str,
    target: Target,
    images: CalibrationImages | None,
    threads: int,
    advance: Callable[[int, int], None] | None,
) -> QuantReport:
    if precision == "fp16":
        return convert_fp16(source, out, target)
    assert images is not None
    return quantise(source, out, target, [images.ranges], images.held_back, threads=threads, advance=advance)


def _recovered(before: str | None, report: QuantReport) -> str | None:
    """Say how the numbers were made beside what recovered the weights."""
    left = f", {len(report.fp32_layers)} layers in fp32" if report.fp32_layers else ""
    scheme = f" {report.scheme}" if report.scheme else ""
    return f"{before + ' + ' if before else ''}{report.method} {report.precision}{scheme}{left}"


def _named(source: Path, precision: str) -> Path:
    return source.with_name(f"{source.stem}-{precision}{source.suffix}")
