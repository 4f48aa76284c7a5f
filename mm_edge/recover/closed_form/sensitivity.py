"""Allocation of widths under a budget by measured sensitivity (E9 in docs/method.md).

Each group is pruned alone at a few widths, recovered by the closed form from the dense moments, and run on the
held-back images. This gives the divergence KL(g, c) of group g at c indices kept. Between the measured widths, log KL
is interpolated linearly in the log of the group's cumulative brain-surgeon error, which is known at every width. Under
a budget (of multiply-adds, parameters or modelled time) one group after another then goes to a narrower allowed width.
The next move is the one with the least divergence per cost saved, up to LOOKAHEAD allowed widths further down:

    argmin_(g, c)  [KL(g, c) - KL(g, now)] / [cost(now) - cost(g at c)]

Each group is measured with two selections: brain surgeon with the usual ridge, and |W_j|^2 with the gentle ridge. A
candidate uses the one that was better at the measured width nearest to its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Array, Arrays, BoolArray
from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.costs import Cost, RunningCost
from mm_edge.graph.groups import Group, Structure
from mm_edge.graph.partial import Frontier, RunnableGraph, narrowest
from mm_edge.graph.widths import AllowedWidths, Counts
from mm_edge.progress import Advance
from mm_edge.recover.closed_form.context import RecoveryContext, pruned_graph
from mm_edge.recover.closed_form.judging import divergence
from mm_edge.recover.closed_form.orders import energy_order, readers_of, surgeon_order
from mm_edge.recover.closed_form.solve import GENTLE_RIDGE, screen
from mm_edge.recover.closed_form.surgeon import USUAL_RIDGE, Order

# The pruning ratios at which a group is measured, and the divergence in nats after which no further one is.
RATIOS = (0.25, 0.5, 0.75, 0.9)
HOPELESS = 0.7
LOOKAHEAD = 6
# The least share of its indices that a group keeps.
LEAST_KEPT = 0.1
# The least error and divergence that a logarithm is taken of.
FLOOR = 1e-6


@dataclass(frozen=True)
class Measured:
    """The divergence of the network with one group alone pruned, by the better selection.

    Attributes:
        count: how many indices the group keeps.
        kl: the divergence on the held-back images, in nats.
        select: "obs" for brain surgeon, "energy" for |W_j|^2.
        ridge: the lambda that its readers were solved with.
    """

    count: int
    kl: float
    select: str
    ridge: float


@dataclass(frozen=True)
class Sensitivity:
    """One group's measurements and its two orders of removal.

    Attributes:
        leaf: the group's axis.
        surgeon: brain surgeon's order.
        energy: the order by |W_j|^2.
        points: the measurements, by falling count; at least one.
    """

    leaf: Axis
    surgeon: Order
    energy: Order
    points: tuple[Measured, ...]

    def kl(self, count: int) -> float:
        """Return the divergence in nats at `count` indices kept: interpolated, or extrapolated beyond the points."""
        size = len(self.surgeon.removed)
        if count >= size:
            return 0.0
        error = np.log(max(self.surgeon.error_at(count), FLOOR))
        known = [(np.log(max(self.surgeon.error_at(p.count), FLOOR)), np.log(max(p.kl, FLOOR))) for p in self.points]
        if len(known) == 1 or error <= known[0][0]:
            slope = _slope(known[0], known[1]) if len(known) > 1 else 1.0
            return float(np.exp(known[0][1] + max(slope, 1.0) * (error - known[0][0])))
        if error >= known[-1][0]:
            return float(np.exp(known[-1][1] + max(_slope(known[-2], known[-1]), 1.0) * (error - known[-1][0])))
        return float(np.exp(np.interp(error, [x for x, _ in known], [y for _, y in known])))

    def choice(self, count: int) -> Measured:
        """Return the measurement at the width nearest to `count`."""
        return min(self.points, key=lambda point: abs(math.log(point.count / count)))

    def keep(self, count: int) -> BoolArray:
        """Return the mask (size,) that keeps `count` indices, by the selection that measured better near it."""
        order = self.surgeon if self.choice(count).select == "obs" else self.energy
        return order.keep(count)


def measurable(context: RecoveryContext, allowed: Sequence[AllowedWidths]) -> list[Group]:
    """Return the groups that have readers and more than one allowed width, in the order of the graph."""
    several = {item.leaf for item in allowed if len(item.widths) > 1}
    groups = [item for item in context.structure.groups if item.leaf in several and readers_of(context, item)]
    return sorted(groups, key=lambda group: first_use(context.graph, group))


def measure_sensitivities(
    context: RecoveryContext,
    allowed: Sequence[AllowedWidths],
    progress: Advance | None = None,
    known: Mapping[Axis, Sensitivity] | None = None,
    keep: Callable[[Mapping[Axis, Sensitivity]], None] | None = None,
) -> dict[Axis, Sensitivity]:
    """Return the sensitivity of every group that is `measurable`.

    Args:
        context: of the dense network.
        allowed: the allowed widths of the groups.
        progress: called with (groups measured, of how many).
        known: sensitivities that were measured before and are not measured again.
        keep: called after each measured group with all that is known by then.
    """
    graph = context.graph
    widths = {item.leaf: item.widths for item in allowed}
    groups = measurable(context, allowed)
    frontier = Frontier(graph, context.images, context.held_back)
    found = dict(known or {})
    for done, group in enumerate(groups):
        # Known groups are walked through too, so that the others are measured from the same positions as ever.
        frontier.advance_(graph, narrowest(graph, frontier.position, first_use(graph, group)), context.threads)
        if group.leaf not in found:
            found[group.leaf] = _measure(context, group, widths[group.leaf], frontier)
            if keep is not None:
                keep(found)
        if progress is not None:
            progress(done + 1, len(groups))
    return found


def to_arrays(structure: Structure, sensitivities: Mapping[Axis, Sensitivity]) -> Arrays:
    """Return measured sensitivities as named arrays, for the run directory; `from_arrays` reads them."""
    numbers = {group.leaf: number for number, group in enumerate(structure.groups)}
    arrays: Arrays = {"groups": np.array([numbers[leaf] for leaf in sensitivities], np.int64)}
    for leaf, item in sensitivities.items():
        for name, order in (("surgeon", item.surgeon), ("energy", item.energy)):
            arrays[f"{numbers[leaf]}/{name}/removed"] = order.removed
            arrays[f"{numbers[leaf]}/{name}/error"] = order.error
        points = [(point.count, point.kl, point.select == "obs", point.ridge) for point in item.points]
        arrays[f"{numbers[leaf]}/points"] = np.array(points, dtype=np.float64)
    return arrays


def from_arrays(structure: Structure, arrays: Mapping[str, Array]) -> dict[Axis, Sensitivity]:
    """Return what `to_arrays` was given."""
    found: dict[Axis, Sensitivity] = {}
    for number in arrays["groups"]:
        surgeon, energy = (
            Order(arrays[f"{number}/{name}/removed"], arrays[f"{number}/{name}/error"])
            for name in ("surgeon", "energy")
        )
        points = tuple(
            Measured(int(count), float(kl), "obs" if by_surgeon else "energy", float(ridge))
            for count, kl, by_surgeon, ridge in arrays[f"{number}/points"]
        )
        leaf = structure.groups[number].leaf
        found[leaf] = Sensitivity(leaf, surgeon, energy, points)
    return found


def first_use(graph: RunnableGraph, group: Group) -> int:
    """Return the position of the first node that reads a tensor of `group`."""
    return min(at for name in group.tensors for at in graph.read_at.get(name, [len(graph.nodes)]))


def _measure(context: RecoveryContext, group: Group, widths: Sequence[int], frontier: Frontier) -> Sensitivity:
    surgeon, energy = surgeon_order(context, group), energy_order(context, group)
    assert surgeon is not None and energy is not None
    points: list[Measured] = []
    counts = [min(widths[:-1], key=lambda width: abs(width - (1 - ratio) * group.size)) for ratio in RATIOS]
    for count in dict.fromkeys(counts):
        tried: list[Measured] = []
        pruned: RunnableGraph | None = None
        for select, order, ridge in (("obs", surgeon, USUAL_RIDGE), ("energy", energy, GENTLE_RIDGE)):
            keep = {group.leaf: order.keep(count)}
            tensors = screen(context, keep, {consumer.weight: ridge for consumer, _ in readers_of(context, group)})
            pruned = pruned_graph(context, keep, tensors, pruned)
            tried.append(Measured(count, divergence(context, pruned, frontier), select, ridge))
        points.append(min(tried, key=lambda item: item.kl))
        if points[-1].kl > HOPELESS:
            break
    return Sensitivity(group.leaf, surgeon, energy, tuple(points))


def allocate(
    cost: Cost,
    sensitivities: Mapping[Axis, Sensitivity],
    budget: float,
    allowed: Sequence[AllowedWidths],
    start: Counts | None = None,
) -> Counts:
    """Return counts whose `cost` is at most `budget`, or the narrowest that are allowed.

    The last move can save more than the budget asks for. What is left over goes to the groups that gain most from it.
    Groups that were not measured keep all their indices.

    Args:
        cost: what the budget limits.
        sensitivities: of the groups that may become narrower.
        budget: the highest cost, in the units of `cost`.
        allowed: the allowed widths of every group.
        start: counts to start from instead of the dense ones, for the groups that have fewer already.
    """
    widths = {item.leaf: item.widths for item in allowed}
    costs = RunningCost(cost, {leaf: items[-1] for leaf, items in widths.items()} | dict(start or {}))
    while costs.total > budget:
        move = _best_narrowing(costs, sensitivities, widths, budget)
        if move is None:
            break
        costs.apply(*move)
    while (back := _best_widening(costs, sensitivities, widths, budget, start or {})) is not None:
        costs.apply(*back)
    return costs.counts


def select_by_sensitivity(sensitivities: Mapping[Axis, Sensitivity], counts: Counts) -> Keep:
    """Return the indices that stay in every measured group that loses some."""
    return {
        leaf: sensitivities[leaf].keep(count)
        for leaf, count in counts.items()
        if leaf in sensitivities and count < len(sensitivities[leaf].surgeon.removed)
    }


def _best_narrowing(
    costs: RunningCost, sensitivities: Mapping[Axis, Sensitivity], widths: Mapping[Axis, Sequence[int]], budget: float
) -> tuple[Axis, int] | None:
    """Return the group and the count that raise the divergence least per cost saved; None if nothing is left to save.

    Cost that is saved beyond the budget does not count.
    """
    best: tuple[float, Axis, int] | None = None
    for leaf, item in sensitivities.items():
        now = costs.counts[leaf]
        below = [width for width in widths[leaf] if LEAST_KEPT * widths[leaf][-1] <= width < now]
        kl = item.kl(now)
        for count in below[::-1][:LOOKAHEAD]:
            saved = min(-costs.change(leaf, count), costs.total - budget)
            if saved <= 0:
                continue
            rate = (item.kl(count) - kl) / saved
            if best is None or rate < best[0]:
                best = (rate, leaf, count)
    return None if best is None else (best[1], best[2])


def _best_widening(
    costs: RunningCost,
    sensitivities: Mapping[Axis, Sensitivity],
    widths: Mapping[Axis, Sequence[int]],
    budget: float,
    start: Counts,
) -> tuple[Axis, int] | None:
    """Return the group and the count within `budget` that lower the divergence most; None if none does.

    A group does not become wider than it was in `start`.
    """
    best: tuple[float, Axis, int] | None = None
    for leaf, item in sensitivities.items():
        now = costs.counts[leaf]
        for count in [width for width in widths[leaf] if now < width <= start.get(leaf, width)]:
            if costs.total + costs.change(leaf, count) > budget:
                break
            gain = item.kl(now) - item.kl(count)
            if gain > 0 and (best is None or gain > best[0]):
                best = (gain, leaf, count)
    return None if best is None else (best[1], best[2])


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / max(right[0] - left[0], 1e-9)
