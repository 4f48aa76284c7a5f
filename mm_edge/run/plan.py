"""What to remove for every candidate: the strategies of all signals, and what budgets ask for.

A strategy's plan is made at the dense size and moved to the others. For every budget and input size the ranges are
scaled as a whole, one plan per signal. One more plan, `sensitivity`, spends the budget on input size, whole blocks and
widths together, whatever diverges least from the dense network on calibration images that are held back. How a budget
is met is in budgets.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from mm_edge.arrays import Float32Array
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import materialise
from mm_edge.graph.costs import Cost
from mm_edge.graph.depth import Branch, renamed
from mm_edge.graph.export import deploy
from mm_edge.graph.groups import Structure
from mm_edge.graph.widths import Counts, Ladder, group_scores, lead, select_indices
from mm_edge.plan.budgets import Budget, Draft, Met, Ruler, counts_of, meet, words_for
from mm_edge.plan.latency_table import at_another_size, fit_time, measure_table
from mm_edge.plan.ranges import apply_constraints
from mm_edge.plan.scores import Scores
from mm_edge.plan.strategies import assign
from mm_edge.progress import Advance
from mm_edge.quality.evaluation import run_onnx
from mm_edge.records import Assignment, SparsityRange
from mm_edge.recover.closed_form.branches import MeasuredBranch, allocate_rest, offers
from mm_edge.recover.closed_form.context import RecoveryContext
from mm_edge.recover.closed_form.judging import judge_answers
from mm_edge.run.clock import Clock, open_clock
from mm_edge.run.job import Job, Place, recovery_images
from mm_edge.run.make import (
    BUDGET_SLACK,
    Plan,
    count_macs,
    file_name,
    make_ladders,
    parameter_cost,
    plan_all,
    plan_budget,
    plan_n_m,
    recover_keep,
)
from mm_edge.run.score import score_network
from mm_edge.runtime import cores

# Counted budgets are used to the last step. Time is measured again later, and no two measurements agree to 1 %.
COUNTED_WINDOW = (1 - BUDGET_SLACK, 1.0)
MEASURED_AIM = 0.97
MEASURED_WINDOW = (0.95, 0.99)
# What a candidate's own id adds to the metadata of its file.
METADATA_BYTES = 256


class Rulers:
    """The rulers of one budget at the input sizes of a run, made when they are asked for."""

    def __init__(self, job: Job, dense: Place, budget: Budget, clock: Clock | None, time: Cost | None = None) -> None:
        """Prepare for `budget`; `clock` is None where nothing is measured, `time` a model of it at the dense size."""
        self.budget = budget
        self._time = time if budget.is_time else None
        self._job = job
        self._dense = dense
        self._clock = clock if budget.is_time else None
        self._made: dict[int, Ruler] = {}

    @property
    def measured(self) -> bool:
        """Whether shares are measured."""
        return self._clock is not None

    @property
    def by_table(self) -> bool:
        """Whether plans are drawn by measured latencies."""
        return self._time is not None

    def at(self, place: Place) -> Ruler:
        """Return the ruler at the input size of `place`."""
        side = place.network.side
        if side not in self._made:
            self._made[side] = self._by_bytes(place) if self.budget.kind == "size" else self._by_macs(place)
        return self._made[side]

    def _by_macs(self, place: Place) -> Ruler:
        structure, dense = place.network.structure, self._dense.network.structure.macs()
        whole = structure.macs() / dense
        if self._clock is None:
            check = partial(_macs_share, place, dense)
            return Ruler(self._target(), structure.mac_cost, dense, whole, check, 1.0, COUNTED_WINDOW)
        timed = partial(_timed_share, self._job, self._clock, place)
        whole = 1.0 if place.dense else timed({})
        cost = structure.mac_cost
        if self._time is not None:
            dense_cost = self._dense.network.structure.mac_cost
            cost = self._time if place.dense else at_another_size(self._time, cost, dense_cost)
            dense = self._time.total()
        return Ruler(self._target(), cost, dense, whole, timed, MEASURED_AIM, MEASURED_WINDOW)

    def _by_bytes(self, place: Place) -> Ruler:
        file = (self._job.folder / "dense.onnx").stat().st_size
        cost = parameter_cost(place.network.raw, place.network.structure)
        # Metadata is not part of what is counted here, and the same in every file but for a few names.
        check = partial(_bytes_share, place, file, file + METADATA_BYTES - _count_bytes(self._dense, {}))
        return Ruler(self._target(), cost, cost.total(), check({}), check, 1.0, COUNTED_WINDOW)

    def _target(self) -> float:
        value = self.budget.value
        if self.budget.kind == "macs":
            return value
        if self.budget.kind == "speedup":
            return 1 / value
        if self.budget.kind == "size":
            return value / (self._job.folder / "dense.onnx").stat().st_size
        assert self._clock is not None
        return value / self._clock.dense_ms()


def _macs_share(place: Place, dense: float, keep: Keep) -> float:
    return count_macs(place.network.raw, place.network.structure, keep) / dense


def _count_bytes(place: Place, keep: Keep) -> int:
    """Return the bytes of a plan's file without its metadata."""
    graph = materialise(place.network.raw, place.network.structure, keep)
    return int(ir.to_proto(deploy(graph)).ByteSize())


