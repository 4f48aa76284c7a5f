"""From E7's widths to widths that a target allows, each one of the two around E7's.

Groups whose width the target leaves next to no choice of, those of one allowed width and those of at most FEW indices
(heads, convolution groups), are rounded first. E7 is solved again for the others, so that they make good for it. With
w[g] the width of group g then, and w-[g] <= w[g] <= w+[g] the allowed widths around it, every n[g] is w-[g] or w+[g].
Which of the two makes the following small:

    |macs(n) - macs(e)| / macs(dense) + |weights(n) - weights(e)| / weights(dense) + STRAY mean_g |log(n[g] / w[g])|

where e is E7's solution where every width can be had. First every group goes to the nearer of the two, then single
groups go to their other width while that helps, then two at a time. The multiply-adds and the weights of strategies are
thus ordered as those that E7 asks for, as far as the steps of the allowed widths can tell them apart. The last term
decides between choices of like cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mm_edge.graph.axes import Axis
from mm_edge.graph.costs import Cost, RunningCost
from mm_edge.graph.groups import Structure
from mm_edge.graph.reading import CostTerm
from mm_edge.graph.widths import AllowedWidths, Counts, solve_widths
from mm_edge.records import Layer

FEW = 4
STRAY = 0.03
# Steps of two groups are tried only where the budgets are missed by more than this share of the dense network's.
CLOSE = 0.002
# What is less is rounding of floating point numbers.
_LEAST_GAIN = 1e-9


@dataclass(frozen=True)
class WidthGoals:
    """What E7 asks for on a target.

    Attributes:
        widths: the width of each group, given those that the target leaves no choice of; not rounded.
        macs: the multiply-adds of E7's solution where every width can be had.
        weights: the weights of the prunable layers in that solution.
    """

    widths: dict[Axis, float]
    macs: float
    weights: float


def weight_cost(structure: Structure, layers: Sequence[Layer]) -> Cost:
    """Return the weights of the prunable layers as a cost of widths."""
    known = [layer.fqn for layer in layers if layer.fqn in structure.tensor_axes]
    return Cost(structure.table, tuple(CostTerm(fqn, structure.tensor_axes[fqn]) for fqn in known))


def find_goals(
    structure: Structure, layers: Sequence[Layer], sparsity: Mapping[str, float], allowed: Sequence[AllowedWidths]
) -> WidthGoals:
    """Return E7's widths and their cost; groups of few indices have a whole number of them."""
    sizes = {item.leaf: item.widths[-1] for item in allowed}

    def solve(fixed: Mapping[Axis, float]) -> dict[Axis, float]:
        parts = {leaf: width / sizes[leaf] for leaf, width in fixed.items()}
        return {leaf: part * sizes[leaf] for leaf, part in solve_widths(structure, layers, sparsity, parts).items()}

    asked = solve({})
    coarse = [item for item in allowed if len(item.widths) == 1 or item.widths[-1] <= FEW]
    fixed = {item.leaf: float(item.nearest(asked[item.leaf])) for item in coarse}
    widths = solve(fixed) if fixed else asked
    return WidthGoals(widths, structure.macs(asked), weight_cost(structure, layers).total(asked))


def round_widths(
    structure: Structure, layers: Sequence[Layer], sparsity: Mapping[str, float], allowed: Sequence[AllowedWidths]
) -> Counts:
    """Return how many indices each group keeps: one of the two `allowed` widths around what E7 asks for."""
    goals = find_goals(structure, layers, sparsity, allowed)
    rounding = _Rounding(structure, layers, allowed, goals)
    rounding.settle_()
    return rounding.counts


class _Aim:
    """A cost that is brought near to a goal. Errors are shares of the dense network's cost."""

    def __init__(self, cost: Cost, counts: Counts, goal: float) -> None:
        self.running = RunningCost(cost, counts)
        self._goal = goal
        self._dense = max(cost.total(), 1.0)

    def error(self, change: float = 0.0) -> float:
        return abs(self.running.total + change - self._goal) / self._dense


class _Rounding:
    """Counts, each one of the two allowed widths around what is wanted, that are changed from the one to the other."""

    def __init__(
        self, structure: Structure, layers: Sequence[Layer], allowed: Sequence[AllowedWidths], goals: WidthGoals
    ) -> None:
        self._wanted = goals.widths
        around = {item.leaf: item.around(goals.widths[item.leaf]) for item in allowed}
        self._both = {leaf: sum(pair) for leaf, pair in around.items() if pair[0] < pair[1]}
        nearest = {item.leaf: item.nearest(goals.widths[item.leaf]) for item in allowed}
        costs = ((structure.mac_cost, goals.macs), (weight_cost(structure, layers), goals.weights))
        self._aims = [_Aim(cost, nearest, goal) for cost, goal in costs]

    @property
    def counts(self) -> Counts:
        return self._aims[0].running.counts

    def settle_(self) -> None:
        """Change groups alone, then two at a time, until nothing is nearer to the goals."""
        while self._change_one_() or (self._error() > CLOSE and self._change_two_()):
            pass

    def _change_one_(self) -> bool:
        """Change the group that helps most; return whether one helps."""
        gain, leaf = self._find_best()
        if leaf is None or gain < _LEAST_GAIN:
            return False
        self._flip_(leaf)
        return True

    def _change_two_(self) -> bool:
        """Change the two groups that help most together; return whether any two help."""
        found: tuple[float, tuple[Axis, ...]] = (_LEAST_GAIN, ())
        for first in self._both:
            own = self._gain(first)
            self._flip_(first)
            gain, second = self._find_best(without=first)
            self._flip_(first)
            if second is not None and own + gain > found[0]:
                found = (own + gain, (first, second))
        for leaf in found[1]:
            self._flip_(leaf)
        return bool(found[1])

    def _find_best(self, without: Axis | None = None) -> tuple[float, Axis | None]:
        """Return the largest gain of one change and its group; None where there is no group."""
        gains = [(self._gain(leaf), leaf) for leaf in self._both if leaf != without]
        return max(gains, key=lambda item: item[0]) if gains else (-math.inf, None)

    def _gain(self, leaf: Axis) -> float:
        """Return by how much the formula at the top of the file falls when `leaf` changes to its other width."""
        other = self._both[leaf] - self.counts[leaf]
        error = sum(aim.error(aim.running.change(leaf, other)) for aim in self._aims)
        nearer = self._stray(leaf, self.counts[leaf]) - self._stray(leaf, other)
        return self._error() - error + STRAY * nearer / len(self._wanted)

    def _flip_(self, leaf: Axis) -> None:
        other = self._both[leaf] - self.counts[leaf]
        for aim in self._aims:
            aim.running.apply(leaf, other)

    def _error(self) -> float:
        return sum(aim.error() for aim in self._aims)

    def _stray(self, leaf: Axis, width: int) -> float:
        return abs(math.log(width / self._wanted[leaf]))
