"""Depth: a residual branch is removed by keeping none of the channels inside it.

In x + f(x) take the groups whose weights all lie inside f, and remove all of their indices. A layer that sums over such
a group then puts out its bias whatever it reads. So f is a constant c, in the masked model and in the compact one, and
the nodes before it are no longer needed. The compact graph holds x + c, where c has one number per channel; `deploy`
adds it to the bias of the layer before, where there is one.

    branch   in an addition u + v, the nodes that compute v from u alone and that nothing else reads
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from mm_edge.arrays import Array
from mm_edge.errors import JobError
from mm_edge.graph.axes import Axis, AxisTable, Keep
from mm_edge.graph.fold import add_constant_
from mm_edge.graph.groups import Structure, Sum
from mm_edge.graph.partial import constant_values, run_constants
from mm_edge.graph.rules.zeros import added_operands

# The end of the names of constants that replace sums over nothing.
EMPTIED = "/emptied"


@dataclass(frozen=True)
class Branch:
    """A residual branch that may be removed whole.

    Attributes:
        id: the module that holds its matrices and kernels; where several branches share it, its first parameter.
        leaves: the groups inside it; emptying them all removes it.
        tensors: the parameters that nothing outside it reads.
        macs: the multiply-adds saved by removing it, everything else at full width.
    """

    id: str
    leaves: tuple[Axis, ...]
    tensors: tuple[str, ...]
    macs: float


def renamed(branch: Branch, leaves: Mapping[Axis, Axis]) -> Branch:
    """Return the same branch at another input size; `leaves` maps the leaves here to those there."""
    return replace(branch, leaves=tuple(leaves[leaf] for leaf in branch.leaves))


def find_branches(model: ir.Model, structure: Structure) -> tuple[Branch, ...]:
    """Return the branches of the raw graph `model` that its groups can remove, in graph order."""
    found: list[Branch] = []
    constant = constant_values(model.graph)
    for node in model.graph:
        if node.op_type == "Add" and len(node.inputs) == 2:
            for skip, branch in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
                inside = _private_nodes(model, constant, node, skip, branch)
                item = _branch_of(model, structure, inside) if inside else None
                if item is not None:
                    found.append(item)
    shared = Counter(item.id for item in found)
    return tuple(item if shared[item.id] == 1 else replace(item, id=item.tensors[0]) for item in found)


def _private_nodes(
    model: ir.Model, constant: set[ir.Value], add: ir.Node, skip: ir.Value | None, branch: ir.Value | None
) -> tuple[ir.Node, ...]:
    """Return the nodes that compute `branch` for `add` alone, or () if they read other computed values than `skip`."""
    if skip is None or branch is None or branch.producer() is None or branch.is_graph_output():
        return ()
    inside: set[ir.Node] = set()
    for node in reversed(list(model.graph)):
        users = [(use.node, use.node.inputs[use.idx]) for value in node.outputs for use in value.uses()]
        ends = any(value.is_graph_output() for value in node.outputs)
        own = all(user in inside or (user is add and value is branch) for user, value in users)
        if users and own and not ends:
            inside.add(node)
    made = {value for node in inside for value in node.outputs}
    read = {value for node in inside for value in node.inputs if value is not None}
    starts = read - made - constant
    return tuple(node for node in model.graph if node in inside) if starts == {skip} else ()


def _branch_of(model: ir.Model, structure: Structure, inside: tuple[ir.Node, ...]) -> Branch | None:
    nodes = set(inside)
    names = [value.name for node in inside for value in node.inputs if value is not None and value.name is not None]
    own = [
        name
        for name in dict.fromkeys(names)
        if name in structure.parameters and all(use.node in nodes for use in model.graph.initializers[name].uses())
    ]
    leaves = tuple(group.leaf for group in structure.groups if set(group.tensors) <= set(own))
    empty = {leaf: np.zeros(structure.table.size(leaf), dtype=np.bool_) for leaf in leaves}
    alive = live_nodes(model, structure, empty)
    cut = _cut_sums(structure, empty)
    works = [item for item in structure.work if item.node in {node.name for node in inside}]
    if not leaves or not works or any(item.node in alive - cut for item in works):
        return None
    macs = sum(structure.mac_cost.of_item(item, {}) for item in works)
    wide = [name for name in own if len(structure.tensor_axes[name]) > 1]
    return Branch(_module(wide or own), leaves, tuple(own), macs)


def _module(names: list[str]) -> str:
    """Return the module that holds all of the dotted names; the first name where no module holds them all."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or names[0]


def is_emptied(table: AxisTable, axis: Axis, keep: Keep) -> bool:
    """Return whether `keep` removes every index of an axis that has some."""
    return table.size(axis) > 0 and not table.kept(axis, dict(keep)).any()


def _cut_sums(structure: Structure, keep: Keep) -> set[str]:
    """Return the names of the nodes that sum over an axis of which nothing is kept."""
    return {item.node for item in structure.sums if is_emptied(structure.table, item.axis, keep)}


