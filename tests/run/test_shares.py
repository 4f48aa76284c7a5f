"""Each layer's share of the time, on a small graph whose merged kernels are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mm_edge.bench.audit import KernelUse
from mm_edge.run.shares import shares_of


def use(output: str, share: float) -> KernelUse:
    return KernelUse(output, output, "Conv", "NCHWc", share, (), None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A convolution with Relu; then two convolutions, `b` and `side`, whose sum goes through Relu."""
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["a"]),
        helper.make_node("Relu", ["a"], ["a_relu"]),
        helper.make_node("Conv", ["a_relu", "b.weight"], ["b"]),
        helper.make_node("Conv", ["a_relu", "side.weight"], ["side"]),
        helper.make_node("Add", ["b", "side"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["y"]),
    ]
    weight = np.ones((1, 1, 1, 1), np.float32)
    names = ("a.weight", "b.weight", "side.weight")
    initialisers = [numpy_helper.from_array(weight, name) for name in names]
    ends = [helper.make_tensor_value_info(name, 1, [1, 1, 4, 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initialisers)
    onnx.save(helper.make_model(graph), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_a_kernel_merged_with_what_follows_is_found_by_the_nodes_before_it(file: Path) -> None:
    # `y` is b, Add and Relu in one kernel: the other convolution before it has a kernel of its own.
    found = shares_of(file, [use("a_relu", 0.5), use("y", 0.3), use("side", 0.1)])
    assert found == {"a.weight": 0.5, "b.weight": 0.3, "side.weight": 0.1}


def test_a_kernel_that_may_be_either_of_two_layers_is_no_ones(file: Path) -> None:
    assert shares_of(file, [use("y", 0.3), use("unknown", 0.7)]) == {}
