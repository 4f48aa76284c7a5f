"""Recovery of a structured candidate without training (E9 in docs/method.md), in three steps.

    selection   which indices of a group stay: those of the plan's signal, of brain surgeon or of |W_j|^2
    screening   the readers are solved again from the dense network's moments, the same for all candidates
    walking     the readers are solved again from the pruned network's own values, from input to output

Every choice is made by the divergence from the dense network on the held-back images, which no moment comes from. No
labels are read.
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
from mm_edge.recover.closed_form.context import RecoveryContext, pruned_graph
from mm_edge.recover.closed_form.judging import Judged, is_better, judge, rescale
from mm_edge.recover.closed_form.orders import energy_order, readers_of, surgeon_order
from mm_edge.recover.closed_form.selections import SELECTIONS
from mm_edge.recover.closed_form.sensitivity import Sensitivity, first_use
from mm_edge.recover.closed_form.solve import GENTLE_RIDGE, screen
from mm_edge.recover.closed_form.surgeon import USUAL_RIDGE, Order
from mm_edge.recover.closed_form.walk import walk


@dataclass(frozen=True)
class Recovered:
    """A recovered candidate.

    Attributes:
        tensors: what changed, dense-shaped and masked, by name: weights, biases, running means.
        fitted: the same, solved without the held-back images. Tuning starts from these, because the held-back images
            judge it.
        keep: the indices that stay, by group; not the planned ones where another selection was better.
        notes: what was chosen, in words.
        kl_held_back: the divergence of `fitted` from the dense network on the held-back images, in nats.
    """

    tensors: Arrays
    fitted: Arrays
    keep: Keep
    notes: tuple[str, ...]
    kl_held_back: float | None


@dataclass(frozen=True)
class _Start:
    """A screened network to start the walk from.

    Attributes:
        selected: the name of each group's selection.
        keep: the indices that stay, by group.
        tensors: the screened tensors, dense-shaped and masked, by name.
        judged: how far the network is from the dense one.
    """

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
        context: of the dense network, from `build_context`.
        keep: the indices that the plan's signal keeps, by group.
        counts: how many indices each group keeps.
        select: "signal" keeps the plan's indices, "obs" takes brain surgeon's, "auto" the best selection per group.
        sensitivities: measured ones already say which selection suits a group, so that fewer have to be tried.
        walked: False screens only, which takes seconds instead of a minute and tries no other selections group by
            group.
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
    frontier = Frontier(context.graph, context.images, context.held_back)
    starts = [_start(context, options, wanted, frontier) for wanted in _selections(options, measured)]
    best = min(starts, key=lambda item: item.judged.mean)
    if not walked:
        tensors = rescale(context, best.keep, best.tensors, best.judged.scale)
        return Recovered(tensors, tensors, best.keep, _notes(best), best.judged.mean)
    best = _swap_groups(context, options, best)
    result = walk(context, best.keep, best.tensors, progress)
    names = Counter("left as they were" if chosen is None else chosen.name for chosen in result.chosen.values())
    walked_layers = ", ".join(f"{count} {name}" for name, count in names.most_common())
    notes = (*_notes(best), f"layers walked: {walked_layers}")
    return Recovered(result.tensors, result.fitted, best.keep, notes, result.kl_held_back)


_Options = dict[Axis, dict[str, BoolArray]]


def _options(context: RecoveryContext, keep: Keep, counts: Counts, select: str) -> _Options:
    """Return, for each group that loses something, the masks to choose from, by the name of their selection.

    The plan's own mask is left out if another selection has the same one.
    """
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


def _selections(options: _Options, measured: Mapping[Axis, str]) -> list[dict[Axis, str]]:
    """Return the assignments of a selection to every group that are worth screening.

    Without measurements: each selection for all groups. With measurements: each group's better one, and the plan's
    signal for all groups. A group that does not offer the wanted selection takes the first that it offers.
    """
    names = list(dict.fromkeys(name for offered in options.values() for name in offered))
    if measured:
        names = [name for name in names if name == "signal"]
    wanted = [dict.fromkeys(options, name) for name in names]
    if measured or not wanted:
        wanted.insert(0, {leaf: measured.get(leaf, "signal") for leaf in options})
    return [
        {
            leaf: selected[leaf] if selected[leaf] in offered else next(iter(offered))
            for leaf, offered in options.items()
            if offered
        }
        for selected in wanted
    ]


def _start(context: RecoveryContext, options: _Options, selected: Mapping[Axis, str], frontier: Frontier) -> _Start:
    keep = {leaf: options[leaf][choice] for leaf, choice in selected.items()}
    ridges: dict[str, float] = {}
    for group in _groups(context, selected):
        ridges |= _ridges(context, group, selected[group.leaf])
    tensors = screen(context, keep, ridges)
    graph = pruned_graph(context, keep, tensors)
    return _Start(selected, keep, tensors, judge(context, graph, frontier))


def _swap_groups(context: RecoveryContext, options: _Options, start: _Start) -> _Start:
    """Try each group's other selections, one group after another in graph order, and take those that are better."""
    best = start
    graph = pruned_graph(context, best.keep, best.tensors)
    frontier = Frontier(graph, context.images, context.held_back)
    for group in sorted(_groups(context, options), key=lambda item: first_use(graph, item)):
        tried = {best.keep[group.leaf].tobytes()}
        frontier.advance_(graph, narrowest(graph, frontier.position, first_use(graph, group)), context.threads)
        for name, kept in options[group.leaf].items():
            if kept.tobytes() in tried:
                continue
            tried.add(kept.tobytes())
            keep = {**best.keep, group.leaf: kept}
            tensors = screen(context, keep, _all_ridges(context, best, group, name))
            trial = pruned_graph(context, keep, tensors, graph)
            judged = judge(context, trial, frontier)
            if is_better(judged, best.judged):
                best, graph = _Start({**best.selected, group.leaf: name}, keep, tensors, judged), trial
    return best


def _groups(context: RecoveryContext, chosen: Mapping[Axis, object]) -> list[Group]:
    return [group for group in context.structure.groups if group.leaf in chosen]


def _ridges(context: RecoveryContext, group: Group, selection: str) -> dict[str, float]:
    """Return lambda for the readers of a group, by weight.

    It is the gentle one with the |W_j|^2 selection, which wins where calibration images are not to be trusted.
    """
    ridge = GENTLE_RIDGE if selection == "energy" else USUAL_RIDGE
    return {consumer.weight: ridge for consumer, _ in readers_of(context, group)}


def _all_ridges(context: RecoveryContext, start: _Start, changed: Group, selection: str) -> dict[str, float]:
    """Return lambda for the readers of all groups of `start`, with another selection for the group `changed`."""
    ridges: dict[str, float] = {}
    for group in _groups(context, start.selected):
        ridges |= _ridges(context, group, selection if group is changed else start.selected[group.leaf])
    return ridges


def _notes(start: _Start) -> tuple[str, ...]:
    names = {"signal": "by signal", "obs": "by brain surgeon", "energy": "by |W|^2"}
    counted = Counter(names[name] for name in start.selected.values())
    return ("groups selected: " + ", ".join(f"{count} {name}" for name, count in counted.most_common()),)
