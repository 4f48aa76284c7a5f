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
    """What was made.

    Attributes:
        precision: its name in PRECISIONS.
        method: how it was converted, "static", "dynamic" or "cast" for instance; `recovered_by` in the report names it.
        file_bytes: size of the file.
        scheme: types of the activations and weights of int8, "U8S8" for instance.
        ranges: how the ranges of int8 were found.
        layers: how many layers with weights are in 8 bits.
        fp32_layers: names of those left in fp32.
        kl_to_fp32: divergence from the fp32 model on held-back images, nats; None where none were given.
        agreement_top1: share of them whose first class is the same.
        notes: what else the reader should know.
    """

    precision: str
    method: str
    file_bytes: int
    scheme: str | None = None
    ranges: str | None = None
    layers: int = 0
    fp32_layers: tuple[str, ...] = ()
    kl_to_fp32: float | None = None
    agreement_top1: float | None = None
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
