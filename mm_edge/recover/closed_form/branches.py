"""What removing a residual branch whole costs, and which to offer beside width under a budget.

One branch after the other is removed alone, screened by the closed form (its constant becomes the branch's mean, what
follows is re-solved), and run on the held-back images: KL(b). Branches are offered in the order of KL by what removing
them saves of the budget's cost: none, the cheapest, the two cheapest, ...; how many a budget takes is decided on the
screened whole.
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
from mm_edge.recover.closed_form.context import RecoveryContext, divergence, pruned_network
from mm_edge.recover.closed_form.sensitivity import HOPELESS, Sensitivity, allocate, select_by_sensitivity
from mm_edge.recover.closed_form.solve import screen

MOST_REMOVED = 3


@dataclass(frozen=True)
class MeasuredBranch:
    """A branch and the divergence of the network without it, in nats."""

    branch: Branch
    kl: float


def empty(structure: Structure, branches: Iterable[Branch]) -> Keep:
    """Return the keep that removes `branches`."""
    leaves = [leaf for branch in branches for leaf in branch.leaves]
    return {leaf: np.zeros(structure.table.size(leaf), dtype=np.bool_) for leaf in leaves}


def measure_branches(
    context: RecoveryContext, branches: Sequence[Branch], progress: Advance | None = None
) -> tuple[MeasuredBranch, ...]:
    """Return each branch with what removing it alone costs, in graph order."""
    network = context.network
    frontier = Frontier(network, context.images, context.held_back)
    found = []
    for done, branch in enumerate(branches):
        first = min(at for name in branch.tensors for at in network.read_at.get(name, [len(network.nodes)]))
        frontier.advance_(
            network, narrowest(network, frontier.position, max(first, frontier.position)), context.threads
        )
        keep = empty(context.structure, (branch,))
        pruned = pruned_network(context, keep, screen(context, keep))
        found.append(MeasuredBranch(branch, divergence(context, pruned, frontier)))
        if progress is not None:
            progress(done + 1, len(branches))
    return tuple(found)


def offers(measured: Sequence[MeasuredBranch], saved: Callable[[Branch], float]) -> list[tuple[Branch, ...]]:
    """Return the sets of branches to try removing, none first; see the top of the file.

    `saved` says what removing a branch saves; one that saves nothing is not offered.
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
    """Return what stays when `removed` goes and widths, by sensitivity, bring the `cost` to `budget`."""
    gone = empty(structure, removed)
    left = {leaf: item for leaf, item in sensitivities.items() if leaf not in gone}
    start: Counts = dict.fromkeys(gone, 0)
    counts = allocate(cost, left, budget, allowed, start)
    whole = {group.leaf: np.ones(group.size, dtype=np.bool_) for group in structure.groups}
    return {**whole, **select_by_sensitivity(left, counts), **gone}
