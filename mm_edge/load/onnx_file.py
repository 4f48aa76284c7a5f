"""Reads what mm-edge needs to know of an .onnx file, after checking that it is one that can be pruned and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from mm_edge.errors import ModelError, first_line
from mm_edge.load.network import LoadOptions, ModelInput
from mm_edge.load.onnx_precision import FLOATS, graphs, other_precisions, tensors, to_float32_
from mm_edge.load.onnx_sizes import PROTOBUF_LIMIT, Declared, resolve_inputs
from mm_edge.load.weights import check_file
from mm_edge.records import parse_json

# Metadata entry in which mm-edge's own artifacts carry their InputSpec as JSON.
INPUT_METADATA_KEY = "mm_edge.input"
# Operators of graphs that are quantised already, apart from those whose names begin with QLinear.
QUANTISED = frozenset(
    "QuantizeLinear DequantizeLinear DynamicQuantizeLinear ConvInteger MatMulInteger QGemm QAttention "
    "DynamicQuantizeMatMul MatMulNBits MatMulIntegerToFloat QOrderedMatMul QMoE".split()
)
# Operators that leave values as they are, those that keep a length from zero, and those that make one.
MOVES = frozenset("Identity Reshape Flatten Squeeze Unsqueeze Expand Cast Dropout".split())
LIMITS = frozenset("Clip Max Add".split())
LENGTHS = frozenset("ReduceL2 Sqrt Pow".split())


@dataclass(frozen=True)
class OnnxFile:
    """What is read from an .onnx.

    Attributes:
        path: the file.
        inputs: its inputs in the graph's order, with the sizes they are measured at.
        num_classes: size of the last axis of the first output where it is (batch, classes) of class scores, else None.
        params: number of floating-point values in its weights.
        config: mean, std, interpolation and crop_pct where the file carries them.
        warnings: sentences for the user.
    """

    path: Path
    inputs: tuple[ModelInput, ...]
    num_classes: int | None
    params: int
    config: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_onnx(path: Path, options: LoadOptions) -> OnnxFile:
    """Check an .onnx (external data beside it included) and read its inputs, output and size.

    Raises:
        ModelError: not an ONNX model, quantised, weights missing or not finite, sizes open that nothing states, or
            ONNX Runtime cannot run it.
    """
    check_file(path)
    proto = _load(path)
    if not proto.graph.node:
        raise ModelError(f"'{path}' is not a valid ONNX model: it has no operators")
    if not options.only_run:
        _refuse_quantised(path, proto)
    params = _count_weights(path, proto)
    config = _own_metadata(proto)
    kinds = [] if options.only_run else other_precisions(proto)
    if kinds:
        to_float32_(proto)
    inputs, size_warnings = resolve_inputs(
        path, proto, _declared(path, proto), options, config.get("shape"), converted=bool(kinds)
    )
    classes = _count_classes(proto)
    said = f"{path.name} is in {' and '.join(kinds)}; it is worked on and written in float32"
    warnings = (*([said] if kinds else []), *size_warnings)
    return OnnxFile(path, inputs, classes, params, config, warnings)


def _load(path: Path) -> onnx.ModelProto:
    try:
        proto = onnx.load(str(path), load_external_data=False)
        _check_external_data(path, proto)
        onnx.load_external_data_for_model(proto, str(path.parent))
        onnx.checker.check_model(_with_ranks(proto) if proto.ByteSize() < PROTOBUF_LIMIT else str(path))
    except ModelError:
        raise
    except (DecodeError, onnx.checker.ValidationError, ValueError, TypeError, OSError, RuntimeError) as error:
        raise ModelError(f"'{path}' is not a valid ONNX model: {first_line(error)}") from error
    return proto


def _with_ranks(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with a shape for every input and output: the checker asks for one, ONNX Runtime does not."""
    values = [
        value
        for value in (*proto.graph.input, *proto.graph.output)
        if value.type.WhichOneof("value") == "tensor_type" and not value.type.tensor_type.HasField("shape")
    ]
    if not values:
        return proto
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    names = {value.name for value in values}
    for value in (*twin.graph.input, *twin.graph.output):
        if value.name in names:
            value.type.tensor_type.shape.SetInParent()
    return twin


