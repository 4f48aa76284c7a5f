"""Normalisations, and operators that mix every index of one axis."""

from __future__ import annotations

import onnx_ir as ir

from mm_edge.graph.reading import AttributeEdit, Contraction, NormEdit, Reading
from mm_edge.graph.rules.operands import attribute, constant_ints, name_of, operand_axes, operand_names, opset_of

# From this opset on Softmax and its kind work along one axis, the last one by default.
ONE_AXIS = 13


def batch_normalization(reading: Reading, node: ir.Node) -> None:
    """Scale, shift, mean and variance have one value per channel."""
    axes = operand_axes(reading, node, 0)
    for index in range(1, 5):
        reading.table.unify(axes[1], operand_axes(reading, node, index)[0])
    reading.set_axes(node.outputs[0], axes)


def instance_normalization(reading: Reading, node: ir.Node) -> None:
    """Over the positions of one channel of one image, which are pinned."""
    axes = operand_axes(reading, node, 0)
    reading.pin(axes[2:], "InstanceNormalization averages over this axis")
    for index in (1, 2):
        reading.table.unify(axes[1], operand_axes(reading, node, index)[0])
    reading.set_axes(node.outputs[0], axes)


def layer_normalization(reading: Reading, node: ir.Node) -> None:
    """Over the trailing axes from `axis` on: pinned, or with `prune_norms` summed over and edited (see norms.py)."""
    axes = operand_axes(reading, node, 0)
    start = attribute(node, "axis", -1) % len(axes)
    if reading.prune_norms and node.op_type == "LayerNormalization":
        for axis in axes[start:]:
            reading.contractions.append(Contraction(name_of(node), axis, operand_names(node, 0)))
        reading.edits.append(NormEdit(name_of(node), axes[start:]))
    else:
        reading.pin(axes[start:], f"{node.op_type} averages over this axis")
    for index in range(1, len(node.inputs)):
        reading.broadcast([axes, operand_axes(reading, node, index)])
    reading.set_axes(node.outputs[0], axes)


def group_normalization(reading: Reading, node: ir.Node) -> None:
    """Over the channels of a group and all positions: whole groups may be removed, single channels not."""
    axes = operand_axes(reading, node, 0)
    groups = attribute(node, "num_groups", 1)
    group, inner = reading.table.split_product(axes[1], [groups, reading.table.size(axes[1]) // groups])
    reading.pin([inner, *axes[2:]], "GroupNormalization averages over this axis")
    if groups == 1:
        reading.pin(axes[1:2], "GroupNormalization averages over this axis")
    for index in (1, 2):
        (parameter,) = operand_axes(reading, node, index)
        reading.table.unify(parameter, axes[1] if reading.table.size(parameter) != groups else group)
    reading.edits.append(AttributeEdit(name_of(node), "num_groups", group))
    reading.set_axes(node.outputs[0], axes)


def along_axis(reading: Reading, node: ir.Node) -> None:
    """Every index of one axis takes part in each result, so that it is pinned."""
    axes = operand_axes(reading, node, 0)
    reason = f"{node.op_type} mixes every index of this axis"
    if node.op_type == "CumSum":
        (along,) = constant_ints(reading, node, 1) or [0]
        reading.pin([axes[along]], reason)
    elif node.op_type != "LpNormalization" and opset_of(reading) < ONE_AXIS:
        # It works on a matrix made of the axes before and of those from this one on.
        reading.pin(axes[attribute(node, "axis", 1) % len(axes) :], reason)
    else:
        reading.pin([axes[attribute(node, "axis", -1)]], reason)
    reading.set_axes(node.outputs[0], axes)
