"""Which transport is opened, and that one entry of the registry adds another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mm_edge.bench import qemu
from mm_edge.bench.connect import Tell, open_transport
from mm_edge.bench.ssh import SshTransport
from mm_edge.bench.target import Target, load_target, parse_target
from mm_edge.bench.transport import LocalTransport, Transport
from mm_edge.bench.transports import TRANSPORTS, TransportKind
from mm_edge.errors import BenchError, TargetError

PROFILES = Path(__file__).resolve().parents[2] / "targets"


def test_choice() -> None:
    assert isinstance(open_transport(load_target("host"), None), LocalTransport)
    assert isinstance(open_transport(load_target("raspberry-pi-5"), "pi@board"), SshTransport)
    with pytest.raises(TargetError, match="this machine is not jetson-orin: give --host USER@HOST"):
        open_transport(load_target("jetson-orin"), None)
    with pytest.raises(TargetError, match="android-arm64 cannot be measured by mm-edge: a stock phone has no Python"):
        open_transport(load_target("android-arm64"), "phone")


def test_cores() -> None:
    assert qemu.core_of(load_target("raspberry-pi-4")) == "cortex-a72"
    assert qemu.core_of(load_target("raspberry-pi-5")) == "cortex-a76"
    assert qemu.core_of(load_target("rk3588")) == "cortex-a76"
    assert qemu.core_of(load_target("arm64")) == qemu.DEFAULT_CORE
    with pytest.raises(TargetError, match="the core of graviton3 is not emulated; use arm64"):
        qemu.core_of(load_target("graviton3"))
    with pytest.raises(TargetError, match="nvidia-a100 is x86_64; only aarch64 targets are emulated"):
        qemu.core_of(load_target("nvidia-a100"))


def test_emulator_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = dataclasses.replace(load_target("arm64"), transport="qemu")
    with pytest.raises(BenchError, match="run 'mm-edge targets setup arm64-qemu' once"):
        open_transport(own, None)


def test_host_may_name_the_emulator_whatever_the_profile_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for transport in ("local", "ssh", "qemu"):
        with pytest.raises(BenchError, match="run 'mm-edge targets setup arm64-qemu' once"):
            open_transport(dataclasses.replace(load_target("arm64"), transport=transport), "qemu")
    # Any other text is a device's name, even where it is a transport's.
    assert isinstance(open_transport(load_target("raspberry-pi-5"), "local"), SshTransport)
    with pytest.raises(TargetError, match="android-arm64 cannot be measured by mm-edge"):
        open_transport(load_target("android-arm64"), "qemu")


def test_one_entry_adds_a_transport(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "raspberry-pi-5.toml"
    text = (PROFILES / "raspberry-pi-5.toml").read_text().replace('transport = "ssh"', 'transport = "serial"')
    path.write_text(text)
    message = "unknown transport 'serial'; allowed: local, ssh, qemu, none"
    with pytest.raises(TargetError, match=message):
        parse_target(path)
    with pytest.raises(TargetError, match=message):
        open_transport(dataclasses.replace(load_target("arm64"), transport="serial"), None)

    opened: list[tuple[str, str | None]] = []

    def open_serial(target: Target, host: str | None, tell: Tell) -> Transport:
        opened.append((target.name, host))
        return LocalTransport()

    monkeypatch.setitem(TRANSPORTS, "serial", TransportKind("a serial line", open_serial))
    open_transport(parse_target(path), "/dev/ttyS0")
    assert opened == [("raspberry-pi-5", "/dev/ttyS0")]


@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_transport_says_what_it_is(name: str) -> None:
    assert TRANSPORTS[name].help
    assert "\n" not in TRANSPORTS[name].help
