"""Recurrent layers, and operators that hold graphs of their own."""

from __future__ import annotations

import onnx_ir as ir

from mm_edge.graph.reading import Contraction, CostTerm, Reading, StructureMismatch, is_static, shape_of
from mm_edge.graph.rules.operands import name_of, operand_axes, operand_names

BRANCHING = ("If", "Loop", "Scan")


def recurrent(reading: Reading, node: ir.Node) -> None:
    """Sum over the features of X (steps, batch, features) with W (directions, gates, features); the rest is pinned.

    The gates read each other's results step by step, so that the hidden width stays.
    """
    data, weight = operand_axes(reading, node, 0), operand_axes(reading, node, 1)
    reading.table.unify(data[2], weight[2])
    reading.contractions.append(Contraction(name_of(node), data[2], operand_names(node, 0, 1)))
    reason = f"{node.op_type}: its gates read each other's results"
    pinned = [*data[:2], *weight[:2]]
    for value in node.inputs[2:]:
        pinned += reading.axes_of(value) if value is not None and is_static(value) else ()
    reading.pin(pinned, reason)
    steps = data[0], data[1]
    reading.work.append(CostTerm(name_of(node), (*steps, *weight)))
    reading.work.append(CostTerm(name_of(node), (*steps, *operand_axes(reading, node, 2))))
    for value in node.outputs:
        if value.name and is_static(value):
            reading.set_axes(value, [reading.table.fresh(size, pin=reason) for size in shape_of(value)])


def branching(reading: Reading, node: ir.Node) -> None:
    """Refuse: the graphs inside are kept whole, so every axis they read is pinned."""
    raise StructureMismatch("the graph inside it is kept whole")
