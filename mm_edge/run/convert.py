"""Candidates in smaller numbers: int8 and fp16 versions of a finished fp32 candidate.

Channels go first, numbers are made smaller after: the int8 version is made from the pruned fp32 artifact, calibrated on
calibration images, judged on the rest of them, and evaluated on validation images like any other row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mm_edge.bench.target import Target
from mm_edge.formats.precisions import PRECISIONS, CalibrationImages, QuantReport
from mm_edge.records import Candidate
from mm_edge.run.make import Workbench, evaluate_artifact

CALIBRATION_IMAGES = 100
HELD_BACK_IMAGES = 64


def check_precisions(precisions: tuple[str, ...], target: Target, has_data: bool) -> None:
    """Refuse a precision the target gains nothing from, or that needs images there are none of.

    Raises:
        UsageError: with the reason and what to use instead.
    """
    for name, precision in PRECISIONS.items():
        if name in precisions:
            precision.check(target, has_data)


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
    convert = PRECISIONS[precision].convert
    assert convert is not None
    report = convert(source, out, target, images, bench.threads, advance)
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


def _recovered(before: str | None, report: QuantReport) -> str | None:
    """Say how the numbers were made beside what recovered the weights."""
    left = f", {len(report.fp32_layers)} layers in fp32" if report.fp32_layers else ""
    scheme = f" {report.scheme}" if report.scheme else ""
    return f"{before + ' + ' if before else ''}{report.method} {report.precision}{scheme}{left}"


def _named(source: Path, precision: str) -> Path:
    return source.with_name(f"{source.stem}-{precision}{source.suffix}")
