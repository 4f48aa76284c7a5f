"""Turns an .onnx in half or double precision into one in float32: tensors, types of values, and casts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto

# The floating-point types of weights, by NumPy's names.
FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.DOUBLE: "float64",
    TensorProto.BFLOAT16: "bfloat16",
}
OTHERS = frozenset(FLOATS) - {TensorProto.FLOAT}


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """Yield the graph, the functions, and the graphs inside their nodes."""
    stack: list[onnx.GraphProto | onnx.FunctionProto] = [proto.graph, *proto.functions]
    while stack:
        graph = stack.pop()
        yield graph
        for node in graph.node:
            for item in node.attribute:
                stack += [item.g] if item.type == onnx.AttributeProto.GRAPH else []
                stack += item.graphs


def tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield every tensor of the file with its name: initialisers, and attributes of nodes under their result's name."""
    for graph in graphs(proto):
        if isinstance(graph, onnx.GraphProto):
            yield from ((tensor.name, tensor) for tensor in graph.initializer)
        for node in graph.node:
            for item in node.attribute:
                held = [item.t] if item.type == onnx.AttributeProto.TENSOR else list(item.tensors)
                yield from ((node.output[0] if node.output else node.name, tensor) for tensor in held)


def other_precisions(proto: onnx.ModelProto) -> list[str]:
    """Return the names of the floating-point types besides float32 that weights and inputs have."""
    kinds = {tensor.data_type for _, tensor in tensors(proto) if tensor.dims}
    kinds |= {value.type.tensor_type.elem_type for value in proto.graph.input}
    return sorted(FLOATS[kind] for kind in kinds & OTHERS)


def to_float32_(proto: onnx.ModelProto) -> None:
    """Turn every floating-point tensor, value and cast of `proto` into float32."""
    for _, tensor in tensors(proto):
        if tensor.data_type in OTHERS:
            array = np.asarray(onnx.numpy_helper.to_array(tensor), dtype=np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for graph in graphs(proto):
        for value in (*graph.input, *graph.output, *graph.value_info) if isinstance(graph, onnx.GraphProto) else ():
            if value.type.tensor_type.elem_type in OTHERS:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for node in graph.node:
            for item in node.attribute:
                if item.name in ("to", "dtype") and item.i in OTHERS:
                    item.i = TensorProto.FLOAT
