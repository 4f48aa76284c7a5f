"""Coupled groups: the leaves that may lose indices, and every tensor slice each of them owns.

E8, exactness. The mask zeroes every parameter at every removed index: the rows that produce it, biases, norm scales
and shifts, the columns that read it. The compact graph agrees with the masked one if a removed index adds zero to
every sum over it. `pin_inexact` goes through the graph once more, computes for every value the set of leaves at whose
removed indices the value is exactly zero, and pins the leaves that some sum runs over without such a zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from mm_edge.arrays import BoolArray, IntArray
from mm_edge.errors import UsageError
from mm_edge.graph.axes import Axis, AxisTable, Keep
from mm_edge.graph.costs import Cost
from mm_edge.graph.export import RawGraph
from mm_edge.graph.partial import values_read
from mm_edge.graph.reading import (
    AttributeEdit,
    Axes,
    CostTerm,
    Edit,
    MeanEdit,
    OperandEdit,
    Reading,
    StructureMismatch,
    is_static,
)
from mm_edge.graph.rules import apply_rule
from mm_edge.graph.rules.operands import operand_names
from mm_edge.graph.rules.recurrent import BRANCHING
from mm_edge.graph.rules.zeros import (
    ADDING,
    MULTIPLYING,
    added_operands,
    carried_axes,
    undefined_at_zero,
    zero_operands,
)


@dataclass(frozen=True)
class TensorSlice:
    """One axis of a tensor that a group is part of.

    Position p of `axis` is removed when index `coordinates[p]` of the group is; -1 marks positions outside the group.
    """

    tensor: str
    axis: int
    coordinates: IntArray


@dataclass(frozen=True)
class Group:
    """One coupled group.

    Attributes:
        id: the first weight that produces it, its axis, and the factor of that axis where it has several.
        leaf: the axis variable.
        size: dense number of indices (channels, heads, widths, groups ...).
        slices: every parameter slice the group owns.
        inner: how many consecutive positions one index covers in the weights' axes (a head's width, 1 for a channel).
    """

    id: str
    leaf: Axis
    size: int
    slices: tuple[TensorSlice, ...]
    inner: int

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors the group is part of, without repetitions."""
        return tuple(dict.fromkeys(item.tensor for item in self.slices))


@dataclass(frozen=True)
class PinnedGroup:
    """A leaf of some weights that keeps its full width, and why."""

    id: str
    size: int
    tensors: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Sum:
    """A node that sums over `axis`; `result` holds the axes of its output."""

    node: str
    axis: Axis
    result: Axes


@dataclass(frozen=True)
class Structure:
    """The groups of a raw graph, and what must change when they lose indices.

    Attributes:
        table: the axis variables.
        tensor_axes: the axes of every initialiser, by name.
        groups: the groups that may lose indices.
        pinned: the leaves of weights that may not, each with its reason.
        edits: the nodes that a compact graph changes.
        work: the multiply-adds of every node at batch 1.
        parameters: names of the initialisers that a mask may zero.
        sums: the nodes that sum over an axis.
    """

    table: AxisTable
    tensor_axes: dict[str, Axes]
    groups: tuple[Group, ...]
    pinned: tuple[PinnedGroup, ...]
    edits: tuple[Edit, ...]
    work: tuple[CostTerm, ...]
    parameters: frozenset[str]
    sums: tuple[Sum, ...] = ()

    def kept(self, tensor: str, keep: Keep) -> tuple[BoolArray, ...]:
        """Return, per axis of `tensor`, which positions stay."""
        return tuple(self.table.kept(axis, keep) for axis in self.tensor_axes[tensor])

    def macs(self, counts: Mapping[Axis, float] | None = None) -> float:
        """Return the multiply-adds at batch 1 with `counts` indices kept per leaf (default: dense)."""
        return self.mac_cost.total(counts)

    @property
    def mac_cost(self) -> Cost:
        """The multiply-adds as a cost."""
        return Cost(self.table, self.work)


def read_structure(raw: RawGraph, keep: Sequence[str] = (), *, prune_norms: bool = False) -> Structure:
    """Read the coupled groups of `raw`; weights whose name matches a pattern in `keep` lose nothing.

    With `prune_norms` the channels a LayerNormalization averages over may be removed too, at the cost norms.py states.

    Patterns are shell-style and match a parameter's name or a module's prefix of it.

    Raises:
        UsageError: a pattern matches nothing.
    """
    reading = Reading(raw, prune_norms)
    graph = raw.model.graph
    for value in graph.inputs:
        reading.pin(reading.axes_of(value), "input of the model")
    for node in graph:
        apply_rule(reading, node)
    for value in graph.outputs:
        if value.name in reading.axes or is_static(value):
            reading.pin(reading.axes_of(value), "output of the model")
    _pin_kept(reading, keep)
    _pin_static_alone(reading)
    pin_inexact(reading)
    return _collect(reading)


