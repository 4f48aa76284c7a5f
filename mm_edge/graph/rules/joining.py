"""Operators that join, cut, repeat or pad axes."""

from __future__ import annotations

import onnx_ir as ir

from mm_edge.graph.reading import OperandEdit, Reading, SizeTerm, shape_of
from mm_edge.graph.rules.operands import attribute, constant_ints, name_of, operand_axes, resize_operand, text


def concat(reading: Reading, node: ir.Node) -> None:
    """The joined axis is the sum of the operands' axes; their other axes are unified."""
    operands = [reading.axes_of(value) for value in node.inputs if value is not None]
    along = attribute(node, "axis", 0) % len(operands[0])
    for other in operands[1:]:
        for index, (a, b) in enumerate(zip(operands[0], other, strict=True)):
            if index != along:
                reading.table.unify(a, b)
    out = list(operands[0])
    out[along] = reading.table.sum([axes[along] for axes in operands])
    reading.set_axes(node.outputs[0], out)


def split(reading: Reading, node: ir.Node) -> None:
    """The inverse of Concat: the axis is a sum of the results' axes."""
    axes = operand_axes(reading, node, 0)
    along = attribute(node, "axis", 0) % len(axes)
    sizes = [shape_of(value)[along] for value in node.outputs]
    parts = reading.table.split_sum(axes[along], sizes)
    resize_operand(reading, node, 1, parts)
    for value, part in zip(node.outputs, parts, strict=True):
        out = list(axes)
        out[along] = part
        reading.set_axes(value, out)


def slice_(reading: Reading, node: ir.Node) -> None:
    """Consecutive indices are one part of a sum; an axis sliced with a stride is pinned."""
    axes = list(operand_axes(reading, node, 0))
    starts, ends = constant_ints(reading, node, 1) or [], constant_ints(reading, node, 2) or []
    along = constant_ints(reading, node, 3) or list(range(len(starts)))
    steps = constant_ints(reading, node, 4) or [1] * len(starts)
    first: list[SizeTerm] = []
    last: list[SizeTerm] = []
    for index, start, end, step in zip(along, starts, ends, steps, strict=True):
        axis = axes[index]
        begin, stop, stride = slice(start, end if end < 2**31 - 1 else None, step).indices(reading.table.size(axis))
        if stride != 1:
            reading.pin([axis], "a slice with a stride")
            size = len(range(begin, stop, stride))
            axes[index] = reading.table.fresh(size, pin="a slice with a stride")
            first.append(SizeTerm(start))
            last.append(SizeTerm(end))
            continue
        before, part, _ = reading.table.split_sum(axis, [begin, stop - begin, reading.table.size(axis) - stop])
        axes[index] = part
        first.append(SizeTerm(0, (before,)))
        last.append(SizeTerm(0, (before, part)))
    reading.edits.append(OperandEdit(name_of(node), 1, tuple(first)))
    reading.edits.append(OperandEdit(name_of(node), 2, tuple(last)))
    reading.set_axes(node.outputs[0], axes)


def expand(reading: Reading, node: ir.Node) -> None:
    """Axes of size one are repeated; the others are unified with the result's."""
    axes = operand_axes(reading, node, 0)
    target = shape_of(node.outputs[0])
    wide = tuple(reading.table.fresh(size) for size in target)
    out = reading.broadcast([wide, axes])
    resize_operand(reading, node, 1, out)
    reading.set_axes(node.outputs[0], out)


def tile(reading: Reading, node: ir.Node) -> None:
    """A repeated axis is a product, the repetitions its major factor."""
    axes = operand_axes(reading, node, 0)
    repeats = constant_ints(reading, node, 1) or []
    out = [
        axis if count == 1 else reading.table.product([reading.table.fresh(count, pin="repetitions of a Tile"), axis])
        for axis, count in zip(axes, repeats, strict=True)
    ]
    reading.set_axes(node.outputs[0], out)


def pad(reading: Reading, node: ir.Node) -> None:
    """Constant padding adds pinned parts; an axis with reflected or negative padding is pinned."""
    axes = operand_axes(reading, node, 0)
    pads = constant_ints(reading, node, 1, "pads") or []
    along = constant_ints(reading, node, 3) if len(node.inputs) > 3 else None
    along = list(range(len(axes))) if along is None else along
    plain = text(node, "mode", "constant") == "constant"
    out = list(axes)
    for position, index in enumerate(along):
        before, after = pads[position], pads[position + len(along)]
        if before == after == 0:
            continue
        axis = axes[index]
        if not plain or before < 0 or after < 0:
            reading.pin([axis], f"{text(node, 'mode', 'constant')} padding along this axis")
            out[index] = reading.table.fresh(reading.table.size(axis) + before + after, pin="padded axis")
            continue
        edges = [reading.table.fresh(size, pin="padding") for size in (before, after)]
        out[index] = reading.table.sum([edges[0], axis, edges[1]])
    reading.set_axes(node.outputs[0], out)


def resize(reading: Reading, node: ir.Node) -> None:
    """An axis that changes size, or that is spatial, is pinned; the others stay."""
    axes = operand_axes(reading, node, 0)
    out = []
    for axis, size in zip(axes, shape_of(node.outputs[0]), strict=True):
        if size == reading.table.size(axis):
            out.append(axis)
            continue
        reading.pin([axis], "resized axis")
        out.append(reading.table.fresh(size, pin="resized axis"))
    reading.pin(axes[2:], "resized axis")
    if len(node.inputs) > 3 and node.inputs[3] is not None and len(constant_ints(reading, node, 3) or []) == len(axes):
        resize_operand(reading, node, 3, out)
    reading.set_axes(node.outputs[0], out)
