"""What removing a whole residual branch costs, and which branches to offer for removal under a budget.

Each branch is removed alone, the network without it is screened by the closed form (a constant takes the branch's
place, and what follows is solved again), and the held-back images give its divergence d(b). Branches are ranked by

    d(b) / saved(b),      saved(b) the part of the budget's cost that removing b saves

and offered as sets: none, the first, the first two, ... The caller screens a candidate for each set and takes the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.costs import Cost
from mm_edge.graph.depth import Branch
from mm_edge.graph.groups import Structure
from mm_edge.graph.partial import Frontier, narrowest
from mm_edge.graph.widths import AllowedWidths, Counts
from mm_edge.progress import Advance
from mm_edge.recover.closed_form.context import RecoveryContext, pruned_graph
from mm_edge.recover.closed_form.judging import divergence
from mm_edge.recover.closed_form.sensitivity import HOPELESS, Sensitivity, allocate, select_by_sensitivity
from mm_edge.recover.closed_form.solve import screen

# The most branches that one candidate loses.
MOST_REMOVED = 3


@dataclass(frozen=True)
class MeasuredBranch:
    """A branch and the divergence of the network without it, in nats."""

    branch: Branch
    kl: float


def empty(structure: Structure, branches: Iterable[Branch]) -> Keep:
    """Return the indices that stay of the groups in `branches` when these are removed: none of each."""
    leaves = [leaf for branch in branches for leaf in branch.leaves]
    return {leaf: np.zeros(structure.table.size(leaf), dtype=np.bool_) for leaf in leaves}


def measure_branches(
    context: RecoveryContext,
    branches: Sequence[Branch],
    progress: Advance | None = None,
    known: Sequence[float] = (),
    keep: Callable[[Sequence[float]], None] | None = None,
) -> tuple[MeasuredBranch, ...]:
    """Return each branch with the divergence of the network without it, in the order of `branches`.

    Args:
        context: of the dense network.
        branches: in the order of the graph.
        progress: called with (branches measured, of how many).
        known: the divergences of the first branches, which were measured before and are not measured again.
        keep: called after each measured branch with the divergences of all up to it.
    """
    graph = context.graph
    frontier = Frontier(graph, context.images, context.held_back)
    found = list(known)
    for done, branch in enumerate(branches):
        first = min(at for name in branch.tensors for at in graph.read_at.get(name, [len(graph.nodes)]))
        frontier.advance_(graph, narrowest(graph, frontier.position, max(first, frontier.position)), context.threads)
        if done >= len(known):
            left = empty(context.structure, (branch,))
            pruned = pruned_graph(context, left, screen(context, left))
            found.append(divergence(context, pruned, frontier))
            if keep is not None:
                keep(found)
        if progress is not None:
            progress(done + 1, len(branches))
    return tuple(MeasuredBranch(branch, kl) for branch, kl in zip(branches, found, strict=True))


def offers(measured: Sequence[MeasuredBranch], saved: Callable[[Branch], float]) -> list[tuple[Branch, ...]]:
    """Return the sets of branches to try removing, the empty set first.

    `saved` returns what removing a branch saves, in the budget's units; a branch that saves nothing is not offered. The
    sets end before the sum of their divergences exceeds HOPELESS, with at most MOST_REMOVED branches.
    """
    worth = [(item, saved(item.branch)) for item in measured]
    ranked = [item for item, gain in sorted(worth, key=lambda pair: pair[0].kl / max(pair[1], 1e-30)) if gain > 0]
    sets: list[tuple[Branch, ...]] = [()]
    spent = 0.0
    for item in ranked[:MOST_REMOVED]:
        spent += item.kl
        if spent > HOPELESS:
            break
        sets.append((*sets[-1], item.branch))
    return sets


def allocate_rest(
    structure: Structure,
    cost: Cost,
    sensitivities: Mapping[Axis, Sensitivity],
    removed: Sequence[Branch],
    budget: float,
    allowed: Sequence[AllowedWidths],
) -> Keep:
    """Return the indices that stay when `removed` branches and narrower groups bring the `cost` to `budget`.

    Args:
        structure: the coupled groups.
        cost: what the budget limits.
        sensitivities: of the groups that may become narrower.
        removed: the branches that are removed.
        budget: the highest cost, in the units of `cost`.
        allowed: the allowed widths of every group.
    """
    gone = empty(structure, removed)
    left = {leaf: item for leaf, item in sensitivities.items() if leaf not in gone}
    start: Counts = dict.fromkeys(gone, 0)
    counts = allocate(cost, left, budget, allowed, start)
    whole = {group.leaf: np.ones(group.size, dtype=np.bool_) for group in structure.groups}
    return {**whole, **select_by_sensitivity(left, counts), **gone}
