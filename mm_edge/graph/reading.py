"""What one pass over the raw graph records: the axes of every value, edits, work and contractions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from mm_edge.graph.axes import Axis, AxisTable
from mm_edge.graph.export import RawGraph, constant_array

Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class SizeTerm:
    """A size in the compact graph: a constant plus the kept sizes of some axes."""

    constant: int
    axes: Axes = ()


@dataclass(frozen=True)
class OperandEdit:
    """Operand `operand` of `node` becomes the int64 vector of `sizes`."""

    node: str
    operand: int
    sizes: tuple[SizeTerm, ...]


@dataclass(frozen=True)
class AttributeEdit:
    """Attribute `attribute` of `node` becomes the kept size of `axis`."""

    node: str
    attribute: str
    axis: Axis


@dataclass(frozen=True)
class MeanEdit:
    """The mean taken by `node` over `axes` still divides by their dense size: multiply by kept / dense."""

    node: str
    axes: Axes


@dataclass(frozen=True)
class NormEdit:
    """The LayerNormalization `node` still normalises over the dense size of `axes`; see norms.py."""

    node: str
    axes: Axes


Edit = OperandEdit | AttributeEdit | MeanEdit | NormEdit


@dataclass(frozen=True)
class CostTerm:
    """The cost of one node, for instance multiply-adds: `constant` times the product of the kept sizes of `axes`."""

    node: str
    axes: Axes
    constant: float = 1


@dataclass(frozen=True)
class Contraction:
    """A sum over `axis`, to which the removed indices must add zero.

    It is exact only where at least one of the operands is zero at them (E8).
    """

    node: str
    axis: Axis
    operands: tuple[str, ...]


@dataclass
class Reading:
    """The state of the pass; rules change it through its methods alone.

    With `prune_norms` a LayerNormalization may lose channels, at the cost that norms.py states; otherwise it pins them.
    """

    raw: RawGraph
    prune_norms: bool = False
    table: AxisTable = field(default_factory=AxisTable)
    axes: dict[str, Axes] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    work: list[CostTerm] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)

    def axes_of(self, value: ir.Value | None) -> Axes:
        """Return the axes of `value`; a tensor seen for the first time gets variables of its own."""
        if value is None or value.name is None:
            return ()
        if value.name not in self.axes:
            self.axes[value.name] = tuple(self.table.fresh(size) for size in shape_of(value))
        return self.axes[value.name]

    def set_axes(self, value: ir.Value, axes: Sequence[Axis]) -> None:
        """Record the axes of a node's output, checking them against its inferred shape.

        Raises:
            StructureMismatch: the shapes differ, so the rule does not describe this node.
        """
        if value.shape is not None and tuple(self.table.size(axis) for axis in axes) != shape_of(value):
            raise StructureMismatch(f"sizes {[self.table.size(a) for a in axes]} for shape {value.shape}")
        assert value.name is not None
        self.axes[value.name] = tuple(axes)

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """Return the array of a constant that is not a weight, or None."""
        if value is None or value.name in self.raw.parameters or value.name in self.raw.buffers:
            return None
        return constant_array(value)

    def pin(self, axes: Sequence[Axis], reason: str) -> None:
        """Pin each of `axes` with `reason`."""
        for axis in axes:
            self.table.pin(axis, reason)

    def reshape(self, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
        """Return the axes of a row-major reshape of a tensor with `axes` to `sizes`."""
        return self.table.split_product(self.table.product(axes), sizes)

    def broadcast(self, operands: Sequence[Axes]) -> list[Axis]:
        """Unify operands under ONNX's broadcasting and return the axes of the result.

        An axis of size one beside a wider one is repeated, not coupled.
        """
        rank = max((len(axes) for axes in operands), default=0)
        result: list[Axis] = []
        for position in range(1, rank + 1):
            here = [axes[-position] for axes in operands if len(axes) >= position]
            wide = [axis for axis in here if self.table.size(axis) != 1]
            for axis in wide[1:]:
                self.table.unify(wide[0], axis)
            result.append(wide[0] if wide else here[0])
        return result[::-1]


class StructureMismatch(Exception):
    """A rule does not describe a node, which is then treated as an unknown operator."""


def is_static(value: ir.Value) -> bool:
    """Return whether every size of `value` is a known integer."""
    return value.shape is not None and all(isinstance(size, int) for size in value.shape)


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Return the static shape of `value`.

    Raises:
        StructureMismatch: the shape is unknown or symbolic.
    """
    if value.shape is None:
        raise StructureMismatch(f"the shape of '{value.name}' is not known")
    sizes = tuple(size for size in value.shape if isinstance(size, int))
    if len(sizes) != len(value.shape):
        raise StructureMismatch(f"the shape {value.shape} of '{value.name}' is not static")
    return sizes
