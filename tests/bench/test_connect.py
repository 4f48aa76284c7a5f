"""Which transport is chosen, and what a device lacks."""

from __future__ import annotations

import dataclasses

import pytest

from mm_edge.bench import qemu
from mm_edge.bench.connect import missing, open_transport
from mm_edge.bench.ssh import SshTransport
from mm_edge.bench.target import load_target
from mm_edge.bench.transport import LocalTransport
from mm_edge.errors import BenchError, TargetError

GOOD = {"python": "3.9.2", "numpy": "1.24.0", "onnxruntime": "1.17.1", "onnxruntime_error": None}


def test_choice():
    assert isinstance(open_transport(load_target("host"), None), LocalTransport)
    assert isinstance(open_transport(load_target("raspberry-pi-5"), "pi@board"), SshTransport)
    with pytest.raises(TargetError, match="this machine is not jetson-orin: give --host USER@HOST"):
        open_transport(load_target("jetson-orin"), None)
    with pytest.raises(TargetError, match="android-arm64 cannot be measured by mm-edge: a stock phone has no Python"):
        open_transport(load_target("android-arm64"), "phone")


def test_cores():
    assert qemu.core_of(load_target("raspberry-pi-4")) == "cortex-a72"
    assert qemu.core_of(load_target("raspberry-pi-5")) == "cortex-a76"
    assert qemu.core_of(load_target("rk3588")) == "cortex-a76"
    assert qemu.core_of(load_target("arm64")) == qemu.DEFAULT_CORE
    with pytest.raises(TargetError, match="the core of graviton3 is not emulated; use arm64"):
        qemu.core_of(load_target("graviton3"))
    with pytest.raises(TargetError, match="nvidia-a100 is x86_64; only aarch64 targets are emulated"):
        qemu.core_of(load_target("nvidia-a100"))


def test_emulator_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = dataclasses.replace(load_target("arm64"), transport="qemu")
    with pytest.raises(BenchError, match="run 'mm-edge targets setup arm64-qemu' once"):
        open_transport(own, None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"python": "3.7.3"}, ["Python 3.7.3 is too old: install 3.8 or later"]),
        ({"numpy": None}, ["numpy is missing: run 'python3 -m pip install numpy' there"]),
        (
            {"onnxruntime": None, "onnxruntime_error": "ModuleNotFoundError: No module named 'onnxruntime'"},
            ["onnxruntime is missing: run 'python3 -m pip install onnxruntime' there"],
        ),
        (
            {"onnxruntime": None, "onnxruntime_error": "ImportError: x.so: wrong ELF class: ELFCLASS64"},
            [
                "onnxruntime does not load (ImportError: x.so: wrong ELF class: ELFCLASS64): its build may be for "
                "another architecture or C library; run 'python3 -m pip install --force-reinstall onnxruntime' there"
            ],
        ),
        (
            {"onnxruntime": "1.9.0"},
            ["onnxruntime 1.9.0 is too old: run 'python3 -m pip install --upgrade onnxruntime' there (1.16 or later)"],
        ),
    ],
)
def test_missing(changes, expected):
    assert missing({**GOOD, **changes}) == expected