def _check_external_data(path: Path, proto: onnx.ModelProto) -> None:
    folder = path.parent.resolve()
    for _, tensor in tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        file = (folder / location).resolve()
        if not location or folder not in file.parents:
            raise ModelError(f"'{path}' names '{location}' as the file of its weights; it must lie beside the .onnx")
        if not file.is_file():
            raise ModelError(f"'{path}' keeps its weights in '{location}', which is not beside it")
        end = int(entries.get("offset") or 0) + int(entries.get("length") or 0)
        if file.stat().st_size < end:
            raise ModelError(
                f"'{path}' reads {end} bytes of '{location}', which has {file.stat().st_size}; it belongs to another "
                "model or is cut off"
            )


def _refuse_quantised(path: Path, proto: onnx.ModelProto) -> None:
    for graph in graphs(proto):
        for node in graph.node:
            if node.op_type in QUANTISED or node.op_type.startswith("QLinear"):
                raise ModelError(
                    f"'{path}' is quantised already ({node.op_type}); give the float file it was made from and add "
                    "--precision int8"
                )


def _count_classes(proto: onnx.ModelProto) -> int | None:
    """Return the number of classes that the first output has scores of; None where it has none.

    One column, a hyperbolic tangent and vectors divided by their length are no class scores.
    """
    output = _sizes(proto.graph.output[0]) if proto.graph.output else None
    if output is None or len(output) != 2 or output[1] == 1:
        return None
    makers = {name: node for node in proto.graph.node for name in node.output}
    last = _before(makers, proto.graph.output[0].name, MOVES)
    if last is None or last.op_type not in ("Tanh", "LpNormalization", "Div"):
        return output[1]
    if last.op_type == "Div":
        length = _before(makers, last.input[1], MOVES | LIMITS)
        return None if length is not None and length.op_type in LENGTHS else output[1]
    return None


def _before(makers: Mapping[str, onnx.NodeProto], value: str, passed: frozenset[str]) -> onnx.NodeProto | None:
    """Return the node that makes `value`, seen through the operators `passed`; None for an input or a constant."""
    node = makers.get(value)
    while node is not None and node.op_type in passed:
        node = makers.get(node.input[0])
    return node


def _count_weights(path: Path, proto: onnx.ModelProto) -> int:
    params = 0
    for name, tensor in tensors(proto):
        # Single values may be limits such as -inf for a mask; they are constants, not weights.
        if tensor.data_type not in FLOATS or not tensor.dims:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        bad = values.size - int(np.isfinite(values.astype(np.float32) if values.dtype.itemsize < 4 else values).sum())
        if bad and values.size > 1:
            raise ModelError(f"'{path}': {bad} of {values.size} values of {name} are NaN or infinite; export it again")
        params += values.size
    return params


def _declared(path: Path, proto: onnx.ModelProto) -> tuple[Declared, ...]:
    """Return the inputs as the file declares them; weights that old exporters list among them are none."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    found: list[Declared] = []
    for value in proto.graph.input:
        if value.name in weights:
            continue
        if value.type.WhichOneof("value") != "tensor_type":
            kind = str(value.type.WhichOneof("value")).removesuffix("_type")
            raise ModelError(f"'{path}': input {value.name} is a {kind}; only tensors can be fed")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        found.append(Declared(value.name, _sizes(value), _symbols(value), str(dtype)))
    if not found:
        raise ModelError(f"'{path}' takes no input; there is nothing to measure")
    return tuple(found)


def _sizes(value: onnx.ValueInfoProto) -> tuple[int | None, ...] | None:
    """Return the sizes of a value, None where one is open; None for an unknown rank."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(size.dim_value if size.dim_value > 0 else None for size in tensor.shape.dim)


def _symbols(value: onnx.ValueInfoProto) -> tuple[str, ...]:
    """Return the names of a value's sizes; some exporters write "?" for all of them, which is no name."""
    names = (size.dim_param for size in value.type.tensor_type.shape.dim)
    return tuple(name if any(map(str.isalnum, name)) else "" for name in names)


def _own_metadata(proto: onnx.ModelProto) -> dict[str, Any]:
    text = {entry.key: entry.value for entry in proto.metadata_props}.get(INPUT_METADATA_KEY)
    if text is None:
        return {}
    try:
        config = parse_json(text)
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}
