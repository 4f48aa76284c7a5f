"""Products of activations and weights: convolutions, matrix products, Einsum."""

from __future__ import annotations

import onnx_ir as ir

from mm_edge.graph.axes import Axis
from mm_edge.graph.reading import AttributeEdit, Contraction, CostTerm, Reading, StructureMismatch, shape_of
from mm_edge.graph.rules.operands import attribute, name_of, operand_axes, operand_names, text


def convolution(reading: Reading, node: ir.Node) -> None:
    """Conv W[O, I/g, ...] or ConvTranspose W[I, O/g, ...]; both sides of a depthwise one have the same channel axis."""
    table = reading.table
    data, weight = operand_axes(reading, node, 0), operand_axes(reading, node, 1)
    groups = attribute(node, "group", 1)
    transposed = node.op_type == "ConvTranspose"
    channels = data[1]
    ins, outs = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    reading.pin(data[2:], "spatial axis of a convolution")
    reading.pin(weight[2:], "kernel of a convolution")
    if groups == 1:
        table.unify(channels, ins)
        out, contracted = outs, ins
    else:
        out, contracted = _grouped(reading, node, channels, ins, outs, groups)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        table.unify(operand_axes(reading, node, 2)[0], out)
    spatial = [table.fresh(size, pin="spatial axis of a convolution") for size in shape_of(node.outputs[0])[2:]]
    reading.contractions.append(Contraction(name_of(node), contracted, operand_names(node, 0, 1)))
    grid = data[2:] if transposed else tuple(spatial)
    # Conv reads kernel * I/g values per output position; ConvTranspose writes kernel * O/g values per input position.
    side = channels if transposed else out
    reading.work.append(CostTerm(name_of(node), (data[0], side, weight[1], *weight[2:], *grid)))
    reading.set_axes(node.outputs[0], [data[0], out, *spatial])


def _grouped(reading: Reading, node: ir.Node, channels: Axis, ins: Axis, outs: Axis, groups: int) -> tuple[Axis, Axis]:
    """Tie the group factor of a grouped convolution; return its output axis and the axis each group sums over."""
    table = reading.table
    size = table.size(channels) // groups
    group, inner = table.split_product(channels, [groups, size])
    if node.op_type == "ConvTranspose":
        weight_group, weight_inner = table.split_product(ins, [groups, size])
        table.unify(group, weight_group)
        table.unify(inner, weight_inner)
        out = table.product([group, outs])
    else:
        table.unify(inner, ins)
        weight_group, _ = table.split_product(outs, [groups, table.size(outs) // groups])
        table.unify(group, weight_group)
        out = outs
    reading.edits.append(AttributeEdit(name_of(node), "group", group))
    return out, inner


def gemm(reading: Reading, node: ir.Node) -> None:
    """A' B' + C, where A' and B' are transposed if transA and transB say so."""
    table = reading.table
    left, right = operand_axes(reading, node, 0), operand_axes(reading, node, 1)
    rows, inner = left[::-1] if attribute(node, "transA", 0) else left
    inner_right, columns = right[::-1] if attribute(node, "transB", 0) else right
    table.unify(inner, inner_right)
    bias = operand_axes(reading, node, 2)
    reading.broadcast([(rows, columns), bias])
    reading.contractions.append(Contraction(name_of(node), inner, operand_names(node, 0, 1)))
    reading.work.append(CostTerm(name_of(node), (rows, columns, inner)))
    reading.set_axes(node.outputs[0], [rows, columns])


def matmul(reading: Reading, node: ir.Node) -> None:
    """Batched matrix product with numpy's broadcasting; a vector is a row on the left and a column on the right."""
    table = reading.table
    left, right = operand_axes(reading, node, 0), operand_axes(reading, node, 1)
    inner = left[-1]
    table.unify(inner, right[-2] if len(right) > 1 else right[-1])
    batch = reading.broadcast([left[:-2], right[:-2]])
    out = [*batch, *left[-2:-1], *(right[-1:] if len(right) > 1 else ())]
    reading.contractions.append(Contraction(name_of(node), inner, operand_names(node, 0, 1)))
    reading.work.append(CostTerm(name_of(node), (*out, inner)))
    reading.set_axes(node.outputs[0], out)


def einsum(reading: Reading, node: ir.Node) -> None:
    """Each letter is one axis; letters that the result lacks are summed over."""
    equation = text(node, "equation", "").replace(" ", "")
    if "->" not in equation or "." in equation:
        raise StructureMismatch(f"equation '{equation}' is not explicit")
    terms, result = equation.split("->")
    letters: dict[str, Axis] = {}
    for index, term in enumerate(terms.split(",")):
        for letter, axis in zip(term, operand_axes(reading, node, index), strict=True):
            if reading.table.size(axis) == 1 and letter in letters:
                continue
            if letter in letters and reading.table.size(letters[letter]) > 1:
                reading.table.unify(letters[letter], axis)
            else:
                letters[letter] = axis
    for letter, axis in letters.items():
        if letter not in result:
            readers = [index for index, term in enumerate(terms.split(",")) if letter in term]
            reading.contractions.append(Contraction(name_of(node), axis, operand_names(node, *readers)))
    reading.work.append(CostTerm(name_of(node), tuple(letters.values())))
    reading.set_axes(node.outputs[0], [letters[letter] for letter in result])
