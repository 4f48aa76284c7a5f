"""E8: at which removed indices the result of a node is exactly zero in the masked model.

An operator that is in none of these tables is taken to put out something else than zero, which pins what sums over it.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from mm_edge.graph.reading import Axes, Reading
from mm_edge.graph.rules.operands import attribute, operand_axes, text

# One operand: the result is zero where the operand is.
ZERO_AT_ZERO = frozenset(
    "Relu Gelu HardSwish Tanh Erf Sqrt Abs Neg Sign LeakyRelu Elu Selu Celu Mish Softsign Sin Floor Ceil Round "
    "Identity Cast CastLike Swish Dropout PRelu ThresholdedRelu".split()
)
# The result is made of elements of the first operand, moved, repeated or reduced.
REARRANGING = frozenset(
    "Transpose Reshape Flatten Squeeze Unsqueeze Slice Split Gather GatherND Expand Tile Pad Resize Upsample "
    "DepthToSpace SpaceToDepth MaxPool AveragePool GlobalAveragePool GlobalMaxPool LpPool ReduceMean ReduceSum "
    "ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare CumSum".split()
)
# The result is zero where one of the operands is.
MULTIPLYING = frozenset(
    "Mul And Div Pow MatMul Gemm Conv ConvTranspose Einsum BatchNormalization InstanceNormalization".split()
)
# The result is zero where all of the operands are.
ADDING = frozenset("Add Sub Sum Mean Max Min Or".split())


def zero_operands(node: ir.Node) -> tuple[str, list[int]]:
    """Return how zeros pass through `node`, and from which operands.

    "any": a removed index of the result is zero where it is zero in one of the operands;
    "all": only where it is zero in all of them; "none": not even then.
    """
    count = len(node.inputs)
    if node.op_type == "Pad" and not _padding_keeps_zero(node):
        return "none", []
    if node.op_type in ZERO_AT_ZERO or node.op_type in REARRANGING or node.op_type == "Div":
        return "any", [0]
    if node.op_type == "Clip":
        return ("any", [0]) if _clip_keeps_zero(node) else ("none", [])
    if node.op_type == "Pow":
        return ("any", [0]) if _is_positive(node.inputs[1]) else ("none", [])
    if node.op_type in ("BatchNormalization", "LayerNormalization"):
        return "any", [1]
    if node.op_type in MULTIPLYING:
        return "any", list(range(count)) if node.op_type == "Einsum" else [0, 1]
    if node.op_type in ADDING or node.op_type == "Concat":
        return "all", list(range(count))
    if node.op_type == "Where":
        return "all", [1, 2]
    return "none", []


def added_operands(node: ir.Node) -> list[int]:
    """Return the operands that a product or normalisation adds to its result: its bias or shift."""
    if node.op_type in (
        "Conv",
        "ConvTranspose",
        "Gemm",
        "BatchNormalization",
        "InstanceNormalization",
        "LayerNormalization",
    ):
        return [2] if len(node.inputs) > 2 and node.inputs[2] is not None else []
    return []


def carried_axes(reading: Reading, node: ir.Node, index: int) -> Axes:
    """Return the axes of operand `index` of a product that its result has too; the others are summed over."""
    axes = operand_axes(reading, node, index)
    if node.op_type == "MatMul":
        return axes[:-1] if index == 0 else (*axes[:-2], *axes[-1:]) if len(axes) > 1 else ()
    if node.op_type == "Gemm" and index < 2:
        transposed = attribute(node, "transA" if index == 0 else "transB", 0)
        return (axes[index] if not transposed else axes[1 - index],)
    if node.op_type == "Einsum":
        terms, arrow, result = text(node, "equation", "").replace(" ", "").partition("->")
        if not arrow or "." in terms:
            return ()
        return tuple(axis for letter, axis in zip(terms.split(",")[index], axes, strict=True) if letter in result)
    if node.op_type in ("Conv", "ConvTranspose") and index < 2:
        transposed = node.op_type == "ConvTranspose"
        # Of the data's channels and a transposed kernel's rows the result has the group; the rest is summed over.
        own = axes[:1] if index == 0 else axes[1:2] if transposed else axes[:1]
        groups = attribute(node, "group", 1)
        if groups > 1 and (index == 0 or transposed):
            channels = axes[1] if index == 0 else axes[0]
            own += tuple(reading.table.split_product(channels, [groups, reading.table.size(channels) // groups])[:1])
        return own
    return axes


def undefined_at_zero(node: ir.Node) -> list[int]:
    """Return the operands that must not be zero, because the result would be infinite or NaN."""
    if node.op_type in ("Div", "Mod"):
        return [1]
    if node.op_type in ("Reciprocal", "Log"):
        return [0]
    return [0] if node.op_type == "Pow" and not _is_positive(node.inputs[1]) else []


def _is_positive(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and bool(np.all(value.const_value.numpy() > 0))


def _padding_keeps_zero(node: ir.Node) -> bool:
    """Return whether padding leaves zeros: it adds zeros, or negative numbers that only max poolings read."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    number: float | None = node.attributes["value"].as_float() if "value" in node.attributes else 0.0
    if value is not None:
        number = float(value.const_value.numpy()) if value.const_value is not None else None
    only_maxima = all(use.node.op_type == "MaxPool" for use in node.outputs[0].uses())
    return number == 0 or (number is not None and number < 0 and only_maxima)


def _clip_keeps_zero(node: ir.Node) -> bool:
    bounds = [-math.inf, math.inf]
    for index in (1, 2):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and value.const_value is not None:
            bounds[index - 1] = float(value.const_value.numpy())
    for position, name in enumerate(("min", "max")):
        if name in node.attributes:
            bounds[position] = node.attributes[name].as_float()
    return bounds[0] <= 0 <= bounds[1]