def _pin_static_alone(reading: Reading) -> None:
    """Pin what only the static graph has, because an artifact with open sizes computes it when it runs."""
    given = reading.raw.given
    if given is None:
        return
    for name in reading.raw.model.graph.initializers:
        if name in reading.axes and name not in given.graph.initializers:
            reading.pin(reading.axes[name], f"'{name}' is computed from the sizes of the input")
    nodes = {node.name for node in given.graph}
    static = {node.name for node in reading.raw.model.graph}
    for node in given.graph:
        if node.op_type in BRANCHING and node.name not in static:
            reason = f"{node.op_type}: the graph inside it is kept whole"
            for value in values_read(node):
                reading.pin(reading.axes.get(value.name or "", ()), reason)
    for edit in reading.edits:
        if edit.node not in nodes:
            reading.pin(_axes_of(edit), f"{edit.node} is there at one size of the input alone")


def _axes_of(edit: Edit) -> Axes:
    if isinstance(edit, OperandEdit):
        return tuple(axis for size in edit.sizes for axis in size.axes)
    return (edit.axis,) if isinstance(edit, AttributeEdit) else edit.axes


def matches(pattern: str, fqn: str) -> bool:
    """Return whether a --keep pattern names the parameter `fqn` or a module that holds it."""
    return fnmatchcase(fqn, pattern) or fnmatchcase(fqn, f"{pattern}.*")


