"""Transports: the ways to reach a device, by the name a target profile gives as `transport`.

To add one, write a module with a class that fulfils transport.Transport, and one entry of TRANSPORTS here. Each `open`
is given the target, the text of --host (None without one) and a function that tells the user one line. It returns the
transport or raises an error that says what to do. This module imports nothing heavy: each `open` imports what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mm_edge.errors import TargetError, unknown_name

if TYPE_CHECKING:
    from mm_edge.bench.target import Target
    from mm_edge.bench.transport import Transport

Tell = Callable[[str], None]


@dataclass(frozen=True)
class TransportKind:
    """One way to reach a device.

    Attributes:
        help: how it reaches the device, in a few words.
        open: returns the transport to a target, given --host.
        as_host: whether --host may name it in place of a device; it then opens as if no host were given.
    """

    help: str
    open: Callable[[Target, str | None, Tell], Transport]
    as_host: bool = False


def open_transport(target: Target, host: str | None, tell: Tell = lambda line: None) -> Transport:
    """Return the transport to the device, to be entered with `with`.

    `host` is USER@HOST[:PORT] or an ssh alias, or "qemu" to emulate an arm64 core (outputs only, no times). Without
    it the target must be this machine, or its profile must name a transport that needs none.

    Raises:
        UsageError: `host` cannot be read.
        TargetError: the target is not this machine and no host was given, or it cannot be emulated.
        BenchError: the emulator has not been set up.
    """
    if target.transport not in TRANSPORTS:
        raise TargetError(unknown_name("transport", target.transport, TRANSPORTS))
    return TRANSPORTS[target.transport].open(target, host, tell)


def _open_here_or_host(target: Target, host: str | None, tell: Tell) -> Transport:
    from mm_edge.bench.target import matches_this_machine
    from mm_edge.bench.transport import LocalTransport

    if host is not None:
        return _open_host(target, host, tell)
    # Without a host, mm-edge may run on the very board that the profile describes.
    if not matches_this_machine(target):
        raise TargetError(
            f"this machine is not {target.name}: give --host USER@HOST to measure on one, "
            "or --target host to measure here"
        )
    return LocalTransport()


def _open_qemu(target: Target, host: str | None, tell: Tell) -> Transport:
    from mm_edge.bench.qemu import QemuTransport, core_of

    return QemuTransport(core_of(target)) if host is None else _open_host(target, host, tell)


def _refuse(target: Target, host: str | None, tell: Tell) -> Transport:
    raise TargetError(
        f"{target.name} cannot be measured by mm-edge: {target.sources.get('transport', 'artifacts only')}"
    )


def _open_host(target: Target, host: str, tell: Tell) -> Transport:
    """Open the transport that `host` names, or reach the device of that name through ssh."""
    from mm_edge.bench.ssh import SshTransport

    named = TRANSPORTS.get(host)
    if named is not None and named.as_host:
        return named.open(target, None, tell)
    return SshTransport(host, target.python, tell=tell)


TRANSPORTS: dict[str, TransportKind] = {
    "local": TransportKind("this machine, in a process of its own", _open_here_or_host),
    "ssh": TransportKind("the system's OpenSSH, to the device that --host names", _open_here_or_host),
    "qemu": TransportKind("an emulated arm64 core: outputs only, no times", _open_qemu, as_host=True),
    "none": TransportKind("none: mm-edge writes artifacts for the device and measures nothing", _refuse),
}
