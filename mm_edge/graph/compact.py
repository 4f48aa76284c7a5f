"""Makes masks and compact graphs from a structure and what each group keeps.

`mask_tensors` and `materialise` take the same `keep`: for each group's leaf, a bool array of its size. Every candidate
is made from a copy of the raw graph, which takes milliseconds where an export takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mm_edge.arrays import Array, Arrays, BoolArray
from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.depth import cut_branches_
from mm_edge.graph.export import RawGraph, constant_array
from mm_edge.graph.fold import add_constant_
from mm_edge.graph.groups import Structure
from mm_edge.graph.norms import restore_normalization_
from mm_edge.graph.reading import AttributeEdit, Edit, MeanEdit, OperandEdit

# From this opset on the sizes of a Split are an operand.
SPLIT_BY_OPERAND = 13


@dataclass(frozen=True)
class AxisMask:
    """Which positions of each axis of a tensor stay; the mask is their outer product."""

    axes: tuple[BoolArray, ...]

    def dense(self) -> BoolArray:
        """Return the mask as a bool array of the tensor's shape, 1 where the tensor keeps its value."""
        mask = np.ones((), dtype=np.bool_)
        for axis in self.axes:
            mask = np.logical_and.outer(mask, axis)
        return mask

    @property
    def kept(self) -> int:
        """Number of elements that stay."""
        return int(np.prod([int(axis.sum()) for axis in self.axes]))


def mask_tensors(structure: Structure, keep: Keep) -> dict[str, AxisMask]:
    """Return the mask of every parameter that loses something (E8)."""
    masks = {}
    for name in structure.tensor_axes:
        if name not in structure.parameters:
            continue
        axes = structure.kept(name, keep)
        if not all(axis.all() for axis in axes):
            masks[name] = AxisMask(axes)
    return masks


def apply_mask(array: Array, mask: AxisMask | None) -> Array:
    """Return `array` with the removed positions of every axis set to zero."""
    if mask is None:
        return array
    return np.where(mask.dense(), array, np.zeros((), dtype=array.dtype))


def masked_model(raw: RawGraph, masks: Mapping[str, AxisMask], tensors: Mapping[str, Array] | None = None) -> ir.Model:
    """Return the graph at its dense shapes, with `tensors` swapped in by name and `masks` applied.

    It is what an artifact is checked against, so that it has the sizes that artifacts leave open.
    """
    model = (raw.model if raw.given is None else raw.given).clone()
    for name, value in model.graph.initializers.items():
        swapped = None if name in raw.folded else (tensors or {}).get(name)
        if swapped is None and name not in masks:
            continue
        assert value.const_value is not None
        array = value.const_value.numpy() if swapped is None else np.asarray(swapped)
        value.const_value = ir.tensor(apply_mask(array, masks.get(name)), name=name)
    return model


def materialise(
    raw: RawGraph, structure: Structure, keep: Keep, tensors: Mapping[str, Array] | None = None
) -> ir.Model:
    """Return the compact graph: `tensors` swapped in by name, removed indices dropped, constants rewritten.

    It has the static shapes of the raw graph; `materialise_artifact` returns the one with the artifact's own. Groups
    of which nothing is kept must make whole residual branches (see depth.py).

    Raises:
        JobError: nothing is kept of a group that is not the inside of a residual branch.
    """
    return _materialise(raw.model.clone(), raw, structure, keep, tensors, is_open=False)


def materialise_artifact(
    raw: RawGraph, structure: Structure, keep: Keep, tensors: Mapping[str, Array] | None = None
) -> ir.Model:
    """Return the compact graph that an artifact is written from: as `materialise`, with the sizes the file left open.

    Raises:
        JobError: nothing is kept of a group that is not the inside of a residual branch.
    """
    if raw.given is None:
        return materialise(raw, structure, keep, tensors)
    return _materialise(raw.given.clone(), raw, structure, keep, tensors, is_open=True)


def _materialise(
    model: ir.Model,
    raw: RawGraph,
    structure: Structure,
    keep: Keep,
    tensors: Mapping[str, Array] | None,
    *,
    is_open: bool,
) -> ir.Model:
    for name, array in compact_arrays(raw, structure, keep, tensors).items():
        if name not in model.graph.initializers:
            continue  # a constant of the static shapes alone, whose axes are pinned
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(np.ascontiguousarray(array), name=name)
        value.shape = ir.Shape(array.shape)
    nodes = {node.name: node for node in model.graph}
    for edit in structure.edits:
        _apply_edit(model, nodes[edit.node], edit, structure, keep, is_open)
    _forget_shapes(model)
    if not all(kept.any() for kept in keep.values()):
        cut_branches_(model, structure, keep)
    return model