def _pin_kept(reading: Reading, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        hits = [name for name in sorted(reading.raw.parameters) if matches(pattern, name)]
        if not hits:
            raise UsageError(f"--keep '{pattern}' matches no parameter; see the names with: mm-edge inspect MODEL")
        for name in hits:
            reading.pin(reading.axes.get(name, ()), f"kept by --keep {pattern}")


def pin_inexact(reading: Reading) -> None:
    """Pin every leaf that some sum runs over without a zero at its removed indices (E8).

    Pin also every leaf at whose removed indices the masked model would divide by zero.
    """
    zeros = _zero_sets(reading)
    for node in reading.raw.model.graph:
        for name in operand_names(node, *undefined_at_zero(node)):
            for leaf in sorted(zeros.get(name, frozenset())):
                reading.table.pin(
                    leaf, f"{node.op_type} ({node.name}) of removed indices, which are zero, is undefined"
                )
    means = {(edit.node, axis) for edit in reading.edits if isinstance(edit, MeanEdit) for axis in edit.axes}
    for item in reading.contractions:
        safe: set[Axis] = set()
        for operand in item.operands:
            safe |= zeros.get(operand, frozenset())
        what = "a mean" if (item.node, item.axis) in means else "a sum"
        for leaf in reading.table.leaves(item.axis):
            if leaf not in safe:
                reading.table.pin(leaf, f"{what} over it ({item.node}) would still count the removed ones")


def _zero_sets(reading: Reading) -> dict[str, frozenset[Axis]]:
    """Return, per value, the leaves at whose removed indices it is exactly zero in the masked model."""
    zeros: dict[str, frozenset[Axis]] = {}
    leaves: dict[str, frozenset[Axis]] = {}
    for name, axes in reading.axes.items():
        leaves[name] = frozenset(leaf for axis in axes for leaf in reading.table.leaves(axis))
    for name, value in reading.raw.model.graph.initializers.items():
        is_zero = name in reading.raw.parameters or _all_zero(value)
        zeros[name] = leaves.get(name, frozenset()) if is_zero else frozenset()
    for node in reading.raw.model.graph:
        result = _zeros_through(reading, node, zeros, leaves)
        for out in node.outputs:
            assert out.name is not None
            zeros[out.name] = result & leaves.get(out.name, frozenset())
    return zeros


def _all_zero(value: ir.Value) -> bool:
    return value.const_value is not None and not np.any(value.const_value.numpy())


def _zeros_through(
    reading: Reading, node: ir.Node, zeros: dict[str, frozenset[Axis]], leaves: dict[str, frozenset[Axis]]
) -> frozenset[Axis]:
    try:
        how, indices = zero_operands(node)
        return _zeros_where(reading, node, zeros, leaves, how, indices)
    except StructureMismatch:  # the shape of an operand is not known, so that nothing is known to be zero
        return frozenset()


def _zeros_where(
    reading: Reading,
    node: ir.Node,
    zeros: dict[str, frozenset[Axis]],
    leaves: dict[str, frozenset[Axis]],
    how: str,
    indices: list[int],
) -> frozenset[Axis]:
    names = operand_names(node, *indices)
    if how == "none" or not names:
        return frozenset()
    if how == "any" and node.op_type in MULTIPLYING:
        result = frozenset[Axis]()
        for index, name in zip(indices, names, strict=True):
            carried = carried_axes(reading, node, index)
            result |= zeros.get(name, frozenset()) & {leaf for axis in carried for leaf in reading.table.leaves(axis)}
    elif how == "any":
        result = frozenset[Axis]().union(*(zeros.get(name, frozenset()) for name in names))
    elif node.op_type == "Concat":
        unsafe = frozenset[Axis]().union(
            *(leaves.get(name, frozenset()) - zeros.get(name, frozenset()) for name in names)
        )
        result = frozenset[Axis]().union(*(zeros.get(name, frozenset()) for name in names)) - unsafe
    else:
        result = frozenset.intersection(*(zeros.get(name, frozenset()) for name in names))
    for name in operand_names(node, *added_operands(node)):
        result &= zeros.get(name, frozenset())
    return result - _crossed(reading, node, zeros)


def _crossed(reading: Reading, node: ir.Node, zeros: dict[str, frozenset[Axis]]) -> frozenset[Axis]:
    """Return the leaves that several axes of the result hold and that not every operand has zeros at.

    In an outer product or sum of x with itself a row of zeros does not make the columns zero.
    """
    out = node.outputs[0]
    if out.name is None or node.op_type not in MULTIPLYING | ADDING:
        return frozenset()
    held = _axes_holding(reading, out.name)
    repeated = {leaf for leaf, count in held.items() if count > 1}
    crossed = set()
    for name in operand_names(node, *range(len(node.inputs))) if repeated else ():
        own = _axes_holding(reading, name)
        for leaf in repeated & own.keys():
            if leaf not in zeros.get(name, frozenset()) or (node.op_type in ADDING and own[leaf] < held[leaf]):
                crossed.add(leaf)
    return frozenset(crossed)


def _axes_holding(reading: Reading, name: str) -> Counter[Axis]:
    return Counter(leaf for axis in reading.axes.get(name, ()) for leaf in set(reading.table.leaves(axis)))


def _collect(reading: Reading) -> Structure:
    table = reading.table
    tensors = {name: reading.axes[name] for name in reading.raw.model.graph.initializers if name in reading.axes}
    owned: dict[Axis, list[TensorSlice]] = {}
    names: dict[Axis, str] = {}
    inner: dict[Axis, int] = {}
    for tensor in _by_first_use(reading, tensors):
        for position, axis in enumerate(tensors[tensor]):
            found = [leaf for leaf in dict.fromkeys(table.leaves(axis)) if table.size(leaf) > 1]
            for ordinal, leaf in enumerate(found):
                occurrences = table.coordinates(axis, leaf)
                owned.setdefault(leaf, []).extend(TensorSlice(tensor, position, item) for item in occurrences)
                names.setdefault(leaf, f"{tensor}:{position}" + (f"/{ordinal}" if len(found) > 1 else ""))
                inner[leaf] = min(_run_length(occurrences[0]), inner.get(leaf, table.size(axis)))
    groups, pinned = [], []
    for leaf, slices in owned.items():
        reason = table.pin_reason(leaf)
        if reason is None:
            groups.append(Group(names[leaf], leaf, table.size(leaf), tuple(slices), inner[leaf]))
        elif any(_is_channel(item) for item in slices):
            unique = tuple(dict.fromkeys(item.tensor for item in slices))
            pinned.append(PinnedGroup(names[leaf], table.size(leaf), unique, reason))
    return Structure(
        table,
        tensors,
        tuple(groups),
        tuple(pinned),
        _live_edits(reading),
        tuple(reading.work),
        reading.raw.parameters,
        _sums(reading),
    )


def _sums(reading: Reading) -> tuple[Sum, ...]:
    results = {node.name: node.outputs[0].name or "" for node in reading.raw.model.graph}
    return tuple(
        Sum(item.node, item.axis, reading.axes[results[item.node]])
        for item in reading.contractions
        if results[item.node] in reading.axes
    )


def _by_first_use(reading: Reading, tensors: dict[str, Axes]) -> list[str]:
    """Return the parameters in graph order, matrices and kernels first: they name the groups they produce."""
    order = [value.name for node in reading.raw.model.graph for value in values_read(node)]
    known = [name for name in dict.fromkeys(order) if name in tensors and name in reading.raw.weights]
    return [name for name in known if len(tensors[name]) > 1] + [name for name in known if len(tensors[name]) < 2]


def _is_channel(item: TensorSlice) -> bool:
    """Return whether the slice is of channels; kernel positions are pinned in every network and not reported."""
    return item.axis < 2


def _run_length(coordinates: IntArray) -> int:
    """Return how many consecutive positions share the first index that occurs."""
    covered = coordinates[coordinates >= 0]
    changes = np.flatnonzero(covered != covered[0])
    return int(changes[0]) if changes.size else int(covered.size)


def _live_edits(reading: Reading) -> tuple[Edit, ...]:
    """Return the edits without those that no group can make necessary."""
    table = reading.table

    def can_change(axis: Axis) -> bool:
        return any(table.pin_reason(leaf) is None and table.size(leaf) > 1 for leaf in table.leaves(axis))

    live: list[Edit] = []
    for edit in reading.edits:
        axes = tuple(axis for axis in _axes_of(edit) if can_change(axis))
        if axes:
            live.append(edit if isinstance(edit, (OperandEdit, AttributeEdit)) else replace(edit, axes=axes))
    return tuple(live)
