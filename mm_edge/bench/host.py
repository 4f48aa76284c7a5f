"""The environment record: which machine and runtime a figure was measured on, and what makes that machine doubtful."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mm_edge.bench.target import Target, mismatches, unfit_multiples

MINIMUM_ONNXRUNTIME = (1, 16)
MINIMUM_PYTHON = (3, 8)

_FINGERPRINTED = ("isa", "cpu_model", "flags", "cpu_parts", "cores", "memory_bytes", "os", "host", "python", "numpy")


def describe_machine(info: Mapping[str, Any], target: Target, transport: str) -> dict[str, Any]:
    """Return the `environment` section: the device's `info`, how it was reached, and a fingerprint of it.

    `doubts` holds a sentence for each way the device differs from the target and each cause of unsteady times.
    """
    import numpy as np
    import onnxruntime

    return {
        **info,
        "transport": transport,
        "target": target.name,
        "fingerprint": fingerprint(info),
        "doubts": doubts(info, target),
        "controller": {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__},
    }


def fingerprint(info: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that differ between machines and between runtimes on one machine."""
    keys = (*_FINGERPRINTED, "onnxruntime", "emulated")
    text = json.dumps([info.get(key) for key in keys], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def doubts(info: Mapping[str, Any], target: Target) -> list[str]:
    """Return a sentence for each reason to doubt a latency from this machine."""
    found = mismatches(target, info)
    unfit = None if found else unfit_multiples(target, info)
    if unfit is not None:
        found.append(unfit)
    slow = [name for name in info["governors"] if name not in ("performance", "schedutil")]
    if slow:
        found.append(
            f"the CPU governor is {', '.join(slow)}: clocks follow load; "
            "for steady figures set it with 'sudo cpupower frequency-set -g performance'"
        )
    return found


def version_tuple(text: str | None) -> tuple[int, ...]:
    """Return the leading numbers of a version such as "1.32.0+cpu"; () for None."""
    numbers = []
    for piece in (text or "").split("."):
        if not piece.isdigit():
            break
        numbers.append(int(piece))
    return tuple(numbers)
