"""How a target wants its 8-bit numbers: the type of the activations belongs to the instruction set.

x86 multiplies unsigned by signed bytes (without VNNI the sum of two products saturates 16 bits, so weights get 7 bits
there), arm64 and NVIDIA signed by signed.
"""

from __future__ import annotations

from dataclasses import dataclass

from mm_edge.bench.target import Target
from mm_edge.formats.conversion import require_data_type

VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})


@dataclass(frozen=True)
class Scheme:
    """How a target wants its 8-bit numbers.

    Attributes:
        name: activations then weights, "U8S8" or "S8S8".
        signed: whether activations are signed bytes.
        symmetric: whether activations have zero point 0.
        reduce_range: whether weights use 7 of their 8 bits.
        plain_weights: whether the file keeps fp32 weights with a quantise node behind them, and fp32 biases.
        reason: why, for the report.
    """

    name: str
    signed: bool
    symmetric: bool
    reduce_range: bool
    plain_weights: bool
    reason: str


def scheme_for(target: Target) -> Scheme:
    """Return the 8-bit scheme for `target` (`host` resolved).

    Raises:
        UsageError: the target does not list int8.
    """
    require_data_type(target, "int8")
    if target.provider != Target.provider:
        reason = f"{target.provider} multiplies signed bytes, with zero point 0 on both sides"
        return Scheme("S8S8", True, True, False, True, reason)
    if target.isa == "aarch64":
        return Scheme("S8S8", True, False, False, False, "arm64 kernels multiply signed bytes")
    if VNNI_FLAGS & set(target.features):
        return Scheme("U8S8", False, False, False, False, "VNNI multiplies unsigned by signed bytes without saturating")
    reason = "without VNNI the sum of two products saturates 16 bits: unsigned activations, 7-bit weights"
    return Scheme("U8S8", False, False, True, False, reason)
