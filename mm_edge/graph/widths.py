"""From a sparsity per layer to a width per coupled group, and to the indices that stay.

E7. A layer that keeps a fraction k[a] of each axis a of its weight keeps their product of its weights:

    sum_a log k[a] = log(1 - rho(l))        for every layer l, in the least-squares sense,

weighted by the layer's multiply-adds, within k_min <= k <= 1, rho capped at 1 - k_min^2. An axis that is a product
of groups adds their logs; one made by concatenation is the share-weighted sum of its parts, so that

    d log k[axis] / d log k[group] = share * k[part] / k[axis],

which is iterated (Gauss-Newton; one round where nothing is concatenated). A pinned axis contributes 0, a
depthwise weight has one group and counts it once; both follow from the axes of the weight.

Widths are then rounded to widths that suit the target's kernels, never to zero: near E7's for a strategy
(rounding.py), or as near below a budget as they get (meet_budget).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Array, BoolArray, Float64Array
from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.costs import Cost, RunningCost
from mm_edge.graph.groups import Group, Structure
from mm_edge.records import Layer

Fractions = dict[Axis, float]
Counts = dict[Axis, int]

K_MIN = 0.1
RIDGE = 1e-8
ROUNDS = 12
SWEEPS = 200
# The part by which two widths may differ and are the same, because E7 is solved by iteration.
_SAME = 1e-4


def solve_widths(
    structure: Structure,
    layers: Sequence[Layer],
    sparsity: Mapping[str, float],
    fixed: Mapping[Axis, float] | None = None,
) -> Fractions:
    """Return the fraction of its indices that each group keeps (E7).

    Args:
        structure: the coupled groups.
        layers: the prunable layers.
        sparsity: rho per layer fqn, in [0, 1].
        fixed: fractions already decided for some groups.
    """
    fixed = dict(fixed or {})
    free = [group.leaf for group in structure.groups if group.leaf not in fixed]
    if not free:
        return fixed
    x = np.zeros(len(free))
    chosen = [layer for layer in layers if layer.fqn in structure.tensor_axes]
    weight = np.array([max(layer.macs, 1) for layer in chosen], dtype=np.float64)
    weight /= weight.sum()
    goal = np.log([1 - min(sparsity[layer.fqn], 1 - K_MIN**2) for layer in chosen])
    for _ in range(ROUNDS):
        before = x
        kept = {**fixed, **dict(zip(free, np.exp(x), strict=True))}
        value, slope = _linearise(structure, chosen, free, kept)
        x = _bounded_least_squares(slope, goal - value + slope @ x, weight)
        if np.abs(x - before).max() < 1e-4:
            break
    return {**fixed, **dict(zip(free, np.exp(x).tolist(), strict=True))}


def _linearise(
    structure: Structure, layers: Sequence[Layer], free: Sequence[Axis], kept: Fractions
) -> tuple[Float64Array, Float64Array]:
    """Return log of the kept fraction of each layer's weights, and its slopes by the free groups' logs."""
    column = {leaf: index for index, leaf in enumerate(free)}
    value = np.zeros(len(layers))
    slope = np.zeros((len(layers), len(free)))
    for row, layer in enumerate(layers):
        for axis in structure.tensor_axes[layer.fqn]:
            fraction, gradient = _fraction(structure, axis, kept)
            value[row] += math.log(fraction)
            for leaf, part in gradient.items():
                if leaf in column:
                    slope[row, column[leaf]] += part
    return value, slope


def _fraction(structure: Structure, axis: Axis, kept: Fractions) -> tuple[float, dict[Axis, float]]:
    """Return the kept fraction of `axis` and the derivatives of its log by the logs of its leaves."""
    table = structure.table
    root = table.find(axis)
    binding = table.binding(root)
    if binding is None:
        return (kept[root], {root: 1.0}) if root in kept else (1.0, {})
    parts = [(table.size(part), *_fraction(structure, part, kept)) for part in binding.parts]
    gradient: dict[Axis, float] = {}
    if binding.kind == "product":
        total = math.prod(fraction for _, fraction, _ in parts)
        shares = [1.0] * len(parts)
    else:
        total = sum(size * fraction for size, fraction, _ in parts) / table.size(root)
        shares = [size * fraction / table.size(root) / total for size, fraction, _ in parts]
    for share, (_, _, inner) in zip(shares, parts, strict=True):
        for leaf, part_slope in inner.items():
            gradient[leaf] = gradient.get(leaf, 0.0) + share * part_slope
    return total, gradient


def _bounded_least_squares(slope: Float64Array, goal: Float64Array, weight: Float64Array) -> Float64Array:
    """Minimise sum w (slope x - goal)^2 within log K_MIN <= x <= 0: a direct solution, then coordinate descent.

    A small ridge term makes the solution unique: groups that only occur together get equal values. Coordinate descent
    alone would change only the first of them, because the others then hardly change the error.
    """
    weighted = slope * weight[:, None]
    gram = slope.T @ weighted
    gram[np.diag_indices_from(gram)] += RIDGE * max(gram.diagonal().max(), 1e-12)
    right = weighted.T @ goal
    diagonal = gram.diagonal()
    x = _solve_clipped(gram, right)
    for _ in range(SWEEPS):
        moved = 0.0
        for index in range(len(x)):
            step = (right[index] - gram[index] @ x) / diagonal[index]
            after = min(0.0, max(math.log(K_MIN), x[index] + step))
            moved = max(moved, abs(after - x[index]))
            x[index] = after
        if moved < 1e-5:
            break
    return x


def _solve_clipped(gram: Float64Array, right: Float64Array) -> Float64Array:
    """Solve gram x = right; fix the entries beyond a bound at that bound and solve again for the rest."""
    low, high = math.log(K_MIN), 0.0
    x = np.zeros(len(right))
    free = np.ones(len(right), dtype=np.bool_)
    while free.any():
        rest = right[free] - gram[np.ix_(free, ~free)] @ x[~free]
        x[free] = np.linalg.solve(gram[np.ix_(free, free)], rest)
        outside = free & ((x < low) | (x > high))
        x = np.clip(x, low, high)
        if not outside.any():
            break
        free &= ~outside
    return x


@dataclass(frozen=True)
class AllowedWidths:
    """The widths a group may have, in ascending order: multiples of a step, and the group's size.

    Attributes:
        leaf: the group's axis variable.
        widths: numbers of kept indices.
    """

    leaf: Axis
    widths: tuple[int, ...]

    def nearest(self, wanted: float) -> int:
        """Return the width nearest to `wanted` by ratio."""
        return min(self.widths, key=lambda width: (abs(math.log(width / max(wanted, 1e-9))), -width))

    def around(self, wanted: float) -> tuple[int, int]:
        """Return the largest width up to `wanted` and the smallest from there on, one and the same at the ends."""
        slack = _SAME * wanted
        below = max((width for width in self.widths if width <= wanted + slack), default=self.widths[0])
        return below, min((width for width in self.widths if width >= wanted - slack), default=self.widths[-1])

    def below(self, width: int) -> int | None:
        """Return the next smaller width, or None."""
        position = bisect_left(self.widths, width)
        return self.widths[position - 1] if position > 0 else None

    def halved(self) -> AllowedWidths:
        """Return the widths with steps half as large; steps of one stay."""
        step = max(self.widths[0] // 2, 1)
        return AllowedWidths(self.leaf, (*range(step, self.widths[-1], step), self.widths[-1]))

    def above(self, width: int) -> int | None:
        """Return the next larger width, or None."""
        position = bisect_left(self.widths, width)
        return self.widths[position + 1] if position + 1 < len(self.widths) else None


def allowed_widths(group: Group, multiple: int) -> AllowedWidths:
    """Return the widths of `group` that keep the axes it is part of at multiples of `multiple`.

    One index of the group covers `group.inner` channels (a head, a convolution group). Where those alone make a
    multiple, the step is one index.
    """
    step = multiple // math.gcd(multiple, group.inner)
    return AllowedWidths(group.leaf, (*range(step, group.size, step), group.size))


def meet_budget(
    cost: Cost,
    allowed: Sequence[AllowedWidths],
    counts: Counts,
    wanted: Mapping[Axis, float],
    budget: float,
) -> Counts:
    """Return `counts` moved among the `allowed` widths until the `cost` is as near below `budget` as it gets.

    Each step takes the group whose distance from its `wanted` width grows least per change of the cost. The cost of the
    result is at most the budget, if any combination of allowed widths costs that little.
    """
    costs = RunningCost(cost, counts)
    while costs.total > budget:
        move = _best_move(costs, allowed, wanted, budget, up=False)
        if move is None:
            break
        costs.apply(*move[:2])
    while costs.total < budget:
        move = _best_move(costs, allowed, wanted, budget, up=True)
        if move is None:
            break
        costs.apply(*move[:2])
    return costs.counts


def _best_move(
    costs: RunningCost, allowed: Sequence[AllowedWidths], wanted: Mapping[Axis, float], budget: float, *, up: bool
) -> tuple[Axis, int, float] | None:
    """Return the step (leaf, width, change of the cost) that moves least away from the wanted widths, or None.

    A step goes down, or with `up` one up that stays within the budget.
    """
    found: tuple[float, Axis, int, float] | None = None
    for item in allowed:
        now = costs.counts[item.leaf]
        width = item.above(now) if up else item.below(now)
        if width is None:
            continue
        change = costs.change(item.leaf, width)
        if change == 0 or (up and costs.total + change > budget):
            continue
        strayed = abs(math.log(width / wanted[item.leaf])) - abs(math.log(now / wanted[item.leaf]))
        price = strayed / abs(change) if strayed > 0 else strayed * abs(change)
        if found is None or price < found[0]:
            found = (price, item.leaf, width, change)
    return None if found is None else found[1:]


def lead(structure: Structure, counts: Mapping[Axis, int]) -> Keep:
    """Return masks that keep the first `counts` indices of every group, for what depends on the numbers alone."""
    return {leaf: np.arange(structure.table.size(leaf)) < count for leaf, count in counts.items()}


def group_scores(structure: Structure, scores: Mapping[str, Array]) -> dict[Axis, Float64Array]:
    """Return each group's channel scores: the sum over its weight slices of their normalised scores (E1-E3).

    `scores` holds, per layer fqn, an array of the weight's shape; tensors without scores add nothing.
    """
    totals = {group.leaf: np.zeros(group.size) for group in structure.groups}
    sums: dict[tuple[str, int], Float64Array] = {}
    for group in structure.groups:
        for item in group.slices:
            if item.tensor not in scores:
                continue
            key = (item.tensor, item.axis)
            if key not in sums:
                array = scores[item.tensor]
                others = tuple(axis for axis in range(array.ndim) if axis != item.axis)
                sums[key] = array.sum(axis=others, dtype=np.float64)
            reached = item.coordinates >= 0
            totals[group.leaf] += np.bincount(item.coordinates[reached], sums[key][reached], minlength=group.size)
    return totals


def select_indices(counts: Counts, scores: Mapping[Axis, Float64Array]) -> Keep:
    """Return, per group, which indices stay: the highest scores, ties to the lower index."""
    keep: dict[Axis, BoolArray] = {}
    for leaf, count in counts.items():
        order = np.argsort(-scores[leaf], kind="stable")
        mask = np.zeros(len(order), dtype=np.bool_)
        mask[order[:count]] = True
        keep[leaf] = mask
    return keep


def sparsity_of(structure: Structure, layers: Sequence[Layer], keep: Keep) -> float:
    """Return 1 - kept / dense weights over the prunable layers."""
    kept = dense = 0
    for layer in layers:
        dense += layer.numel
        if layer.fqn in structure.tensor_axes:
            kept += math.prod(int(axis.sum()) for axis in structure.kept(layer.fqn, keep))
        else:
            kept += layer.numel
    return 1 - kept / dense if dense else 0.0
