"""What widths cost: a sum of products of kept sizes.

    cost(counts) = fixed + sum_i constant_i * prod_(a in axes_i) kept_size(a, counts)

Multiply-adds are such a sum over the nodes, parameters one over the tensors, and a linear model of time one over the
nodes again, its constants in milliseconds. Budgets are met with any such cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mm_edge.graph.axes import Axis, AxisTable
from mm_edge.graph.reading import CostTerm


@dataclass(frozen=True)
class Cost:
    """A cost that depends on how many indices each leaf keeps; each of `items` names its node or tensor."""

    table: AxisTable
    items: tuple[CostTerm, ...]
    fixed: float = 0.0

    def total(self, counts: Mapping[Axis, float] | None = None) -> float:
        """Return the cost of `counts`, fractions allowed; leaves that are not named stay whole."""
        kept = dict(counts or {})
        return self.fixed + sum(self.of_item(item, kept) for item in self.items)

    def of_item(self, item: CostTerm, counts: dict[Axis, float]) -> float:
        """Return what one item costs."""
        product = float(item.constant)
        for axis in item.axes:
            product *= self.table.kept_size(axis, counts)
        return product


class RunningCost:
    """A cost whose counts change one leaf at a time; only the items that contain the leaf are computed again."""

    def __init__(self, cost: Cost, counts: Mapping[Axis, int]) -> None:
        """Start from `counts`."""
        self.counts = dict(counts)
        self._cost = cost
        self._touched: dict[Axis, list[int]] = {}
        for index, item in enumerate(cost.items):
            for leaf in {leaf for axis in item.axes for leaf in cost.table.leaves(axis)}:
                self._touched.setdefault(leaf, []).append(index)
        self._each = [self._of(index, {}) for index in range(len(cost.items))]
        self.total = cost.fixed + math.fsum(self._each)

    def change(self, leaf: Axis, width: int) -> float:
        """Return by how much the total changes when `leaf` gets `width`."""
        return math.fsum(self._of(index, {leaf: width}) - self._each[index] for index in self._touched.get(leaf, ()))

    def apply(self, leaf: Axis, width: int) -> None:
        """Give `leaf` the `width`."""
        self.counts[leaf] = width
        for index in self._touched.get(leaf, ()):
            self._each[index] = self._of(index, {})
        self.total = self._cost.fixed + math.fsum(self._each)

    def _of(self, index: int, change: dict[Axis, int]) -> float:
        counts: dict[Axis, float] = {**self.counts, **change}
        return self._cost.of_item(self._cost.items[index], counts)
