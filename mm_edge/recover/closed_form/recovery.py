"""Recovery without training (E9, recipe A): choose which indices stay, re-solve who reads them, let images decide.

    selection   the plan's own signal, iterative brain surgeon, or |W_j|^2: per group what diverges least
    screening   readers re-solved from the dense network's moments, the same for all candidates
    walking     readers re-solved from the pruned network's own values, input to output

Every decision is by KL(dense || candidate) on calibration images that no moment has seen; no labels are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Arrays, BoolArray
from mm_edge.errors import UsageError
from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.groups import Group
from mm_edge.graph.partial import Frontier, narrowest
from mm_edge.graph.widths import Counts
from mm_edge.progress import Advance
from mm_edge.recover.closed_form.context import (
    Judged,
    RecoveryContext,
    energy_order,
    is_better,
    judge,
    pruned_network,
    readers_of,
    rescale,
    surgeon_order,
)
from mm_edge.recover.closed_form.sensitivity import Sensitivity, first_use
from mm_edge.recover.closed_form.solve import GENTLE, screen
from mm_edge.recover.closed_form.surgeon import RIDGE, Order
from mm_edge.recover.closed_form.walk import walk

SELECTIONS = ("signal", "obs", "auto")


@dataclass(frozen=True)
class Recovered:
    """A recovered candidate.

    Attributes:
        tensors: what changed, dense-shaped and masked, by name: weights, biases, running means.
        fitted: the same before the held-back images joined the last solving; what tuning starts from, as they judge it.
        keep: the indices that stay; other ones than planned where another selection was better.
        notes: what was decided, in words.
        kl_held_back: divergence from the dense network on calibration images no moment had seen, nats; measured
            before those images joined the last solving, after the answers were rescaled.
    """

    tensors: Arrays
    fitted: Arrays
    keep: Keep
    notes: tuple[str, ...]
    kl_held_back: float | None


@dataclass(frozen=True)
class _Start:
    """A selection with its screened tensors; `selected` names the selection of each group."""

    selected: Mapping[Axis, str]
    keep: Keep
    tensors: Arrays
    judged: Judged


def recover_closed_form(
    context: RecoveryContext,
    keep: Keep,
    counts: Counts,
    *,
    select: str = "auto",
    sensitivities: Mapping[Axis, Sensitivity] | None = None,
    walked: bool = True,
    progress: Advance | None = None,
) -> Recovered:
    """Recover one candidate.

    Args:
        context: the run's, from `build_context`.
        keep: the indices the plan's signal keeps, by group.
        counts: how many each group keeps.
        select: "signal" keeps the plan's indices, "obs" takes brain surgeon's, "auto" the better one per group.
        sensitivities: where measured, they say at once which selection suits a group.
        walked: False screens only: seconds instead of a minute, and groups are then selected all in one way.
        progress: called with (consumers walked, of how many).

    Raises:
        UsageError: an unknown `select`.
    """
    if select not in SELECTIONS:
        raise UsageError(f"unknown selection '{select}'; allowed: {', '.join(SELECTIONS)}")
    measured = {
        leaf: item.choice(counts[leaf]).select for leaf, item in (sensitivities or {}).items() if leaf in counts
    }
    options = _options(context, keep, counts, select)
    frontier = Frontier(context.network, context.images, context.held_back)
    starts = [_start(context, options, wanted, frontier) for wanted in _ways(options, measured)]
    best = min(starts, key=lambda item: item.judged.mean)
    if not walked:
        tensors = rescale(context, best.keep, best.tensors, best.judged.scale)
        return Recovered(tensors, tensors, best.keep, _notes(best), best.judged.mean)
    best = _swap_groups(context, options, best)
    result = walk(context, best.keep, best.tensors, progress)
    ways = Counter("left as they were" if way is None else way.name for way in result.taken.values())
    taken = ", ".join(f"{count} {name}" for name, count in ways.most_common())
    notes = (*_notes(best), f"layers walked: {taken}")
    return Recovered(result.tensors, result.fitted, best.keep, notes, result.kl_held_back)


_Options = dict[Axis, dict[str, BoolArray]]


def _options(context: RecoveryContext, keep: Keep, counts: Counts, select: str) -> _Options:
    """Return, per group that loses something, the different index sets on offer, each under its selection's name."""
    options: _Options = {}
    for group in context.structure.groups:
        planned = keep.get(group.leaf)
        count = int(planned.sum()) if planned is not None else counts.get(group.leaf, group.size)
        if count >= group.size:
            continue
        orders: dict[str, Order | None] = {}
        if select != "signal" or planned is None:
            orders["obs"] = surgeon_order(context, group)
        if select == "auto":
            orders["energy"] = energy_order(context, group)
        offered = {name: order.keep(count) for name, order in orders.items() if order is not None}
        known = any(np.array_equal(planned, kept) for kept in offered.values()) if planned is not None else True
        if planned is not None and not known and (select != "obs" or not offered):
            offered["signal"] = planned
        options[group.leaf] = offered
    return options


