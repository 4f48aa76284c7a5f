"""Deploying: the graph a device loads computes what the raw graph computes, with fewer operators."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import torch
from tiny_graphs import noise, tiny
from torch import nn

from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import export_raw
from mm_edge.quality.parity import compare, onnx_runner, torch_runner

IMAGE = torch.zeros(1, 3, 8, 8)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_batch_normalisation_is_folded_into_convolutions_and_gemm() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2), nn.BatchNorm2d(6), nn.Flatten(),
        nn.Linear(6 * 49, 5), nn.BatchNorm1d(5),
    )  # fmt: skip
    for layer in module:
        if hasattr(layer, "running_mean"):
            layer.get_buffer("running_mean").normal_()
            layer.get_buffer("running_var").uniform_(0.5, 2)
    module.eval()
    raw = export_raw(module, IMAGE)
    assert operators(raw.model)["BatchNormalization"] == 3
    model = deploy(raw.model.clone())
    assert "BatchNormalization" not in operators(model)
    assert compare(onnx_runner(model), torch_runner(module), noise(raw), "noise").max_rel_err < 1e-5


def test_a_convolution_read_twice_keeps_its_batch_normalisation() -> None:
    body = "a = Conv(x, w) n = BatchNormalization(a, s, t, m, q) c = Concat<axis=1>(a, n) y = Relu(c)"
    buffers = {"m": np.arange(8, dtype=np.float32), "q": np.ones(8, np.float32)}
    raw = tiny("float[1,3,4,4] x", body, {"w": (8, 3, 1, 1), "s": (8,), "t": (8,)}, buffers=buffers)
    model = deploy(raw.model.clone())
    assert compare(onnx_runner(model), onnx_runner(raw.model), noise(raw), "noise").max_rel_err < 1e-5


def test_names_stay_unique_where_a_shared_convolution_keeps_its_batch_normalisation() -> None:
    body = (
        "a = Conv(x, w) n = BatchNormalization(a, s, t, m, q) r = Relu(n)"
        " b = Conv(r, w) o = BatchNormalization(b, s, t, m, q) y = Relu(o)"
    )
    buffers = {"m": np.arange(3, dtype=np.float32), "q": np.ones(3, np.float32)}
    raw = tiny("float[1,3,4,4] x", body, {"w": (3, 3, 1, 1), "s": (3,), "t": (3,)}, buffers=buffers)
    model = deploy(raw.model.clone(), keep_names=True)
    assert len({node.name for node in model.graph}) == len(list(model.graph)) == 6
    assert compare(onnx_runner(model), onnx_runner(raw.model), noise(raw), "noise").max_rel_err < 1e-5


def test_what_is_computed_from_weights_alone_is_folded_for_the_device() -> None:
    raw = tiny(
        "float[1,3] x", "t = Transpose(w) s = Mul(t, two) y = MatMul(x, s)", {"w": (4, 3)}, {"two": np.float32(2)}
    )
    assert operators(raw.model) == {"Transpose": 1, "Mul": 1, "MatMul": 1}
    assert operators(deploy(raw.model.clone())) == {"MatMul": 1}


def test_an_added_constant_that_ends_the_graph_moves_into_the_bias_before_it() -> None:
    body = "a = Conv(x, w, b) y = Add(a, c)"
    constants = {"c": np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1)}
    raw = tiny("float[1,3,4,4] x", body, {"w": (4, 3, 1, 1), "b": (4,)}, constants)
    model = deploy(raw.model.clone())
    assert operators(model) == {"Conv": 1}
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert compare(onnx_runner(model), onnx_runner(raw.model), noise(raw), "noise").max_rel_err < 1e-5
