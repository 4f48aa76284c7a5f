"""Measuring through a real sshd: files, errors, lost connections, nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_models import save_convs
from click.testing import CliRunner
from sshd import LoopbackServer, why_not

from mm_edge import demo
from mm_edge.api import run_job
from mm_edge.bench import session, ssh, transport, worker
from mm_edge.bench.ssh import SshTransport, parse_host
from mm_edge.bench.target import load_target, profile_path
from mm_edge.cli.bench import bench
from mm_edge.cli.targets import targets
from mm_edge.errors import BenchError, UsageError
from mm_edge.load.models import LoadOptions, load_model
from mm_edge.progress import Stages
from mm_edge.quality.parity import compare_with_outputs
from mm_edge.run.request import make_request

PI5 = dataclasses.replace(load_target("raspberry-pi-5"), threads=1, python=(sys.executable,))

needs_sshd = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackServer]:
    folder = tmp_path / "sshd"
    folder.mkdir()
    running = LoopbackServer(folder)
    monkeypatch.setenv(ssh.CONFIG_VARIABLE, str(running.config))
    running.start()
    yield running
    running.kill()


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return save_convs(tmp_path / "dense.onnx", 32), save_convs(tmp_path / "small model's.onnx", 8)


def board(**changes: Any) -> SshTransport:
    return SshTransport("board", **{"python": [sys.executable], **changes})


def script(server: LoopbackServer, body: str) -> list[str]:
    """A Python of the device that does something else."""
    path = server.folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return [str(path)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pi@board", ("pi@board", None)),
        ("pi@board.local:2222", ("pi@board.local", 2222)),
        ("alias", ("alias", None)),
        ("root@[fe80::1]:22", ("root@fe80::1", 22)),
    ],
)
def test_hosts(text: str, expected: tuple[str, int | None]) -> None:
    assert parse_host(text) == expected


@pytest.mark.parametrize(
    "text", ["-oProxyCommand=evil", "a b", "pi@board:0", "pi@board:99999", "", "$(id)", "a;b", "@x"]
)
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not USER@HOST\[:PORT\] or an ssh alias"):
        parse_host(text)


@needs_sshd
def test_every_command_through_ssh(server: LoopbackServer, models: tuple[Path, Path], tmp_path: Path) -> None:
    images = np.ones((2, 3, 24, 24), np.float32)
    np.save(tmp_path / "images.npy", images)
    with board() as device:
        machine = session.environment(PI5, device)
        measured = session.measure_pair(*models, PI5, transport=device, pairs=20)
        peak = session.measure_memory(models[1], PI5, transport=device)
        outputs = session.run_model(models[1], tmp_path / "images.npy", PI5, transport=device)
        assert len(server.left_behind()) == 1
    assert machine["transport"] == "ssh board"
    assert any("the profile raspberry-pi-5 describes aarch64" in doubt for doubt in machine["doubts"])
    assert measured.latency.source == "device"
    assert measured.ratio is not None and measured.ratio > 1
    assert peak is not None and peak >= 0
    parity = compare_with_outputs(models[1], outputs, images, "noise")
    assert parity.max_rel_err < 1e-5
    assert parity.top1_agreement == 1.0
    assert server.left_behind() == []


@pytest.mark.slow
@needs_sshd
def test_a_lost_connection_is_made_again(server: LoopbackServer, models: tuple[Path, Path]) -> None:
    told: list[str] = []

    def cut() -> None:
        time.sleep(0.6)
        server.kill()
        time.sleep(1.2)
        server.start()

    with board(tell=told.append, reconnect_s=30) as device:
        session.measure_pair(*models, PI5, transport=device, pairs=20)
        cutter = threading.Thread(target=cut)
        cutter.start()
        results = [session.measure_pair(*models, PI5, transport=device, pairs=1500) for _ in range(2)]
        cutter.join()
        leftover = server.left_behind()
    assert min(r.latency.samples for r in results) >= 1500 // 4  # more where few pairs were disturbed
    assert "connection lost" in told[0]
    assert told[-1] == "ssh board: connected again"
    assert len(leftover) == 1
    assert server.left_behind() == []


@needs_sshd
def test_a_device_that_stays_away_is_an_error_that_says_how_to_go_on(
    server: LoopbackServer, models: tuple[Path, Path]
) -> None:
    message = r"not back within 2 s .* run the same command again to go on"
    with pytest.raises(BenchError, match=message), board(reconnect_s=2) as device:
        server.kill()
        session.measure_pair(*models, PI5, transport=device, pairs=20)


@needs_sshd
def test_files_do_not_pile_up(server: LoopbackServer, tmp_path: Path) -> None:
    dense = save_convs(tmp_path / "dense.onnx", 8)
    with board() as device:
        for channels in range(2, 7):
            session.measure_memory(save_convs(tmp_path / f"{channels}.onnx", channels), PI5, transport=device)
        session.measure_memory(dense, PI5, transport=device)
        (scratch,) = server.remote_tmp.iterdir()
        names = {path.suffix for path in scratch.iterdir()}
        assert len(list(scratch.glob("*.onnx"))) == ssh.FILES_KEPT
        assert ".part" not in names


@needs_sshd
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("kill -9 $$", "was killed, most likely for want of memory"),
        ("echo 'ImportError: libfoo.so: wrong ELF class' >&2; exit 1", "ended with status 1: ImportError: libfoo.so"),
        ("echo hello", "did not answer in JSON; it printed: hello"),
        ("yes", "sent more than 1 MB; the answer was refused"),
    ],
)
def test_workers_that_go_wrong(
    server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    monkeypatch.setattr(transport, "MAX_ANSWER_BYTES", 1 << 20)
    with pytest.raises(BenchError, match=message), board(python=script(server, body)):
        pass
    assert server.left_behind() == []


@needs_sshd
def test_no_python_there(server: LoopbackServer) -> None:
    message = r"ssh board has no 'python3\.99': install Python 3\.8 or later there"
    with pytest.raises(BenchError, match=message), board(python=["python3.99"]):
        pass
    assert server.left_behind() == []


@needs_sshd
def test_what_a_device_lacks_is_named_with_the_remedy(server: LoopbackServer) -> None:
    info = {**worker.describe_machine(), "onnxruntime": "1.8.1", "numpy": None}
    reply = json.dumps({"schema_version": 1, "result": info}).replace("'", "'\\''")
    python = script(server, f"cat >/dev/null; printf '%s\\n' 'MM-EDGE-RESULT {reply}'")
    with board(python=python) as device, pytest.raises(BenchError) as caught:
        session.environment(PI5, device)
    assert str(caught.value) == (
        "ssh board: numpy is missing: run 'python3 -m pip install numpy' there; onnxruntime 1.8.1 is too old: "
        "run 'python3 -m pip install --upgrade onnxruntime' there (1.16 or later)"
    )


@needs_sshd
def test_a_full_disk_is_named(
    server: LoopbackServer, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with board() as device:
        monkeypatch.setattr(device, "_free_bytes", lambda: 10)
        scratch = Path(device._require_scratch())
        scratch.chmod(0o500)
        if os.geteuid() == 0:
            pytest.importorskip("ctypes")
            monkeypatch.setattr(ssh, "run_bounded", fail_scp)
        with pytest.raises(BenchError, match=r"the disk is full: dense.onnx needs 0.1 MB and .* has 0.0 MB; free some"):
            session.measure_memory(models[0], PI5, transport=device)
        scratch.chmod(0o700)


def fail_scp(
    argv: Sequence[str], stdin: bytes, timeout_s: float, environment: Mapping[str, str] | None = None
) -> transport.Finished:
    """Stands for run_bounded where every copy fails."""
    if argv[0] == "scp":
        return transport.Finished(1, b"", b"scp: write remote: Failure\n", None)
    return transport.run_bounded(argv, stdin, timeout_s, environment)


@needs_sshd
def test_nobody_there(server: LoopbackServer) -> None:
    server.kill()
    with (
        pytest.raises(
            BenchError, match=r"ssh board: cannot connect: .*Connection refused; check that 'ssh board true'"
        ),
        board(),
    ):
        pass


@needs_sshd
def test_a_key_that_is_refused(server: LoopbackServer) -> None:
    (server.folder / "authorized_keys").write_text("")
    with pytest.raises(BenchError, match=r"Permission denied .*; mm-edge types no passwords: set up a key"), board():
        pass


@needs_sshd
def test_an_unknown_host_key(server: LoopbackServer) -> None:
    (server.folder / "known_hosts").write_text("")
    with pytest.raises(BenchError, match="the host key is not known or has changed; connect once by hand"), board():
        pass


@pytest.mark.slow
@needs_sshd
def test_command_line_measures_over_ssh(server: LoopbackServer, models: tuple[Path, Path], tmp_path: Path) -> None:
    profile = tmp_path / "board.toml"
    text = profile_path("raspberry-pi-5").read_text()
    text = text.replace('name = "raspberry-pi-5"', f'name = "board"\npython = ["{sys.executable}"]')
    profile.write_text(text)
    arguments = [*map(str, models), "--target", str(profile), "--host", "board", "--pairs", "20", "--json"]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)
    assert document["models"][1]["latency_ms"]["source"] == "device"
    assert document["environment"]["transport"] == "ssh board"
    checked = CliRunner().invoke(targets, ["check", str(profile), "--host", "board"])
    assert "board does not describe ssh board: the machine is x86_64" in str(checked.exception)
    assert server.left_behind() == []


@pytest.mark.slow
@pytest.mark.timeout(900)  # its four threads share two cores, and what is disturbed is measured again
@needs_sshd
def test_a_whole_job_on_a_board_whose_connection_breaks_half_way(
    server: LoopbackServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packaged profile as it is: the board's own python3, its four threads, accuracy taken there too."""
    monkeypatch.setattr("mm_edge.bench.session.PROCESSES", 1)  # four threads on two cores are slow
    out = tmp_path / "run"
    setting = {"out": out, "target": "raspberry-pi-5", "data": str(demo.IMAGES), "host": "board"}
    strategies = ("min_conservative", "max_aggressive")
    request = make_request(**setting, signals=("magnitude",), strategies=strategies, accuracy_on="device", recover="bn")

    def cut() -> None:
        while not list(out.glob("samples/*.json")):
            time.sleep(0.05)
        server.kill()
        time.sleep(1)
        server.start()

    cutter = threading.Thread(target=cut, daemon=True)
    cutter.start()
    report = run_job(lambda: load_model(str(demo.MODEL), LoadOptions()), request, Stages())
    cutter.join(timeout=10)
    latencies = [report.dense.latency_ms, *(candidate.latency_ms for candidate in report.candidates)]
    assert {(latency.source, latency.threads) for latency in latencies} == {("device", 4)}
    assert all(row.peak_memory_bytes is not None for row in report.candidates)
    assert all((row.speedup is None) == (row.latency_ms.verdict == "unusable") for row in report.candidates)
    assert report.environment["transport"] == "ssh board"
    assert report.environment["accuracy_on"] == "device"
    assert any(text.startswith("accuracy was measured on ssh board, on ") for text in report.warnings)
    written = json.loads((out / "report.json").read_text())["candidates"][0]
    assert written["accuracy_drop"] == pytest.approx(100 * (report.dense.accuracy_top1 - written["accuracy_top1"]))
    assert server.left_behind() == []