def live_nodes(model: ir.Model, structure: Structure, keep: Keep) -> set[str]:
    """Return the names of the raw graph's nodes that an output needs once sums over emptied groups are constant."""
    cut = _cut_sums(structure, keep)
    alive: set[str] = set()
    stack = list(model.graph.outputs)
    while stack:
        node = stack.pop().producer()
        if node is None or node.name is None or node.name in alive:
            continue
        alive.add(node.name)
        stack += _read(node, node.name in cut)
    return alive


def _read(node: ir.Node, cut: bool) -> list[ir.Value]:
    """Return what a node reads; one that sums over nothing reads its bias alone."""
    values = [node.inputs[index] for index in added_operands(node)] if cut else node.inputs
    return [value for value in values if value is not None]


def dead_tensors(model: ir.Model, structure: Structure, keep: Keep) -> frozenset[str]:
    """Return the initialisers of the raw graph that no output depends on any more."""
    if all(kept.any() for kept in keep.values()):
        return frozenset()
    alive = live_nodes(model, structure, keep)
    cut = _cut_sums(structure, keep)
    read: set[str] = set()
    for node in model.graph:
        if node.name in alive:
            read |= {value.name for value in _read(node, node.name in cut) if value.name is not None}
    return frozenset(set(model.graph.initializers) - read)


def cut_branches_(model: ir.Model, structure: Structure, keep: Keep) -> None:
    """Replace, in place, the sums over nothing in the compact graph `model` by constants, and remove unused nodes.

    The initialisers must have been sliced already.

    Raises:
        JobError: something other than a sum reads an emptied group, or no output depends on the input any more.
    """
    lost = next(group for group in structure.groups if group.leaf in keep and not keep[group.leaf].any())
    refusal = JobError(
        f"group {lost.id} would lose all of its {lost.size} indices, and it is not the inside of a residual branch"
    )
    nodes = {node.name: node for node in model.graph}
    for item in structure.sums:
        if item.node in nodes and is_emptied(structure.table, item.axis, keep):
            if nodes[item.node].outputs[0].is_graph_output():
                raise refusal
            _replace_by_constant_(model, nodes[item.node], structure.table, item, keep)
    ir_passes.RemoveUnusedNodesPass()(model)
    # Other constants may be empty from the start, such as the region of interest of a Resize.
    reached = any(
        any(is_emptied(structure.table, axis, keep) for axis in structure.tensor_axes.get(name, ()))
        for name, value in model.graph.initializers.items()
        if list(value.uses())
    )
    if reached or constant_values(model.graph) >= set(model.graph.outputs):
        raise refusal
    _fold_constant_operands_(model)


def _replace_by_constant_(model: ir.Model, node: ir.Node, table: AxisTable, item: Sum, keep: Keep) -> None:
    (out,) = node.outputs
    shape = [int(table.kept(axis, dict(keep)).sum()) for axis in item.result]
    array = np.zeros(shape, dtype=np.float32 if out.dtype is None else out.dtype.numpy())
    for index in added_operands(node):
        bias = node.inputs[index]
        if bias is None or bias.const_value is None:
            raise JobError(f"a group cannot be emptied: the bias of {node.name} is computed at run time")
        column = (1, -1, *(1,) * (len(shape) - 2)) if node.op_type in ("Conv", "ConvTranspose") else (-1,)
        array = array + bias.const_value.numpy().reshape(column)
    out.replace_all_uses_with(add_constant_(model, f"{node.name}{EMPTIED}", array))


def _fold_constant_operands_(model: ir.Model) -> None:
    """Compute, in place, the operands of computed nodes that have become constant."""
    constant = constant_values(model.graph)
    started = _started_constant(model)
    wanted = {
        value.name or "": value
        for node in model.graph
        if node.outputs[0] not in constant
        for value in node.inputs
        if value is not None and value in started and value in constant and value.producer() is not None
    }
    arrays = run_constants(model, sorted(wanted))
    for name, array in arrays.items():
        value = wanted[name]
        value.replace_all_uses_with(add_constant_(model, f"{value.name}{EMPTIED}", array))
    ir_passes.RemoveUnusedNodesPass()(model)
    for name, value in model.graph.initializers.items():
        broadcasts = all(use.node.op_type in ("Add", "Sub", "Mul", "Div") for use in value.uses())
        if name.endswith(EMPTIED) and broadcasts and value.const_value is not None:
            array = _collapse(value.const_value.numpy())
            value.const_value, value.shape = ir.tensor(array, name=name), ir.Shape(array.shape)


def _started_constant(model: ir.Model) -> set[ir.Value]:
    """Return the values that depend on a constant put in by `_replace_by_constant_`."""
    started = {value for name, value in model.graph.initializers.items() if name.endswith(EMPTIED)}
    for node in model.graph:
        if any(value in started for value in node.inputs):
            started.update(node.outputs)
    return started


def _collapse(array: Array) -> Array:
    """Return a constant with size one along every axis where its values repeat: its readers broadcast it."""
    for axis in range(array.ndim):
        first = np.take(array, [0], axis=axis)
        if array.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return array
