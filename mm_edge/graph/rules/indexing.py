"""Operators that address elements by number, or whose result is made of sizes and positions."""

from __future__ import annotations

import onnx_ir as ir

from mm_edge.graph.reading import Reading, StructureMismatch, shape_of
from mm_edge.graph.rules.operands import attribute, operand, operand_axes

SIZE_DEPENDENT = "Shape Size ConstantOfShape Range EyeLike RandomNormalLike NonZero ArgMax ArgMin TopK".split()


def gather(reading: Reading, node: ir.Node) -> None:
    """Pick indices of one axis by number, so that it is pinned; the other axes stay."""
    axes = operand_axes(reading, node, 0)
    along = attribute(node, "axis", 0) % len(axes)
    reading.pin([axes[along]], "a Gather picks indices of this axis by number")
    picked = [reading.table.fresh(size, pin="picked by a Gather") for size in shape_of(operand(node, 1))]
    reading.set_axes(node.outputs[0], [*axes[:along], *picked, *axes[along + 1 :]])


def gather_nd(reading: Reading, node: ir.Node) -> None:
    """Pin the batch axes and the axes the index tuples address; the other axes stay."""
    axes = operand_axes(reading, node, 0)
    indices = shape_of(operand(node, 1))
    batch = attribute(node, "batch_dims", 0)
    addressed = axes[batch : batch + indices[-1]]
    reading.pin(addressed, "a GatherND picks indices of this axis by number")
    reading.pin(axes[:batch], "batch axis of a GatherND")
    picked = [reading.table.fresh(size, pin="picked by a GatherND") for size in indices[batch:-1]]
    reading.set_axes(node.outputs[0], [*axes[:batch], *picked, *axes[batch + indices[-1] :]])


def positions(reading: Reading, node: ir.Node) -> None:
    """Refuse: the result is made of sizes or positions, so every axis it reads is pinned."""
    raise StructureMismatch("its result depends on the sizes or order of its operand's axes")
