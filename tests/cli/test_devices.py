"""The commands that measure and describe devices."""

from __future__ import annotations

import json

import pytest
from bench_models import save_convs
from click.testing import CliRunner

from mm_edge.bench import target as target_module
from mm_edge.cli import devices as bench_cli
from mm_edge.errors import BenchError, TargetError, UsageError


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    folder = tmp_path / "own"
    monkeypatch.setattr(target_module, "user_folder", lambda: folder)
    monkeypatch.setattr(bench_cli, "user_folder", lambda: folder)
    return folder


def run(*arguments):
    command, *rest = arguments
    return CliRunner().invoke({"bench": bench_cli.bench, "targets": bench_cli.targets}[command], rest)


def test_bench_json(tmp_path):
    dense, small = save_convs(tmp_path / "dense.onnx", 32), save_convs(tmp_path / "small.onnx", 8)
    samples = tmp_path / "samples"
    result = run("bench", str(dense), str(small), "--json", "--pairs", "20", "--samples", str(samples))
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    first, second = document["models"]
    assert first["speedup"] is None
    assert first["latency_ms"]["p50"] > second["latency_ms"]["p50"]
    assert second["latency_ms"]["p99"] is None  # twenty samples have no 99th percentile
    assert second["speedup"] > 1
    assert second["peak_memory_no_arena_bytes"] is not None
    assert document["environment"]["fingerprint"]
    assert [path.name for path in samples.iterdir()] == ["001-small.json"]


def test_bench_table(tmp_path):
    model = str(save_convs(tmp_path / "one.onnx", 8))
    result = run("bench", model, "--pairs", "20", "--audit", "--samples", str(tmp_path / "kept"))
    assert result.exit_code == 0, result.exception
    assert "kernels of one.onnx" in result.stdout
    assert [path.name for path in (tmp_path / "kept").glob("*.onnx")] == ["one.optimised.onnx"]
    assert "one.onnx" in result.stdout
    assert "microseconds a run" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["no.onnx"], UsageError, "model 'no.onnx' does not exist"),
        (["{model}", "--target", "android-arm64"], TargetError, "a stock phone has no Python: measure there with"),
        (["{model}", "--target", "jetson-orin"], TargetError, "this machine is not jetson-orin: give --host USER@HOST"),
        (["{model}", "--host", "a b"], UsageError, "--host 'a b' is not USER@HOST[:PORT] or an ssh alias"),
        (["{model}", "--host", "qemu"], TargetError, "only aarch64 targets are emulated"),
        (["{model}", "--target", "hots"], TargetError, "unknown target 'hots'; did you mean host?"),
    ],
)
def test_bench_refusals(tmp_path, arguments, error, message):
    model = save_convs(tmp_path / "m.onnx", 4)
    result = run("bench", *(a.format(model=model) for a in arguments))
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


def test_targets_list_and_show():
    listed = json.loads(run("targets", "list", "--json").stdout)
    assert next(p for p in listed if p["name"] == "host")["this_machine"] is True
    shown = run("targets", "show", "rk3588")
    assert "on cores (4, 5, 6, 7)" in shown.stdout
    assert json.loads(run("targets", "show", "rk3588", "--json").stdout)["threads"] == 4


def test_targets_check():
    assert json.loads(run("targets", "check", "host", "--json").stdout)["problems"] == []
    failed = run("targets", "check", "android-arm64")
    assert isinstance(failed.exception, (BenchError, TargetError))


def test_targets_new_makes_a_profile_that_loads(own_folder):
    assert run("targets", "new", "my-board", "--like", "raspberry-pi-5").exit_code == 0
    assert [path.name for path in own_folder.iterdir()] == ["my-board.toml"]
    assert target_module.load_target("my-board").threads == 4
    again = run("targets", "new", "my-board")
    assert "exists already" in str(again.exception)
    assert "may hold letters" in str(run("targets", "new", "../evil").exception)
    assert "unknown target 'nope'" in str(run("targets", "new", "other", "--like", "nope").exception)
