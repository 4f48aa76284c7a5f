"""What converting a model to another precision takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from mm_edge.arrays import Float32Array
from mm_edge.bench.target import Target
from mm_edge.errors import UsageError


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


def check_int8(target: Target, has_data: bool) -> None:
    """Refuse int8 where the target does not list it, or where there are no calibration images.

    Raises:
        UsageError: with the reason and what to do.
    """
    require_data_type(target, "int8")
    if not has_data:
        raise UsageError("--precision int8 needs calibration images; give --data PATH")


def check_fp16(target: Target, has_data: bool) -> None:
    """Refuse fp16 where the target does not list it.

    Raises:
        UsageError: with the reason and what to use instead.
    """
    if "fp16" not in target.data_types:
        raise UsageError(
            f"--precision fp16 is not for {target.name}: {target.sources['data_types']}; use fp32"
            + (" or int8" if "int8" in target.data_types else "")
        )