def _ways(options: _Options, measured: Mapping[Axis, str]) -> list[dict[Axis, str]]:
    """Return the ways to start: all groups by one selection, or each by the one that measured better alone.

    A group that does not offer a selection takes the first it does offer.
    """
    names = list(dict.fromkeys(name for offered in options.values() for name in offered))
    if measured:
        names = [name for name in names if name == "signal"]
    wanted = [dict.fromkeys(options, name) for name in names]
    if measured or not wanted:
        wanted.insert(0, {leaf: measured.get(leaf, "signal") for leaf in options})
    return [
        {
            leaf: way[leaf] if way[leaf] in offered else next(iter(offered))
            for leaf, offered in options.items()
            if offered
        }
        for way in wanted
    ]


def _start(context: RecoveryContext, options: _Options, selected: Mapping[Axis, str], frontier: Frontier) -> _Start:
    keep = {leaf: options[leaf][choice] for leaf, choice in selected.items()}
    ridges: dict[str, float] = {}
    for group in _groups(context, selected):
        ridges |= _ridges(context, group, selected[group.leaf])
    tensors = screen(context, keep, ridges)
    network = pruned_network(context, keep, tensors)
    return _Start(selected, keep, tensors, judge(context, network, frontier))


def _swap_groups(context: RecoveryContext, options: _Options, start: _Start) -> _Start:
    """Try each group's other selections, in graph order; what diverges less stays."""
    best = start
    network = pruned_network(context, best.keep, best.tensors)
    frontier = Frontier(network, context.images, context.held_back)
    for group in sorted(_groups(context, options), key=lambda item: first_use(network, item)):
        tried = {best.keep[group.leaf].tobytes()}
        frontier.advance_(network, narrowest(network, frontier.position, first_use(network, group)), context.threads)
        for name, kept in options[group.leaf].items():
            if kept.tobytes() in tried:
                continue
            tried.add(kept.tobytes())
            keep = {**best.keep, group.leaf: kept}
            tensors = screen(context, keep, _all_ridges(context, best, group, name))
            trial = pruned_network(context, keep, tensors, network)
            judged = judge(context, trial, frontier)
            if is_better(judged, best.judged):
                best, network = _Start({**best.selected, group.leaf: name}, keep, tensors, judged), trial
    return best


def _groups(context: RecoveryContext, chosen: Mapping[Axis, object]) -> list[Group]:
    return [group for group in context.structure.groups if group.leaf in chosen]


def _ridges(context: RecoveryContext, group: Group, selection: str) -> dict[str, float]:
    """Return lambda for the readers of a group: |W_j|^2 is chosen where calibration images are not to be trusted."""
    ridge = GENTLE if selection == "energy" else RIDGE
    return {consumer.weight: ridge for consumer, _ in readers_of(context, group)}


def _all_ridges(context: RecoveryContext, start: _Start, changed: Group, selection: str) -> dict[str, float]:
    ridges: dict[str, float] = {}
    for group in _groups(context, start.selected):
        ridges |= _ridges(context, group, selection if group is changed else start.selected[group.leaf])
    return ridges


def _notes(start: _Start) -> tuple[str, ...]:
    names = {"signal": "by signal", "obs": "by brain surgeon", "energy": "by |W|^2"}
    counted = Counter(names[name] for name in start.selected.values())
    return ("groups selected: " + ", ".join(f"{count} {name}" for name, count in counted.most_common()),)
