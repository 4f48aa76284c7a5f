"""Graph changes around int8 quantising: preparing the graph, naming its layers, keeping some layers in fp32.

Preparing a graph changes none of its fp32 results. Operators without 8-bit kernels are replaced by equal ones that have
them; ONNX Runtime would otherwise convert to fp32, compute and convert back. Biases that two layers share are copied,
since each layer gets a scale of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mm_edge.errors import ModelError

WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators that only move values.
MOVING_OPS = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Identity"})
BIASED_OPS = ("Conv", "ConvTranspose", "Gemm")  # their third operand is a bias, and ONNX Runtime requantises them
OLDEST_OPSET = 13  # the first with one scale per channel
INT8_OPSET = 17
EXTREMES = "__extremes"  # the output that `add_extremes_` adds


def read_ready(path: Path) -> onnx.ModelProto:
    """Read a model and prepare it: shapes inferred, opset raised if old, every node with a name of its own.

    Raises:
        ModelError: the file is not an ONNX model.
    """
    try:
        proto = onnx.load(path)
    except Exception as error:
        raise ModelError(f"{path} is not an ONNX model ({type(error).__name__})") from error
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        proto = onnx.version_converter.convert_version(proto, INT8_OPSET)
    seen: set[str] = set()
    for index, node in enumerate(proto.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)
    _split_shared_biases_(proto)
    _fold_pads_(proto)
    _pool_means_(proto)
    return onnx.shape_inference.infer_shapes(proto)


def weighted_layers(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the nodes that multiply by a constant weight, by name, in graph order."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    return {
        node.name: node
        for node in proto.graph.node
        if node.op_type in WEIGHTED_OPS and len(node.input) > 1 and constants & set(node.input[:2])
    }


def is_classifier(proto: onnx.ModelProto) -> bool:
    """Return whether the only output is (batch, classes)."""
    shapes = [output.type.tensor_type.shape.dim for output in proto.graph.output]
    return len(shapes) == 1 and len(shapes[0]) == 2


def decoding_nodes(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Return the names of the last layers and of the nodes after them, which decode their results, in graph order.

    A layer that reads a softmax decodes too: a distribution over distances into one. The last layers are those whose
    results no other layer reads. They are narrow, and their results, such as class scores far below zero, need more
    than 8 bits.
    """
    made_by = {name: node for node in proto.graph.node for name in node.output}
    layers = [node for node in weighted_layers(proto).values() if not _reads_softmax(node, made_by)]
    before: set[str] = set()
    pending = [made_by[name] for node in layers for name in node.input if name in made_by]
    while pending:
        node = pending.pop()
        if node.name not in before:
            before.add(node.name)
            pending += [made_by[name] for name in node.input if name in made_by]
    return tuple(node.name for node in proto.graph.node if node.name not in before)


def _reads_softmax(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> bool:
    made = made_by.get(node.input[0])
    while made is not None and made.op_type in MOVING_OPS:
        made = made_by.get(made.input[0])
    return made is not None and made.op_type == "Softmax"


def is_mostly_linear(proto: onnx.ModelProto) -> bool:
    """Whether linear layers hold most of the weights."""
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in proto.graph.initializer}
    linear = total = 0
    for node in weighted_layers(proto).values():
        size = sum(sizes.get(name, 0) for name in node.input[:2])
        total += size
        linear += size if node.op_type in ("Gemm", "MatMul") else 0
    return 2 * linear > total