def _bytes_share(place: Place, dense: int, metadata: int, keep: Keep) -> float:
    return (_count_bytes(place, keep) + metadata) / dense


def _timed_share(job: Job, clock: Clock, place: Place, keep: Keep, *, quiet: bool = False) -> float:
    network = place.network
    key = place.job.key(keep=job.request.keep, prune_norms=job.request.prune_norms)
    return clock.share(key, network.raw, network.structure, keep, quiet=quiet)


def model_time(job: Job, dense: Place, clock: Clock, advance: Advance) -> Cost:
    """Return the model of time that the latency table of the dense network's groups gives on the clock's device."""
    structure = dense.network.structure
    time = partial(_timed_share, job, clock, dense, quiet=True)
    table = measure_table(structure, ladders_at(dense), time, advance)
    return fit_time(structure.mac_cost, table)


def places_for(budget: Budget, places: Sequence[Place]) -> list[Place]:
    """Return where candidates of a budget are made: a smaller picture makes no smaller file."""
    pruned = [place for place in places if place.pruned]
    return [max(pruned, key=lambda place: place.network.side)] if budget.kind == "size" and pruned else pruned


def plan_scaled(
    rulers: Rulers, places: Sequence[Place], ranges: Mapping[str, SparsityRange], scores: Scores
) -> tuple[list[Plan], list[str]]:
    """Return a plan per signal and size that meets the budget; none where the unpruned network is within it."""
    plans: list[Plan] = []
    notes: list[str] = []
    for place in places_for(rulers.budget, places):
        ruler = rulers.at(place)
        if ruler.whole <= ruler.target:
            continue
        network, ladders = place.network, ladders_at(place)
        met = meet(partial(_draw_scaled, place, ladders, ranges, ruler), ruler)
        counts, words = counts_of(met.draft.keep), _words(rulers, met)
        for signal in scores:
            keep = select_indices(counts, group_scores(network.structure, scores[signal]))
            assignment = Assignment(signal, (rulers.budget.strategy,), met.draft.sparsity)
            plans.append(Plan(assignment, "structured", keep=keep, side=place.side, planned_by=words))
        where = "" if place.dense else f" at {network.side} px"
        asked = f"{rulers.budget.asked}{where}"
        notes += budget_notes(network.structure, ladders, counts, met, ruler, asked, _UNITS[rulers.budget.kind])
    return plans, notes


_UNITS = {"macs": "MACs", "size": "bytes", "speedup": "time", "latency": "time"}


def _words(rulers: Rulers, met: Met) -> str:
    return words_for(rulers.budget, met, measured=rulers.measured, by_table=rulers.by_table)


def ladders_at(place: Place) -> tuple[Ladder, ...]:
    """Return the widths that groups may have on the job's target."""
    job, network = place.job, place.network
    return make_ladders(network.structure, network.layers, job.target, job.request.precisions)


def _draw_scaled(
    place: Place, ladders: Sequence[Ladder], ranges: Mapping[str, SparsityRange], ruler: Ruler, aim: float
) -> Draft:
    structure = place.network.structure
    part = aim * ruler.dense / ruler.cost.total()
    sparsity, counts = plan_budget(structure, place.network.layers, ladders, ranges, part, ruler.cost)
    return Draft(lead(structure, counts), sparsity)


def budget_notes(
    structure: Structure, ladders: Sequence[Ladder], counts: Counts, met: Met, ruler: Ruler, asked: str, unit: str
) -> list[str]:
    """Say so when a budget cost groups the channel multiples of the target, or was missed, and what holds the rest."""
    notes = []
    finer = sum(counts[item.leaf] not in item.widths for item in ladders)
    if finer:
        notes.append(
            f"{asked}: {finer} of {len(ladders)} groups have widths between the target's multiples, "
            "which alone miss the budget by more than 3 %: expect less speed than the MACs say"
        )
    if not met.fits(ruler) or met.share < ruler.window[0] * ruler.target:
        held = sorted(structure.pinned, key=lambda item: -item.size * len(item.tensors))[:3]
        pins = "; ".join(f"{item.id}: {item.reason}" for item in held)
        reached = met.share / ruler.whole
        found = f"the nearest the widths reach is {reached:.3f} of the dense {unit} there"
        notes.append(f"{asked}: {found} (pinned: {pins})")
    return notes


