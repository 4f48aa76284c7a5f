"""`mm-edge bench` measures ONNX models and refuses what it cannot measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_models import save_convs
from click.testing import CliRunner, Result

from mm_edge.bench import target as target_module
from mm_edge.cli.bench import bench
from mm_edge.errors import TargetError, UsageError


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "own"
    monkeypatch.setattr(target_module, "user_folder", lambda: folder)
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(bench, arguments)


def test_bench_json(tmp_path: Path) -> None:
    dense, small = save_convs(tmp_path / "dense.onnx", 32), save_convs(tmp_path / "small.onnx", 8)
    samples = tmp_path / "samples"
    result = run(str(dense), str(small), "--json", "--pairs", "20", "--samples", str(samples))
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    first, second = document["models"]
    assert first["speedup"] is None
    assert first["latency_ms"]["p50"] > second["latency_ms"]["p50"]
    assert second["latency_ms"]["p99"] is None  # twenty samples have no 99th percentile
    verdict = second["latency_ms"]["verdict"]
    assert verdict in ("stable", "noisy", "unusable")
    assert second["speedup"] is None if verdict == "unusable" else second["speedup"] > 1
    assert second["peak_memory_no_arena_bytes"] is not None
    assert document["environment"]["fingerprint"]
    assert [path.name for path in samples.iterdir()] == ["001-small.json"]


def test_bench_table(tmp_path: Path) -> None:
    model = str(save_convs(tmp_path / "one.onnx", 8))
    result = run(model, "--pairs", "20", "--audit", "--samples", str(tmp_path / "kept"))
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
def test_bench_refusals(tmp_path: Path, arguments: list[str], error: type[Exception], message: str) -> None:
    model = save_convs(tmp_path / "m.onnx", 4)
    result = run(*(a.format(model=model) for a in arguments))
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
