"""Real arm64 kernels under emulation agree with this machine's, and a whole board can be software.

The emulator is built once by 'mm-edge targets setup arm64-qemu'; MM_EDGE_TEST_SETUP=1 lets the tests build it. They
run 8 images, or as many as MM_EDGE_TEST_IMAGES says.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest
from sshd import LoopbackServer, why_not

from mm_edge import demo
from mm_edge.api import run_job
from mm_edge.bench import qemu, session, ssh
from mm_edge.bench.connect import open_transport
from mm_edge.bench.host import doubts
from mm_edge.bench.target import load_target
from mm_edge.errors import BenchError
from mm_edge.load.data import open_data
from mm_edge.load.models import LoadedModel, LoadOptions, load_model
from mm_edge.progress import Stages
from mm_edge.quality.parity import TOLERANCE, compare_with_outputs
from mm_edge.records import Latency, Report
from mm_edge.run.request import make_request

COUNT = int(os.environ.get("MM_EDGE_TEST_IMAGES", "8"))


@pytest.fixture(scope="module")
def emulator() -> Path:
    if platform.system() != "Linux" or shutil.which(qemu.QEMU) is None:
        pytest.skip(f"{qemu.QEMU} is not installed (Debian: sudo apt-get install qemu-user-static)")
    if not qemu.python_path("cortex-a76").is_file():
        if os.environ.get("MM_EDGE_TEST_SETUP") != "1":
            pytest.skip("no arm64 emulator: run 'mm-edge targets setup arm64-qemu', or set MM_EDGE_TEST_SETUP=1")
        try:
            qemu.setup()
        except BenchError as error:
            pytest.skip(f"the arm64 emulator cannot be set up here: {error}")
    return qemu.cache_folder()


def load() -> LoadedModel:
    return load_model(str(demo.MODEL), LoadOptions())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The demo network pruned for a Raspberry Pi 5."""
    out = tmp_path_factory.mktemp("made")
    setting = {"out": out, "target": "raspberry-pi-5", "data": str(demo.IMAGES), "bench": False}
    request = make_request(
        **setting, signals=("magnitude",), strategies=("balanced",), input_sizes="none", recover="bn"
    )
    return out, run_job(load, request, Stages())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = load().input
    path = tmp_path_factory.mktemp("images") / "images.npy"
    batch, _ = next(iter(open_data(str(demo.IMAGES), spec, None).validation.batches(COUNT)))
    assert len(batch) == COUNT
    np.save(path, np.asarray(batch, np.float32))
    return path


def check_parity(made: tuple[Path, Report], images: Path, target_name: str) -> None:
    out, report = made
    target = load_target(target_name)
    (candidate,) = report.candidates
    assert candidate.artifact is not None
    assert candidate.macs < 0.9 * report.dense.macs
    with open_transport(target, "qemu") as device:
        machine = session.read_info(device)
        for model in (out / "dense.onnx", out / candidate.artifact):
            outputs = session.run_model(model, images, target, transport=device)
            parity = compare_with_outputs(model, outputs, np.load(images), "images")
            assert parity.max_rel_err <= TOLERANCE
            assert parity.top1_agreement == 1.0
            assert parity.inputs.count == COUNT
            assert session.measure_memory(model, target, transport=device) is None
            assert session.measure_pair(model, model, target, transport=device).latency == Latency()
    assert machine["emulated"] is True
    assert doubts(machine, target) == []


def test_cortex_a76_agrees(emulator: Path, made: tuple[Path, Report], images: Path) -> None:
    check_parity(made, images, "raspberry-pi-5")


def test_cortex_a72_agrees(emulator: Path, made: tuple[Path, Report], images: Path) -> None:
    check_parity(made, images, "raspberry-pi-4")


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_whole_board_in_software(
    emulator: Path, made: tuple[Path, Report], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = made
    server = LoopbackServer(tmp_path)
    monkeypatch.setenv(ssh.CONFIG_VARIABLE, str(server.config))
    board = dataclasses.replace(load_target("raspberry-pi-5"), python=(str(qemu.python_path("cortex-a76")),))
    server.start()
    try:
        with open_transport(board, "board") as device:
            outputs = session.run_model(out / "dense.onnx", images, board, transport=device)
            measured = session.measure_pair(out / "dense.onnx", out / "dense.onnx", board, transport=device)
            assert device.source == "emulated"
        parity = compare_with_outputs(out / "dense.onnx", outputs, np.load(images), "images")
        assert parity.max_rel_err <= TOLERANCE
        assert measured.speedup is None
        assert server.left_behind() == []
    finally:
        server.kill()
