"""Recovery without training (E9, recipe A): choose which indices stay, re-solve who reads them, let images decide.

    selection   the plan's own signal, iterative brain surgeon, or |W_j|^2: per group what diverges least
    screening   readers re-solved from the dense network's moments, the same for all candidates
    walking     readers re-solved from the pruned network's own values, input to output

Every decision is by KL(dense || candidate) on calibration images that no moment has seen; no labels are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mm_edge.errors import UsageError
from mm_edge.graph.axes import Axis
from mm_edge.graph.compact import Keep, materialise
from mm_edge.graph.groups import Group
from mm_edge.graph.widths import Counts
from mm_edge.recover.context import RecoveryContext, Tensors, divergence, energy_order, readers_of, surgeon_order
from mm_edge.recover.network import Frontier, Network, narrowest
from mm_edge.recover.sensitivity import Sensitivity, first_use
from mm_edge.recover.solve import GENTLE, screen
from mm_edge.recover.surgeon import RIDGE
from mm_edge.recover.walk import walk

Advance = Callable[[int, int], None]

SELECTIONS = ("signal", "obs", "auto")


@dataclass(frozen=True)
class Recovered:
    """A recovered candidate.

    Attributes:
        tensors: what changed, dense-shaped and masked, by name: weights, biases, running means.
        keep: the indices that stay; other ones than planned where another selection was better.
        notes: what was decided, in words.
        kl_held_back: divergence from the dense network on the held-back calibration images, nats.
    """

    tensors: Tensors
    keep: Keep
    notes: tuple[str, ...]
    kl_held_back: float | None


@dataclass(frozen=True)
class _Start:
    """A selection with its screened tensors; `selected` names the selection of each group."""

    selected: Mapping[Axis, str]
    keep: Keep
    tensors: Tensors
    kl: float


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
    options = _options(context, keep, counts, select, sensitivities or {})
    frontier = Frontier(context.network, context.images, context.held_back)
    starts = [_start(context, options, name, frontier) for name in _names(options)]
    best = min(starts, key=lambda item: item.kl)
    if not walked:
        return Recovered(best.tensors, best.keep, _notes(best), best.kl)
    best = _swap_groups(context, options, best)
    result = walk(context, best.keep, best.tensors, progress)
    taken = ", ".join(f"{count} {name}" for name, count in Counter(result.taken.values()).most_common())
    return Recovered(result.tensors, best.keep, (*_notes(best), f"layers walked: {taken}"), result.kl_held_back)


_Options = dict[Axis, dict[str, np.ndarray]]


def _options(
    context: RecoveryContext,
    keep: Keep,
    counts: Counts,
    select: str,
    sensitivities: Mapping[Axis, Sensitivity],
) -> _Options:
    """Return, per group that loses something, the different index sets on offer, each under its selection's name."""
    options: _Options = {}
    for group in context.structure.groups:
        planned = keep.get(group.leaf)
        count = int(planned.sum()) if planned is not None else counts.get(group.leaf, group.size)
        if count >= group.size:
            continue
        offered = {} if planned is None else {"signal": planned}
        if select != "signal" or planned is None:
            measured = sensitivities.get(group.leaf)
            surgeon, energy = surgeon_order(context, group), energy_order(context, group)
            if surgeon is not None and energy is not None:
                offered["obs"] = surgeon.keep(count)
                if select == "auto":
                    offered["energy"] = energy.keep(count)
            if measured is not None and select == "auto":
                offered["measured"] = measured.keep(count)
            if select == "obs" and "obs" in offered:
                offered.pop("signal", None)
        options[group.leaf] = offered
    return options


def _names(options: _Options) -> list[str]:
    """Return the ways to select all groups alike; what a group does not offer falls back to what it does."""
    found = list(dict.fromkeys(name for offered in options.values() for name in offered)) or ["signal"]
    return [name for name in found if not (name in ("obs", "energy") and "measured" in found)]


def _start(context: RecoveryContext, options: _Options, name: str, frontier: Frontier) -> _Start:
    selected = {leaf: name if name in offered else next(iter(offered)) for leaf, offered in options.items() if offered}
    keep = {leaf: options[leaf][choice] for leaf, choice in selected.items()}
    ridges: dict[str, float] = {}
    for group in _groups(context, selected):
        ridges |= _ridges(context, group, selected[group.leaf])
    tensors = screen(context, keep, ridges)
    network = Network(materialise(context.raw, context.structure, keep, tensors))
    return _Start(selected, keep, tensors, divergence(context, network, frontier))


def _swap_groups(context: RecoveryContext, options: _Options, start: _Start) -> _Start:
    """Try each group's other selections, in graph order; what diverges less stays."""
    best = start
    network = Network(materialise(context.raw, context.structure, best.keep, best.tensors))
    frontier = Frontier(network, context.images, context.held_back)
    for group in sorted(_groups(context, options), key=lambda item: first_use(network, item)):
        tried = {best.keep[group.leaf].tobytes()}
        frontier.advance_(network, narrowest(network, frontier.position, first_use(network, group)), context.threads)
        for name, kept in options[group.leaf].items():
            if kept.tobytes() in tried:
                continue
            tried.add(kept.tobytes())
            keep = {**best.keep, group.leaf: kept}
            readers = [consumer.weight for consumer, _ in readers_of(context, group)]
            tensors = screen(context, keep, _all_ridges(context, best, group, name), best.tensors, readers)
            trial = Network(materialise(context.raw, context.structure, keep, tensors))
            kl = divergence(context, trial, frontier)
            if kl < best.kl:
                best, network = _Start({**best.selected, group.leaf: name}, keep, tensors, kl), trial
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
    names = {"signal": "by signal", "obs": "by brain surgeon", "energy": "by |W|^2", "measured": "as measured alone"}
    counted = Counter(names[name] for name in start.selected.values())
    return ("groups selected: " + ", ".join(f"{count} {name}" for name, count in counted.most_common()),)
