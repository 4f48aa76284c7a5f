"""Small ONNX models for the measuring tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save


def save_convs(path: Path, channels: int, layers: int = 3, size: int = 24) -> Path:
    """Save a stack of 3x3 convolutions with `channels` channels and a global average, input (1, 3, size, size)."""
    generator = np.random.default_rng(channels)
    nodes, weights, last, width = [], [], "input", 3
    for index in range(layers):
        array = (generator.standard_normal((channels, width, 3, 3)) / np.sqrt(9 * width)).astype(np.float32)
        weights.append(numpy_helper.from_array(array, f"w{index}"))
        nodes.append(
            helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1], name=f"conv{index}")
        )
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], name=f"relu{index}"))
        last, width = f"r{index}", channels
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"], name="flatten"))
    graph = helper.make_graph(
        nodes,
        "convs",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, channels])],
        weights,
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
