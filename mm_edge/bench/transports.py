"""Transports: the ways to reach a device, by the name a target profile gives as `transport`.

To add one, write a module with a class that fulfils transport.Transport and a function that opens it, and one entry of
TRANSPORTS here. The function is given the target, the text of --host (None without one) and a function that tells the
user one line. It returns the transport or raises an error that says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mm_edge.deferred import Deferred


@dataclass(frozen=True)
class TransportKind:
    """One way to reach a device.

    Attributes:
        help: how it reaches the device, in a few words.
        open: returns the transport to a target, given the target, --host and a function that tells the user a line.
        as_host: whether --host may name it in place of a device; it then opens as if no host were given.
    """

    help: str
    open: Callable[..., Any]
    as_host: bool = False


_HERE_OR_HOST = Deferred("mm_edge.bench.connect:open_here_or_host")

TRANSPORTS: dict[str, TransportKind] = {
    "local": TransportKind("this machine, in a process of its own", _HERE_OR_HOST),
    "ssh": TransportKind("the system's OpenSSH, to the device that --host names", _HERE_OR_HOST),
    "qemu": TransportKind(
        "an emulated arm64 core: outputs only, no times", Deferred("mm_edge.bench.connect:open_qemu"), as_host=True
    ),
    "none": TransportKind(
        "none: mm-edge writes artifacts for the device and measures nothing", Deferred("mm_edge.bench.connect:refuse")
    ),
}
