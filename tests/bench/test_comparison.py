"""The document of `mm-edge bench`: what it holds on an emulated device, and what the caller passes in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from bench_models import save_convs
from scripted import HOST

from mm_edge.bench.comparison import NOISE_INPUTS, Comparison, compare_models
from mm_edge.bench.pattern import PatternLayer
from mm_edge.bench.tables import print_comparison
from mm_edge.bench.transport import LocalTransport
from mm_edge.progress import Terminal
from mm_edge.quality.parity import compare_with_outputs


class Emulated(LocalTransport):
    """This machine under another label: its outputs count and its times do not."""

    name = "emulated core"
    source = "emulated"


def refuse_to_find(model: Path, pattern: str) -> list[PatternLayer]:
    raise AssertionError("a target without n:m kernels has no layers to find")


def test_an_emulated_device_gives_outputs_and_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = (save_convs(tmp_path / "dense.onnx", 8), save_convs(tmp_path / "small.onnx", 4))
    comparison = Comparison(models, HOST, Emulated(), 20, None, False)
    steps: list[str] = []
    document = compare_models(comparison, compare=compare_with_outputs, find_layers=refuse_to_find, tell=steps.append)
    assert steps[1:] == ["small.onnx (1 of 1)", "memory and cold start", "kernels", "2:4 layer by layer"]
    assert document["harness_ms"] is None
    assert [entry["latency_ms"].p50 for entry in document["models"]] == [None, None]
    for entry in document["models"]:
        assert entry["parity"].max_rel_err < 1e-5
        assert entry["parity"].inputs.count == NOISE_INPUTS
    print_comparison(document, Terminal(), Terminal(stderr=True))
    assert "small.onnx on emulated core: outputs within" in capsys.readouterr().out


def test_the_callers_pattern_layers_are_timed(tmp_path: Path) -> None:
    """There is no TensorRT here, so the profile only claims the pattern, and the window is never timed alone."""
    model = save_convs(tmp_path / "dense.onnx", 8)
    layer = PatternLayer("window", "Conv", None, 4, 64)
    asked: list[tuple[Path, str]] = []

    def find(model: Path, pattern: str) -> list[PatternLayer]:
        asked.append((model, pattern))
        return [layer]

    target = dataclasses.replace(HOST, n_m=("2:4",))
    comparison = Comparison((model,), target, Emulated(), 20, None, False)
    document = compare_models(comparison, compare=compare_with_outputs, find_layers=find)
    assert asked == [(model, "2:4")]
    (timed,) = document["n_m_layers"]["dense.onnx"]
    assert timed.layer == layer
    assert timed.reason.startswith("a convolution over a window")