def compact_arrays(
    raw: RawGraph, structure: Structure, keep: Keep, tensors: Mapping[str, Array] | None = None
) -> Arrays:
    """Return the initialisers that `materialise` changes, by name: swapped in from `tensors`, removed indices dropped.

    Two compact graphs that keep the same number of indices of every group, and some of each, differ in these alone.
    """
    found: Arrays = {}
    for name, value in raw.model.graph.initializers.items():
        swapped = None if name in raw.folded else (tensors or {}).get(name)
        axes = structure.kept(name, keep) if name in structure.tensor_axes else ()
        cut = [position for position, axis in enumerate(axes) if not axis.all()]
        if swapped is None and not cut:
            continue
        assert value.const_value is not None
        array = value.const_value.numpy() if swapped is None else np.asarray(swapped)
        for position in cut:
            array = np.take(array, np.flatnonzero(axes[position]), axis=position)
        found[name] = array
    return found


def _apply_edit(
    model: ir.Model, node: ir.Node, edit: Edit, structure: Structure, keep: Keep, is_open: bool = False
) -> None:
    def size(axis: Axis) -> int:
        return int(structure.table.kept(axis, keep).sum())

    if isinstance(edit, OperandEdit):
        sizes = np.array([term.constant + sum(size(axis) for axis in term.axes) for term in edit.sizes], dtype=np.int64)
        if is_open:
            table = structure.table
            dense = [term.constant + sum(table.size(axis) for axis in term.axes) for term in edit.sizes]
            _set_open_operand(model, node, edit.operand, sizes, sizes != np.array(dense, dtype=np.int64))
        else:
            _set_operand(model, node, edit.operand, sizes)
    elif isinstance(edit, AttributeEdit):
        node.attributes[edit.attribute] = ir.AttrInt64(edit.attribute, size(edit.axis))
    elif isinstance(edit, MeanEdit):
        kept = float(np.prod([size(axis) / structure.table.size(axis) for axis in edit.axes]))
        if kept != 1.0:
            _scale_output(model, node, kept)
    else:
        kept_size = math.prod(size(axis) for axis in edit.axes)
        dense_size = math.prod(structure.table.size(axis) for axis in edit.axes)
        if kept_size != dense_size:
            restore_normalization_(model, node, kept_size, dense_size)


def _set_operand(model: ir.Model, node: ir.Node, index: int, array: Array) -> None:
    # These attributes describe the old sizes.
    for implied in ("allowzero", "num_outputs"):
        node.attributes.pop(implied, None)
    if node.op_type == "Split" and (model.opset_imports.get("") or SPLIT_BY_OPERAND) < SPLIT_BY_OPERAND:
        node.attributes["split"] = ir.AttrInt64s("split", array.tolist())
        return
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    old = node.inputs[index]
    dtype = np.dtype(np.int64) if old is None or old.dtype is None else old.dtype.numpy()
    value = add_constant_(model, f"{node.name}_sizes_{index}", array.astype(dtype))
    node.replace_input_with(index, value)


def _set_open_operand(model: ir.Model, node: ir.Node, index: int, sizes: Array, changed: BoolArray) -> None:
    """Set the entries of an integer operand that `changed` names; the others are the file's own, computed or not."""
    old = node.inputs[index] if index < len(node.inputs) else None
    if not changed.any():
        return
    if old is None:
        _set_operand(model, node, index, sizes)
        return
    array = constant_array(old)
    if array is not None:
        # An Expand may state fewer sizes than its result has; they are the last ones.
        sizes, changed = sizes[-array.size :], changed[-array.size :]
        implied = array == 1 if node.op_type == "Expand" else (array == -1) | (array == 0)
        keeps = implied if node.op_type in ("Expand", "Reshape") else np.zeros_like(changed)
        whole = np.where(changed & ~keeps, sizes, array).astype(array.dtype)
        node.replace_input_with(index, add_constant_(model, f"{node.name}_sizes_{index}", whole))
        return
    dtype = np.dtype(np.int64) if old.dtype is None else old.dtype.numpy()
    name = f"{node.name}_sizes_{index}"
    mask = add_constant_(model, f"{name}_changed", changed)
    kept = add_constant_(model, name, sizes.astype(dtype))
    choice = ir.node("Where", [mask, kept, old], name=f"{name}_where")
    choice.outputs[0].name, choice.outputs[0].type = f"{name}_chosen", old.type
    model.graph.insert_before(node, choice)
    node.replace_input_with(index, choice.outputs[0])


def _scale_output(model: ir.Model, node: ir.Node, factor: float) -> None:
    out = node.outputs[0]
    array = np.array(factor, dtype=np.float32 if out.dtype is None else out.dtype.numpy())
    scale = add_constant_(model, f"{node.name}_kept", array)
    readers = list(out.uses())
    product = ir.node("Mul", inputs=[out, scale], name=f"{node.name}_rescale")
    (scaled,) = product.outputs
    scaled.name, scaled.type = f"{out.name}_rescaled", out.type
    for use in readers:
        use.node.replace_input_with(use.idx, scaled)
    for index, value in enumerate(model.graph.outputs):
        if value is out:
            out.name, scaled.name, scaled.shape = f"{out.name}_unscaled", out.name, out.shape
            model.graph.outputs[index] = scaled
    model.graph.insert_after(node, product)


def _forget_shapes(model: ir.Model) -> None:
    """Remove the shapes of computed values, which have changed; shape inference finds the new ones."""
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = None
