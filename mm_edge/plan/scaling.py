"""Widths for a budget, from the sparsity ranges: all ranges are scaled together until the cost fits.

    rho_l(a) = lo_l + a (hi_l - lo_l)        for every layer l

One `a` for all layers is found by bisection; it may lie below 0 or above 1 where the budget asks for less or more than
the ranges hold. The widths are then rounded to those the target allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mm_edge.graph.axes import Axis
from mm_edge.graph.costs import Cost
from mm_edge.graph.groups import Structure
from mm_edge.graph.widths import AllowedWidths, Counts, meet_budget, solve_widths
from mm_edge.records import Layer, SparsityRange

# How far below its budget a candidate may stay before the target's channel multiples are given up for it.
BUDGET_SLACK = 0.03
# Bisections; each halves the interval that `a` lies in.
HALVINGS = 20


def plan_budget(
    structure: Structure,
    layers: Sequence[Layer],
    allowed: Sequence[AllowedWidths],
    ranges: Mapping[str, SparsityRange],
    fraction: float,
    cost: Cost | None = None,
) -> tuple[dict[str, float], Counts]:
    """Return sparsities and widths whose cost is at most `fraction` of dense, and as near as widths allow.

    Args:
        structure: the coupled groups.
        layers: the prunable layers.
        allowed: the allowed widths of each group. Where their steps miss the budget by more than BUDGET_SLACK the
            steps are halved, down to single indices.
        ranges: the allowed sparsity of each layer.
        fraction: the share of the dense cost, in (0, 1).
        cost: what is spent; multiply-adds without.
    """
    cost = structure.mac_cost if cost is None else cost
    budget = fraction * cost.total()
    sizes = {item.leaf: item.widths[-1] for item in allowed}

    def sparsity(a: float) -> dict[str, float]:
        return {fqn: min(max(r.lo + a * (r.hi - r.lo), 0.0), 0.99) for fqn, r in ranges.items()}

    def wanted(a: float) -> dict[Axis, float]:
        return {leaf: part * sizes[leaf] for leaf, part in solve_widths(structure, layers, sparsity(a)).items()}

    low, high = _lowest_share(ranges), _highest_share(ranges)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if cost.total(wanted(middle)) > budget:
            low = middle
        else:
            high = middle
    goal = wanted(high)
    while True:
        counts = {item.leaf: item.nearest(goal[item.leaf]) for item in allowed}
        counts = meet_budget(cost, allowed, counts, goal, budget)
        spent = cost.total(counts)
        finer = tuple(item.halved() for item in allowed)
        if budget * (1 - BUDGET_SLACK) <= spent <= budget or finer == tuple(allowed):
            return sparsity(high), counts
        allowed = finer


def _lowest_share(ranges: Mapping[str, SparsityRange]) -> float:
    """Return the `a` at which the last range reaches zero sparsity."""
    return min((-r.lo / (r.hi - r.lo) for r in ranges.values() if r.hi > r.lo), default=0.0)


def _highest_share(ranges: Mapping[str, SparsityRange]) -> float:
    """Return an `a` at which every range with a width is at full sparsity."""
    return max(((1 - r.lo) / (r.hi - r.lo) for r in ranges.values() if r.hi > r.lo), default=1.0)
