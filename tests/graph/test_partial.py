"""Parts of a graph: which values are constant, and parts that compute what the whole computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from tiny_graphs import noise, tiny

from mm_edge.graph import partial
from mm_edge.graph.partial import RunnableGraph, constant_values, open_part, run_constants
from mm_edge.quality.parity import onnx_runner


def test_constants_are_what_no_input_takes_part_in() -> None:
    raw = tiny("float[1,3] x", "t = Transpose(w) a = MatMul(x, t) y = Relu(a)", {"w": (4, 3)})
    assert {value.name for value in constant_values(raw.model.graph)} == {"w", "t"}


def test_a_shape_is_constant_only_where_shapes_are_static() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[1,3] x) => (int64[2] y) { s = Shape(x) y = Neg(s) }'
    graph = ir.from_proto(onnx.parser.parse_model(text)).graph
    assert constant_values(graph) == set()
    assert {value.name for value in constant_values(graph, static_shapes=True)} == {"s", "y"}


def test_a_part_computes_what_the_whole_computes_with_other_arrays_too() -> None:
    body = "t = Transpose(w) a = MatMul(x, t) r = Relu(a) y = MatMul(r, v)"
    raw = tiny("float[1,3] x", body, {"w": (4, 3), "v": (4, 2)})
    (image,) = noise(raw, 1)
    head = open_part(raw.model, ("x",), ("r",)).run({"x": image[None]})
    tail = open_part(raw.model, ("r",), ("y", "r")).run(head)
    (whole,) = onnx_runner(raw.model)(image[None])
    np.testing.assert_array_equal(tail["y"], whole)
    np.testing.assert_array_equal(tail["r"], head["r"])
    graph = RunnableGraph(raw.model.clone())
    zero = graph.holding({"v": np.zeros((4, 2), np.float32)})
    for network, expected in ((graph, whole), (zero, 0 * whole), (graph, whole)):
        np.testing.assert_array_equal(network.open(("r",), ("y",)).run(head)["y"], expected)


def test_the_same_part_with_other_arrays_is_cut_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tiny("float[1,3] x", "a = MatMul(x, w) y = MatMul(a, v)", {"w": (3, 4), "v": (4, 2)})
    graph = RunnableGraph(raw.model.clone())
    cut: list[object] = []
    original = partial._cut_out

    def cut_out(*given: Any) -> Any:
        cut.append(given[1:])
        return original(*given)

    monkeypatch.setattr(partial, "_cut_out", cut_out)
    for network in (graph, graph.holding({"v": np.zeros((4, 2), np.float32)})):
        network.open(("a",), ("y",))
    network.open(("x",), ("y",))
    assert cut == [(("a",), ("y",)), (("x",), ("y",))]


def test_constants_are_computed_without_the_input() -> None:
    raw = tiny("float[1,3] x", "t = Transpose(w) y = MatMul(x, t)", {"w": (4, 3)})
    weight = raw.model.graph.initializers["w"].const_value
    assert weight is not None
    np.testing.assert_array_equal(run_constants(raw.model, ["t"])["t"], weight.numpy().T)
    assert run_constants(raw.model, []) == {}


def test_a_part_that_needs_an_input_it_is_not_given_is_refused() -> None:
    raw = tiny("float[1,3] x", "y = MatMul(x, w)", {"w": (3, 2)})
    with pytest.raises(ValueError, match="not provided: x"):
        open_part(raw.model, (), ("y",))
