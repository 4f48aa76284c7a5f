"""What the worker needs on a device and does not find there, with the command that helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_edge.bench.host import MINIMUM_ONNXRUNTIME, MINIMUM_PYTHON, version_tuple
from mm_edge.bench.transport import printable
from mm_edge.errors import BenchError


def missing(info: Mapping[str, Any]) -> list[str]:
    """Return a sentence, with the command that helps, for each thing a device lacks; `info` is its info record."""
    found = []
    if version_tuple(info["python"]) < MINIMUM_PYTHON:
        found.append(f"Python {info['python']} is too old: install {_dotted(MINIMUM_PYTHON)} or later")
    if info["numpy"] is None:
        found.append("numpy is missing: run 'python3 -m pip install numpy' there")
    if info["onnxruntime"] is None:
        reason = printable(str(info["onnxruntime_error"]))
        if "No module named" in reason:
            found.append("onnxruntime is missing: run 'python3 -m pip install onnxruntime' there")
        else:
            found.append(
                f"onnxruntime does not load ({reason}): its build may be for another architecture or C library; "
                "run 'python3 -m pip install --force-reinstall onnxruntime' there"
            )
    elif version_tuple(info["onnxruntime"]) < MINIMUM_ONNXRUNTIME:
        found.append(
            f"onnxruntime {info['onnxruntime']} is too old: run 'python3 -m pip install --upgrade onnxruntime' there "
            f"({_dotted(MINIMUM_ONNXRUNTIME)} or later)"
        )
    return found


def require_ready(info: Mapping[str, Any], device: str) -> None:
    """Raise BenchError, naming the remedy, when the device of `info` lacks what the worker needs."""
    lacks = missing(info)
    if lacks:
        raise BenchError(f"{device}: {'; '.join(lacks)}")


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(str(n) for n in numbers)