def add_extremes_(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Give the graph one more output, `EXTREMES` (2, tensors): minimum and maximum of each activation named."""
    graph = proto.graph
    constants = {tensor.name for tensor in graph.initializer}
    known = [*graph.input, *graph.value_info, *graph.output]
    floats = {item.name for item in known if item.type.tensor_type.elem_type == TensorProto.FLOAT}
    made = [name for node in graph.node for name in node.output]
    names = [name for name in dict.fromkeys([*(i.name for i in graph.input), *made]) if name in floats - constants]
    one = helper.make_tensor("__one", TensorProto.INT64, [1], [1])
    graph.initializer.append(one)
    rows = []
    for extreme in ("Min", "Max"):
        for index, name in enumerate(names):
            scalar = f"__{extreme}{index}"
            graph.node.append(helper.make_node(f"Reduce{extreme}", [name], [scalar], keepdims=0))
            graph.node.append(helper.make_node("Reshape", [scalar, "__one"], [f"{scalar}r"]))
        graph.node.append(
            helper.make_node("Concat", [f"__{extreme}{i}r" for i in range(len(names))], [f"__{extreme}"], axis=0)
        )
        graph.node.append(helper.make_node("Unsqueeze", [f"__{extreme}", "__zero"], [f"__{extreme}_row"]))
        rows.append(f"__{extreme}_row")
    graph.initializer.append(helper.make_tensor("__zero", TensorProto.INT64, [1], [0]))
    graph.node.append(helper.make_node("Concat", rows, [EXTREMES], axis=0))
    graph.output.append(helper.make_tensor_value_info(EXTREMES, TensorProto.FLOAT, [2, len(names)]))
    return tuple(names)


def hold_in_fp32_(proto: onnx.ModelProto, names: Iterable[str]) -> None:
    """Put a Clip to the 8-bit range between a dequantised input and each layer of `names`, so that it stays in fp32.

    The Clip changes no value. Without it ONNX Runtime quantises the fp32 weights of a layer that stands between a
    dequantise and a quantise node, with one scale for all channels, which is less accurate than the int8 made here.
    """
    graph = proto.graph
    made_by = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    left = set(names)
    for node in [node for node in graph.node if node.name in left and node.op_type in BIASED_OPS]:
        source = made_by.get(node.input[0])
        if source is None or source.op_type != "DequantizeLinear":
            continue
        scale, zero = (numpy_helper.to_array(constants[name]) for name in source.input[1:3])
        kind = np.iinfo(zero.dtype)
        bounds = []
        for end, level in (("low", kind.min), ("high", kind.max)):
            value = np.float32(level - int(zero)) * scale.astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(value.reshape(()), f"{node.name}_{end}"))
            bounds.append(f"{node.name}_{end}")
        held = f"{node.name}_fp32_input"
        clip = helper.make_node("Clip", [node.input[0], *bounds], [held], f"{node.name}_hold")
        node.input[0] = held
        graph.node.insert(list(graph.node).index(node), clip)


def free_outputs_(proto: onnx.ModelProto) -> None:
    """Remove the 8-bit rounding from outputs that linear layers give: rounding makes close classes tie.

    The 8-bit kernels of Gemm and MatMul can give fp32 at no cost; those of convolutions cannot, so theirs stay rounded.
    """
    graph = proto.graph
    made_by = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    for output in graph.output:
        after = made_by.get(output.name)
        before = made_by.get(after.input[0]) if after is not None and after.op_type == "DequantizeLinear" else None
        layer = made_by.get(before.input[0]) if before is not None and before.op_type == "QuantizeLinear" else None
        if after is None or before is None or layer is None or layer.op_type not in ("Gemm", "MatMul"):
            continue
        if readers[output.name] or readers[before.output[0]] > 1 or readers[layer.output[0]] > 1:
            continue
        layer.output[0] = output.name
        graph.node.remove(after)
        graph.node.remove(before)


def _split_shared_biases_(proto: onnx.ModelProto) -> None:
    """Give each layer a bias of its own.

    Its scale belongs to one layer, so the quantiser makes copies; it names them "b0", "b1" ... without looking whether
    a tensor of that name exists ("val_78" and "6").
    """
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    uses = Counter(name for node in proto.graph.node for name in node.input)
    for node in proto.graph.node:
        if node.op_type in BIASED_OPS and len(node.input) > 2 and uses[node.input[2]] > 1:
            shared = constants.get(node.input[2])
            if shared is None:
                continue
            own = proto.graph.initializer.add()
            own.CopyFrom(shared)
            own.name = f"{node.name}_bias"
            node.input[2] = own.name


def _fold_pads_(proto: onnx.ModelProto) -> None:
    """Put zero padding into the convolution behind it: ONNX Runtime does so in fp32 only, and pads 8 bits in fp32."""
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    shown = {item.name for item in graph.output}
    for pad in [node for node in graph.node if node.op_type == "Pad"]:
        behind = readers.get(pad.output[0], [])
        sizes = _zero_padding(pad, constants)
        if sizes is None or len(behind) != 1 or behind[0].op_type != "Conv" or pad.output[0] in shown:
            continue
        conv = behind[0]
        given = {item.name: helper.get_attribute_value(item) for item in conv.attribute}
        if given.get("auto_pad", b"NOTSET") != b"NOTSET" or conv.input[0] != pad.output[0]:
            continue
        before = given.get("pads", [0] * len(sizes))
        for item in [item for item in conv.attribute if item.name == "pads"]:
            conv.attribute.remove(item)
        conv.attribute.append(helper.make_attribute("pads", [a + b for a, b in zip(before, sizes, strict=True)]))
        conv.input[0] = pad.input[0]
        graph.node.remove(pad)


def _zero_padding(pad: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> list[int] | None:
    """Return the spatial sizes (all beginnings, then all ends) of a Pad with zeros, None for any other Pad."""
    mode = next((helper.get_attribute_value(item) for item in pad.attribute if item.name == "mode"), b"constant")
    operands = [name for name in pad.input[1:] if name]
    if mode != b"constant" or len(pad.input) > 3 or any(name not in constants for name in operands):
        return None
    sizes, *value = (numpy_helper.to_array(constants[name]) for name in operands)
    half = len(sizes) // 2
    if (value and float(value[0]) != 0) or (sizes < 0).any() or sizes[:2].any() or sizes[half : half + 2].any():
        return None
    return [int(size) for size in (*sizes[2:half], *sizes[half + 2 :])]


def _pool_means_(proto: onnx.ModelProto) -> None:
    """Turn a mean over all positions into GlobalAveragePool, which has an 8-bit kernel."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    ranks = {item.name: len(item.type.tensor_type.shape.dim) for item in proto.graph.value_info}
    for node in list(proto.graph.node):
        if node.op_type != "ReduceMean" or len(node.input) != 2 or node.input[1] not in constants:
            continue
        rank = ranks.get(node.input[0], 0)
        axes = sorted(int(axis) % rank for axis in numpy_helper.to_array(constants[node.input[1]])) if rank else []
        keep = next((item.i for item in node.attribute if item.name == "keepdims"), 1)
        if rank < 3 or axes != list(range(2, rank)):
            continue
        pooled = node.output[0] if keep else f"{node.name}_pooled"
        pool = helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], node.name)
        if not keep:
            flat = helper.make_node("Flatten", [pooled], [node.output[0]], f"{node.name}_flat", axis=1)
            proto.graph.node.insert(list(proto.graph.node).index(node) + 1, flat)
        node.CopyFrom(pool)