def plan_by_sensitivity(rulers: Rulers, job: Job, places: Sequence[Place]) -> tuple[list[Plan], list[str]]:
    """Spend a budget on input size, blocks and, by measured sensitivity, width; what diverges least is the plan.

    At every size that is above the budget, none to a few of the cheapest blocks are removed and the rest is taken from
    widths. The divergence is from the dense network at its own size, on images that are held back at every size. Where
    tuning follows, the whole network at the largest size within the budget is a plan as well.
    """
    budget, dense = rulers.budget, places[0]
    measured = [place for place in places_for(budget, places) if place.sensitivities]
    if not measured:
        return [], []
    untouched = _plan_whole(rulers, measured) if job.request.recover == "tune" else []
    with job.stages.stage(f"size, blocks or width at {budget.asked}") as advance:
        above = [place for place in measured if rulers.at(place).whole > rulers.at(place).target]
        rivals = [rival for place in above for rival in _spend(rulers, place, dense.branches, advance)]
        fitting = [rival for rival in rivals if rival[2].fits(rulers.at(rival[0]))]
        if len(fitting) < 2:
            least = [min(rivals, key=lambda rival: rival[2].share)] if rivals else []
            return [*(plan for _, plan, _ in fitting or least), *untouched], []
        tried: list[tuple[float, str, Plan]] = []
        for place, plan, _ in fitting:
            tried.append((_divergence(job, dense, place, plan), _describe(place, plan), plan))
            advance(len(tried), len(fitting))
        within = [place for place in places if not place.dense and _is_within(rulers, place)]
        controls = [(_divergence(job, dense, place, None), f"{place.network.side} px") for place in within]
    tried.sort(key=lambda item: item[0])
    text = ", ".join(f"{name} {kl:.3g}" for kl, name, _ in tried)
    note = f"{budget.asked} by sensitivity: {tried[0][1]} diverges least (nats: {text})"
    text = ", ".join(f"{name} {kl:.3g}" for kl, name in controls)
    return [tried[0][2], *untouched], [note + (f"; the dense network within the budget: {text}" if text else "")]


def _is_within(rulers: Rulers, place: Place) -> bool:
    if rulers.budget.kind == "size":
        return False
    ruler = rulers.at(place)
    return ruler.whole <= ruler.target


def _plan_whole(rulers: Rulers, places: Sequence[Place]) -> list[Plan]:
    """Return the plan that removes nothing at the largest size, below the dense one, that is within the budget."""
    within = [place for place in places if not place.dense and _is_within(rulers, place)]
    if not within:
        return []
    place = max(within, key=lambda item: item.network.side)
    keep = {group.leaf: np.ones(group.size, dtype=np.bool_) for group in place.network.structure.groups}
    assignment = Assignment("sensitivity", (rulers.budget.strategy,), {})
    words = _words(rulers, Met(Draft(keep), rulers.at(place).whole, 0))
    return [Plan(assignment, "structured", keep=keep, side=place.side, planned_by=words)]


def _spend(
    rulers: Rulers, place: Place, measured: Sequence[MeasuredBranch], advance: Advance
) -> list[tuple[Place, Plan, Met]]:
    """Return one plan per set of removed blocks."""
    ruler, ladders = rulers.at(place), ladders_at(place)
    here = {item.branch.id: renamed(item.branch, place.network.leaves) for item in measured}
    sets = offers(measured, lambda branch: _saved(ruler.cost, here[branch.id]))
    plans = []
    for removed in sets:
        branches = [here[item.id] for item in removed]
        met = meet(partial(_draw_by_sensitivity, place, ladders, branches, ruler), ruler)
        assignment = Assignment("sensitivity", (rulers.budget.strategy,), {})
        names = tuple(item.id for item in removed)
        words = _words(rulers, met)
        plan = Plan(assignment, "structured", keep=met.draft.keep, side=place.side, removed=names, planned_by=words)
        plans.append((place, plan, met))
        advance(len(plans), len(sets))
    return plans


def _saved(cost: Cost, branch: Branch) -> float:
    """Return what the cost falls by without a branch."""
    return cost.total() - cost.total(dict.fromkeys(branch.leaves, 0.0))


def _draw_by_sensitivity(
    place: Place, ladders: Sequence[Ladder], removed: Sequence[Branch], ruler: Ruler, aim: float
) -> Draft:
    structure = place.network.structure
    return Draft(allocate_rest(structure, ruler.cost, place.sensitivities, removed, aim * ruler.dense, ladders))


def _describe(place: Place, plan: Plan) -> str:
    gone = f" without {' and '.join(plan.removed)}" if plan.removed else ""
    return f"{place.network.side} px{gone}"


