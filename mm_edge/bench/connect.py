"""Which way to the device: what the user asked for and the profile says, turned into a transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mm_edge.bench.host import MINIMUM_ONNXRUNTIME, MINIMUM_PYTHON, version_tuple
from mm_edge.bench.qemu import QemuTransport, core_of
from mm_edge.bench.ssh import SshTransport
from mm_edge.bench.target import Target, matches_this_machine
from mm_edge.bench.transport import LocalTransport, Transport, printable
from mm_edge.errors import BenchError, TargetError

EMULATED_HOST = "qemu"  # as --host: emulate the target's core


def open_transport(target: Target, host: str | None, tell: Callable[[str], None] = lambda line: None) -> Transport:
    """Return the way to the device, to be entered with `with`.

    `host` is USER@HOST[:PORT] or an ssh alias, or "qemu" to emulate an arm64 core (outputs only, no times). Without
    it the target must be this machine, or its profile must name qemu as its transport.

    Raises:
        UsageError: `host` cannot be read.
        TargetError: the target is not this machine and no host was given, or it cannot be emulated.
        BenchError: the emulator has not been set up.
    """
    if target.transport == "none":
        raise TargetError(
            f"{target.name} cannot be measured by mm-edge: {target.sources.get('transport', 'artifacts only')}"
        )
    if host == EMULATED_HOST or (host is None and target.transport == "qemu"):
        return QemuTransport(core_of(target))
    if host is not None:
        return SshTransport(host, target.python, tell=tell)
    if not matches_this_machine(target):
        raise TargetError(
            f"this machine is not {target.name}: give --host USER@HOST to measure on one, "
            "or --target host to measure here"
        )
    return LocalTransport()


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
