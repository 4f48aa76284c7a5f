"""Opens the transport to a device, from what the user asked for and what the target profile says."""

from __future__ import annotations

from collections.abc import Callable

from mm_edge.bench.qemu import QemuTransport, core_of
from mm_edge.bench.ssh import SshTransport
from mm_edge.bench.target import Target, matches_this_machine
from mm_edge.bench.transport import LocalTransport, Transport
from mm_edge.bench.transports import TRANSPORTS
from mm_edge.errors import TargetError, unknown_name

Tell = Callable[[str], None]


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
    transport: Transport = TRANSPORTS[target.transport].open(target, host, tell)
    return transport


def open_here_or_host(target: Target, host: str | None, tell: Tell) -> Transport:
    """Open this machine, or the device that --host names."""
    if host is not None:
        return _open_host(target, host, tell)
    # Without a host, mm-edge may run on the very board that the profile describes.
    if not matches_this_machine(target):
        raise TargetError(
            f"this machine is not {target.name}: give --host USER@HOST to measure on one, "
            "or --target host to measure here"
        )
    return LocalTransport()


def open_qemu(target: Target, host: str | None, tell: Tell) -> Transport:
    """Open the emulator, or the device that --host names."""
    return QemuTransport(core_of(target)) if host is None else _open_host(target, host, tell)


def refuse(target: Target, host: str | None, tell: Tell) -> Transport:
    """Raise TargetError: the device cannot be measured by mm-edge."""
    raise TargetError(
        f"{target.name} cannot be measured by mm-edge: {target.sources.get('transport', 'artifacts only')}"
    )


def _open_host(target: Target, host: str, tell: Tell) -> Transport:
    """Open the transport that `host` names, or reach the device of that name through ssh."""
    named = TRANSPORTS.get(host)
    if named is not None and named.as_host:
        transport: Transport = named.open(target, None, tell)
        return transport
    return SshTransport(host, target.python, tell=tell)