def _divergence(job: Job, dense: Place, place: Place, plan: Plan | None) -> float:
    """Return what a screened plan diverges by on held-back images (`judge`), nats; the whole network without a plan."""
    assert dense.recovery is not None and place.job.data is not None
    name = file_name(f"dense@{place.side}") if plan is None else plan.file_name
    what = None if plan is None else plan.digest()
    key = place.job.key(data=job.data_key, plan=what, select=job.request.select, images=len(dense.recovery.images))
    name = f"rivals/{name}-{what[:12]}" if what is not None else f"rivals/{name}"
    stored = job.store.load_json(name, key)
    if stored is None:
        network = place.network
        model = network.raw.model.clone() if plan is None else _screen(job, place, plan)
        images = _held_back_images(dense.recovery, place)
        labels = np.zeros(len(images), np.int64)
        logits = run_onnx(ir.to_proto(deploy(model)).SerializeToString(), [(images, labels)], cores())
        stored = [judge_answers(dense.recovery, logits).mean]
        job.store.save_json(name, key, stored)
    return float(stored[0])


def _held_back_images(dense: RecoveryContext, place: Place) -> Float32Array:
    """Return the images that decide at the dense size, as they are at the place's own."""
    assert place.job.data is not None
    held, own = list(dense.held_back), place.recovery
    if own is not None and len(own.images) == len(dense.images):
        return own.images[held]
    return recovery_images(place.job.data)[held]


def _screen(job: Job, place: Place, plan: Plan) -> ir.Model:
    assert plan.keep is not None and place.recovery is not None
    found = recover_keep(place.recovery, plan.keep, job.request.select, place.sensitivities, walked=False)
    return materialise(place.network.raw, place.network.structure, {**plan.keep, **found.keep}, found.tensors)


def make_plans(job: Job, places: list[Place]) -> tuple[list[Plan], list[str]]:
    """Score and plan. The scores are several times the model's size, and are let go once the plans are made."""
    raw, structure, layers = places[0].network.raw, places[0].network.structure, places[0].network.layers
    pruned = [place for place in places if place.pruned]
    scores, bounds, notes = score_network(job, raw, layers)
    strategies: list[Plan] = []
    with job.stages.stage("plan"):
        ladders = ladders_at(places[0])
        for kind in job.request.kinds:
            ranges = apply_constraints(layers, bounds, kind == "structured")
            assignments = [item for s in scores for item in assign(job.request.strategies, s, layers, ranges)]
            if kind == "n:m":
                found, dense = plan_n_m(raw, layers, scores, assignments)
                strategies += found
                notes += _pattern_notes(dense)
            else:
                strategies += plan_all(structure, layers, ladders, scores, assignments, (kind,))
        plans = [_move(plan, place) for place in pruned for plan in strategies]
    ranges = apply_constraints(layers, bounds, True)
    rulers, more = rulers_of(job, places[0])
    notes += more
    for ruler in rulers:
        with job.stages.stage("plan budgets"):
            found, more = plan_scaled(ruler, places, ranges, scores)
        plans += found
        notes += more
    del scores
    for ruler in rulers:
        found, more = plan_by_sensitivity(ruler, job, places)
        plans += found
        notes += more
    return plans, notes


def rulers_of(job: Job, dense: Place) -> tuple[list[Rulers], list[str]]:
    """Return what every budget of the job is planned with, and what cannot be planned for."""
    budgets = job.budgets
    timed = any(budget.is_time for budget in budgets)
    clock = open_clock(job.folder / "dense.onnx", job.target, job.transport, job.store) if timed else None
    able = [budget for budget in budgets if budget.kind != "latency" or clock is not None]
    unable = [budget for budget in budgets if budget not in able]
    notes = [f"{item.asked}: no time is measured here, so no candidate is planned for it" for item in unable]
    time = None
    if clock is not None and job.request.allocate_by == "latency":
        with job.stages.stage("latency table") as advance:
            time = model_time(job, dense, clock, advance)
    elif job.request.allocate_by == "latency":
        notes.append("--allocate-by latency: no time is measured here, so widths are allocated by multiply-adds")
    return [Rulers(job, dense, budget, clock, time) for budget in able], notes


def _move(plan: Plan, place: Place) -> Plan:
    """Return a plan of the dense network for the network of another size."""
    keep = None if plan.keep is None else place.network.translate(plan.keep)
    return replace(plan, keep=keep, side=place.side)


def _pattern_notes(dense: Mapping[str, str]) -> list[str]:
    """Say once per reason which layers stay dense under an n:m pattern."""
    by_reason: dict[str, list[str]] = {}
    for fqn, reason in dense.items():
        by_reason.setdefault(reason, []).append(fqn)
    return [
        f"n:m: {len(names)} layers stay dense ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}): {reason}"
        for reason, names in by_reason.items()
    ]
