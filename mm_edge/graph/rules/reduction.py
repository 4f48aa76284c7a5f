"""Reductions and poolings: some axes are summed, averaged or searched for an extreme."""

from __future__ import annotations

import onnx_ir as ir

from mm_edge.graph.reading import Contraction, MeanEdit, Reading, shape_of
from mm_edge.graph.rules.operands import attribute, constant_ints, name_of, operand_axes, operand_names

REDUCTIONS = (
    "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceProd ReduceLogSumExp".split()
)
POOLINGS = "MaxPool AveragePool GlobalAveragePool GlobalMaxPool LpPool".split()


def reduce(reading: Reading, node: ir.Node) -> None:
    """A sum may lose zero terms, a mean too if its divisor stays; the axes of other reductions are pinned."""
    axes = operand_axes(reading, node, 0)
    along = constant_ints(reading, node, 1, "axes")
    if not along:
        along = [] if attribute(node, "noop_with_empty_axes", 0) else list(range(len(axes)))
    reduced = sorted(index % len(axes) for index in along)
    for index in reduced:
        if node.op_type in ("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"):
            reading.contractions.append(Contraction(name_of(node), axes[index], operand_names(node, 0)))
        else:
            reading.pin([axes[index]], f"{node.op_type} over this axis")
    if node.op_type == "ReduceMean" and reduced:
        reading.edits.append(MeanEdit(name_of(node), tuple(axes[index] for index in reduced)))
    if attribute(node, "keepdims", 1):
        out = [reading.table.fresh(1) if index in reduced else axis for index, axis in enumerate(axes)]
    else:
        out = [axis for index, axis in enumerate(axes) if index not in reduced]
    reading.set_axes(node.outputs[0], out)


def pool(reading: Reading, node: ir.Node) -> None:
    """Every channel of an image alone, over positions."""
    axes = operand_axes(reading, node, 0)
    reading.pin(axes[2:], "spatial axis of a pooling")
    spatial = [reading.table.fresh(size, pin="spatial axis of a pooling") for size in shape_of(node.outputs[0])[2:]]
    reading.set_axes(node.outputs[0], [*axes[:2], *spatial])
