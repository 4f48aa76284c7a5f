"""Reads the attributes and operands of a node, for the rules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mm_edge.graph.axes import Axis
from mm_edge.graph.reading import Axes, OperandEdit, Reading, SizeTerm, StructureMismatch

# What a graph is taken to be written in if it does not say.
NEWEST_OPSET = 20


def attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute."""
    value = node.attributes.get(name)
    return default if value is None else value.as_int()


def text(node: ir.Node, name: str, default: str) -> str:
    """Return a string attribute."""
    value = node.attributes.get(name)
    return default if value is None else value.as_string()


def numbers(node: ir.Node, name: str) -> list[int] | None:
    """Return a list-of-integers attribute, or None."""
    value = node.attributes.get(name)
    return None if value is None else list(value.as_ints())


def operand_axes(reading: Reading, node: ir.Node, index: int) -> Axes:
    """Return the axes of operand `index`, () when it is absent."""
    return reading.axes_of(node.inputs[index]) if index < len(node.inputs) else ()


def constant_ints(reading: Reading, node: ir.Node, index: int, name: str | None = None) -> list[int] | None:
    """Return a constant integer operand as a list (older opsets keep it in attribute `name`), None when absent.

    Raises:
        StructureMismatch: the operand is computed at run time.
    """
    if index < len(node.inputs) and node.inputs[index] is not None:
        array = reading.constant(node.inputs[index])
        if array is None:
            raise StructureMismatch(f"operand {index} is computed at run time")
        return [int(item) for item in np.asarray(array).reshape(-1)]
    return numbers(node, name) if name is not None else None


def name_of(node: ir.Node) -> str:
    """Return the node's unique name, given to it by export.fold_constants."""
    assert node.name is not None
    return node.name


def operand_names(node: ir.Node, *indices: int) -> tuple[str, ...]:
    """Return the value names of some operands."""
    return tuple(value.name or "" for value in (node.inputs[index] for index in indices) if value is not None)


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return operand `index`, which must be there."""
    value = node.inputs[index]
    assert value is not None
    return value


def resize_operand(reading: Reading, node: ir.Node, operand: int, axes: Sequence[Axis]) -> None:
    """Record that integer operand `operand` lists the sizes of `axes`."""
    sizes = tuple(SizeTerm(0, (axis,)) for axis in axes)
    reading.edits.append(OperandEdit(name_of(node), operand, sizes))


def opset_of(reading: Reading) -> int:
    """Return the version of ONNX's own operators that the graph is written in."""
    versions = reading.raw.model.opset_imports
    return versions.get("") or versions.get("ai.onnx") or NEWEST_OPSET
