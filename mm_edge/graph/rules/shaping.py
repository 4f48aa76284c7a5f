"""Operators that give the same elements another shape: Transpose, Reshape, Squeeze, and blocks to channels."""

from __future__ import annotations

import onnx_ir as ir

from mm_edge.graph.reading import Reading, shape_of
from mm_edge.graph.rules.operands import attribute, numbers, operand_axes, resize_operand, text


def transpose(reading: Reading, node: ir.Node) -> None:
    """The same axes in another order."""
    axes = operand_axes(reading, node, 0)
    order = numbers(node, "perm") or list(range(len(axes)))[::-1]
    reading.set_axes(node.outputs[0], [axes[index] for index in order])


def reshape(reading: Reading, node: ir.Node) -> None:
    """Row-major: axes are merged into products and split into factors, never reordered."""
    axes = operand_axes(reading, node, 0)
    out = reading.reshape(axes, shape_of(node.outputs[0]))
    if node.op_type == "Reshape":
        resize_operand(reading, node, 1, out)
    reading.set_axes(node.outputs[0], out)


def squeeze(reading: Reading, node: ir.Node) -> None:
    """Remove or insert axes of size one; the others keep their order."""
    wide = iter(axis for axis in operand_axes(reading, node, 0) if reading.table.size(axis) != 1)
    sizes = shape_of(node.outputs[0])
    reading.set_axes(node.outputs[0], [next(wide) if size != 1 else reading.table.fresh(1) for size in sizes])


def depth_space(reading: Reading, node: ir.Node) -> None:
    """Blocks of positions become channels, or channels become blocks of positions."""
    axes = operand_axes(reading, node, 0)
    block = attribute(node, "blocksize", 1)
    reading.pin(axes[2:], "spatial axis of a block rearrangement")
    spatial = [reading.table.fresh(size, pin="spatial axis") for size in shape_of(node.outputs[0])[2:]]
    if node.op_type == "SpaceToDepth":
        blocks = reading.table.fresh(block * block, pin="positions of a block")
        channels = reading.table.product([blocks, axes[1]])
    else:
        depth = reading.table.size(axes[1]) // (block * block)
        major = text(node, "mode", "DCR") == "CRD"
        sizes = [depth, block * block] if major else [block * block, depth]
        parts = reading.table.split_product(axes[1], sizes)
        channels, blocks = parts if major else parts[::-1]
        reading.pin([blocks], "positions of a block")
    reading.set_axes(node.outputs[0], [axes[0], channels, *spatial])
