"""The registries of plan/: what they need to be imported, and that one entry is enough to add to them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from mm_edge.arrays import Float32Array
from mm_edge.plan.scores import score_weights
from mm_edge.plan.signals import SIGNALS, Signal, need_gradient, without_gradient
from mm_edge.plan.strategies import STRATEGIES, Spot, Strategy, assign
from mm_edge.records import Layer, SparsityRange
from mm_edge.run.request import make_request


@pytest.mark.parametrize("module", ["plan.signals", "plan.strategies", "plan.kinds", "formats.precisions"])
def test_registries_are_light_to_import(module: str) -> None:
    # mm_edge itself imports PyTorch (compat.py), so that is not looked for.
    heavy = "{'timm', 'onnx', 'onnxruntime', 'onnx_ir', 'mm_edge.plan.scores'}"
    code = f"import sys, mm_edge.{module}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_signals_need() -> None:
    assert not need_gradient(("magnitude",)) and need_gradient(("magnitude", "product"))
    assert without_gradient(("gradient", "magnitude")) == ("magnitude",)
    assert without_gradient(("product",)) == ("magnitude",)


def test_a_signal_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def square(weight: Float32Array, gradient: Float32Array | None) -> Float32Array:
        return np.square(weight)

    monkeypatch.setitem(SIGNALS, "square", Signal("the square of the weight", False, square))
    assert make_request(signals="square").signals == ("square",)
    scores = score_weights({"w": np.array([1, -3], np.float32)}, {}, ("square",))
    np.testing.assert_allclose(scores["square"]["w"], [0.2, 1.8])


def test_a_strategy_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_layer(spot: Spot) -> float:
        return 1.0 if spot.depth == 0 else 0.0

    monkeypatch.setitem(STRATEGIES, "first", Strategy("the high end for the first layer", first_layer))
    layers = [Layer(name, "conv", "conv", (4, 4, 1, 1), index, 0, 16) for index, name in enumerate("ab")]
    ranges = {layer.fqn: SparsityRange(0.2, 0.6, "") for layer in layers}
    (found,) = assign(("first",), "magnitude", layers, ranges)
    assert found.sparsity == {"a": 0.6, "b": 0.2}
