"""Makes the plans of a run: one per strategy, signal and kind, and those of the budgets.

A strategy's plan is made at the dense size and translated to the others. For every budget and input size all ranges
are scaled together, which gives one plan per signal. One more plan, `sensitivity`, combines input size, whole blocks
and widths; of several that meet the budget, it is the one that diverges least from the dense network on held-back
calibration images. plan/budgets.py describes how a budget is met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from mm_edge.arrays import Float32Array
from mm_edge.graph.answers import find_answers
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import materialise
from mm_edge.graph.costs import Cost
from mm_edge.graph.deploy import deploy
from mm_edge.graph.depth import Branch, renamed
from mm_edge.graph.partial import Frontier, RunnableGraph
from mm_edge.graph.widths import AllowedWidths, group_scores, lead, select_indices
from mm_edge.plan.budgets import BudgetCheck, Draft, Met, counts_of, meet, words_for
from mm_edge.plan.counts import count_macs, parameter_cost
from mm_edge.plan.latency_table import at_another_size, fit_time, measure_table
from mm_edge.plan.plans import ChannelPlan, Plan, plan_all, plan_n_m
from mm_edge.plan.ranges import apply_constraints
from mm_edge.plan.scaling import BUDGET_SLACK, plan_budget
from mm_edge.plan.scores import Scores
from mm_edge.plan.strategies import assign
from mm_edge.progress import Advance
from mm_edge.records import Assignment, Budget, SparsityRange
from mm_edge.recover.closed_form.branches import MeasuredBranch, allocate_rest, offers
from mm_edge.recover.closed_form.context import RecoveryContext, answers
from mm_edge.recover.closed_form.judging import judge_answers
from mm_edge.run.closed_form import recover_keep
from mm_edge.run.job import Job
from mm_edge.run.make import control_file_name
from mm_edge.run.networks import Network, Networks, recovery_images
from mm_edge.run.score import channel_signals, score_network
from mm_edge.run.timing import DeviceTimer, open_timer
from mm_edge.runtime import cores

# A counted budget may be used up. A budget of time leaves a margin, because two measurements differ by about 1 %.
COUNTED_WINDOW = (1 - BUDGET_SLACK, 1.0)
MEASURED_AIM = 0.97
MEASURED_WINDOW = (0.95, 0.99)
# The bytes that a candidate's id adds to the metadata of its file.
METADATA_BYTES = 256


class BudgetMeasures:
    """How the plans of one budget are drawn and checked at each network of a run."""

    def __init__(
        self, job: Job, dense: Network, budget: Budget, timer: DeviceTimer | None, time: Cost | None = None
    ) -> None:
        """Prepare for `budget`; `timer` is None where nothing is measured, `time` a model of it at the dense size."""
        self.budget = budget
        self._time = time if budget.is_time else None
        self._job = job
        self._dense = dense
        self._timer = timer if budget.is_time else None
        self._made: dict[int | None, BudgetCheck] = {}

    @property
    def measured(self) -> bool:
        """Whether shares are measured."""
        return self._timer is not None

    @property
    def by_table(self) -> bool:
        """Whether plans are drawn by measured latencies."""
        return self._time is not None

    def at(self, network: Network) -> BudgetCheck:
        """Return how plans are drawn and checked at `network`."""
        if network.side not in self._made:
            self._made[network.side] = self._make(network)
        return self._made[network.side]

    def _make(self, network: Network) -> BudgetCheck:
        if self.budget.kind == "size":
            return self._by_bytes(network)
        return self._by_macs(network) if self._timer is None else self._by_time(network, self._timer)

    def _by_macs(self, network: Network) -> BudgetCheck:
        structure, dense = network.structure, self._dense.structure.macs()
        check = partial(_macs_share, network, dense)
        whole = structure.macs() / dense
        return BudgetCheck(self._largest_share(), structure.mac_cost, dense, whole, check, 1.0, COUNTED_WINDOW)

    def _by_time(self, network: Network, timer: DeviceTimer) -> BudgetCheck:
        timed = partial(_timed_share, self._job, timer, network)
        whole = 1.0 if network.is_dense_size else timed({})
        cost, dense = network.structure.mac_cost, self._dense.structure.macs()
        if self._time is not None:
            dense_cost = self._dense.structure.mac_cost
            cost = self._time if network.is_dense_size else at_another_size(self._time, cost, dense_cost)
            dense = self._time.total()
        return BudgetCheck(self._largest_share(), cost, dense, whole, timed, MEASURED_AIM, MEASURED_WINDOW)

    def _by_bytes(self, network: Network) -> BudgetCheck:
        file = self._job.dense_file.stat().st_size
        cost = parameter_cost(network.raw, network.structure)
        # Counted without metadata, which is the same in every file but for a few names.
        check = partial(_bytes_share, network, file, file + METADATA_BYTES - _count_bytes(self._dense, {}))
        return BudgetCheck(self._largest_share(), cost, cost.total(), check({}), check, 1.0, COUNTED_WINDOW)

    def _largest_share(self) -> float:
        value = self.budget.value
        if self.budget.kind == "macs":
            return value
        if self.budget.kind == "speedup":
            return 1 / value
        if self.budget.kind == "size":
            return value / self._job.dense_file.stat().st_size
        assert self._timer is not None
        return value / self._timer.dense_ms()


def _macs_share(network: Network, dense: float, keep: Keep) -> float:
    return count_macs(network.raw, network.structure, keep) / dense


def _count_bytes(network: Network, keep: Keep) -> int:
    """Return the bytes of a plan's file without its metadata."""
    return int(ir.to_proto(deploy(materialise(network.raw, network.structure, keep))).ByteSize())


def _bytes_share(network: Network, dense: int, metadata: int, keep: Keep) -> float:
    return (_count_bytes(network, keep) + metadata) / dense


def _timed_share(job: Job, timer: DeviceTimer, network: Network, keep: Keep, *, quiet: bool = False) -> float:
    key = job.key(network.model, keep=job.request.keep, prune_norms=job.request.prune_norms)
    return timer.share(key, network.raw, network.structure, keep, quiet=quiet)


def model_time(job: Job, dense: Network, timer: DeviceTimer, advance: Advance) -> Cost:
    """Return the model of time that is fitted to the latency table of the dense network's groups."""
    time = partial(_timed_share, job, timer, dense, quiet=True)
    table = measure_table(dense.structure, dense.allowed_widths(job), time, advance)
    return fit_time(dense.structure.mac_cost, table)


def networks_for(budget: Budget, networks: Networks) -> tuple[Network, ...]:
    """Return the networks that get candidates of a budget; for a file size only the largest, as files do not differ."""
    pruned = networks.pruned
    return (max(pruned, key=lambda network: network.pixels),) if budget.kind == "size" and pruned else pruned


def plan_scaled(
    job: Job, measures: BudgetMeasures, networks: Networks, ranges: Mapping[str, SparsityRange], scores: Scores
) -> list[Plan]:
    """Return a plan per signal and size that meets the budget; none where the unpruned network is within it."""
    plans: list[Plan] = []
    for network in networks_for(measures.budget, networks):
        check = measures.at(network)
        if _is_within(check):
            continue
        allowed = network.allowed_widths(job)
        met = meet(partial(_draw_scaled, network, allowed, ranges, check), check)
        counts, words = counts_of(met.draft.keep), _planned_by(measures, met)
        for signal in scores:
            keep = select_indices(counts, group_scores(network.structure, scores[signal]))
            assignment = Assignment(signal, (measures.budget.strategy,), met.draft.sparsity)
            plans.append(ChannelPlan(assignment, side=network.side, planned_by=words, keep=keep))
        job.note(*budget_notes(network, allowed, met, check, measures.budget))
    return plans


_UNITS = {"macs": "MACs", "size": "bytes", "speedup": "time", "latency": "time"}


def _planned_by(measures: BudgetMeasures, met: Met) -> str:
    return words_for(measures.budget, met, measured=measures.measured, by_table=measures.by_table)


def _draw_scaled(
    network: Network,
    allowed: Sequence[AllowedWidths],
    ranges: Mapping[str, SparsityRange],
    check: BudgetCheck,
    aim: float,
) -> Draft:
    part = aim * check.dense / check.cost.total()
    sparsity, counts = plan_budget(network.structure, network.layers, allowed, ranges, part, check.cost)
    return Draft(lead(network.structure, counts), sparsity)


def budget_notes(
    network: Network, allowed: Sequence[AllowedWidths], met: Met, check: BudgetCheck, budget: Budget
) -> list[str]:
    """Return notes for a budget whose widths ignore the target's multiples, or that was missed, with what is pinned."""
    asked = budget.asked if network.is_dense_size else f"{budget.asked} at {network.side} px"
    counts = counts_of(met.draft.keep)
    notes = []
    finer = sum(counts[item.leaf] not in item.widths for item in allowed)
    if finer:
        notes.append(
            f"{asked}: {finer} of {len(allowed)} groups have widths between the target's multiples, "
            "which alone miss the budget by more than 3 %: expect less speed than the MACs say"
        )
    if not met.fits(check) or met.share < check.window[0] * check.largest_share:
        held = sorted(network.structure.pinned, key=lambda item: -item.size * len(item.tensors))[:3]
        pins = "; ".join(f"{item.id}: {item.reason}" for item in held)
        reached = met.share / check.whole
        found = f"the nearest the widths reach is {reached:.3f} of the dense {_UNITS[budget.kind]} there"
        notes.append(f"{asked}: {found} (pinned: {pins})")
    return notes


@dataclass(frozen=True)
class _Combination:
    """A plan that combines input size, blocks and widths, and how it meets the budget."""

    network: Network
    plan: ChannelPlan
    met: Met

    @property
    def words(self) -> str:
        """Size and removed branches, for the report."""
        gone = f" without {' and '.join(self.plan.removed)}" if self.plan.removed else ""
        return f"{self.network.pixels} px{gone}"


def combining_stage(budget: Budget) -> str:
    """Return the name of the stage in which `plan_by_sensitivity` meets a budget."""
    return f"size, blocks or width at {budget.asked}"


def plan_by_sensitivity(job: Job, measures: BudgetMeasures, networks: Networks) -> list[Plan]:
    """Return the plan that meets a budget by input size, blocks and widths together and diverges least.

    At every input size that exceeds the budget, none or a few of the cheapest blocks are removed, and widths are
    reduced by measured sensitivity until the budget is met. The divergence is from the dense network at its own size,
    on images that are held back at every size. If the recovery trains smaller sizes, the unpruned network at the
    largest size within the budget is returned as a second plan.
    """
    budget = measures.budget
    measured = [network for network in networks_for(budget, networks) if network.sensitivities]
    if not measured:
        return []
    unpruned = _plan_unpruned(measures, measured) if job.recovery.trains_sizes else []
    with job.stages.stage(combining_stage(budget)) as advance:
        above = [network for network in measured if not _is_within(measures.at(network))]
        branches = networks.dense.branches
        found = [item for network in above for item in _combine(job, measures, network, branches, advance)]
        fitting = [item for item in found if item.met.fits(measures.at(item.network))]
        if len(fitting) < 2:
            smallest = [min(found, key=lambda item: item.met.share)] if found else []
            return [*(item.plan for item in fitting or smallest), *unpruned]
        best = _least_diverging(job, measures, networks, fitting, advance)
    return [best.plan, *unpruned]


def _least_diverging(
    job: Job, measures: BudgetMeasures, networks: Networks, fitting: Sequence[_Combination], advance: Advance
) -> _Combination:
    """Return the combination of least divergence, and note those of all and of the controls within the budget."""
    budget = measures.budget
    tried: list[tuple[float, _Combination]] = []
    for item in fitting:
        tried.append((_divergence(job, networks.dense, item.network, item.plan), item))
        advance(len(tried), len(fitting))
    tried.sort(key=lambda pair: pair[0])
    best = tried[0][1]
    listed = ", ".join(f"{item.words} {kl:.3g}" for kl, item in tried)
    assert networks.dense.recovery is not None
    scores = networks.dense.recovery.judged.class_scores is not None
    unit = "nats" if scores else "shares of the variance"
    note = f"{budget.asked} by sensitivity: {best.words} diverges least ({unit}: {listed})"
    # A smaller input makes no smaller file, so no control meets a file size that the dense network exceeds. What is no
    # class score, such as a map, has other positions at another size and cannot be compared.
    compared = scores and budget.kind != "size"
    within = [item for item in networks.others if compared and _is_within(measures.at(item))]
    controls = [f"{item.side} px {_divergence(job, networks.dense, item, None):.3g}" for item in within]
    job.note(f"{note}; the dense network within the budget: {', '.join(controls)}" if controls else note)
    return best


def _is_within(check: BudgetCheck) -> bool:
    """Return whether the unpruned network meets the budget."""
    return check.whole <= check.largest_share


def _plan_unpruned(measures: BudgetMeasures, networks: Sequence[Network]) -> list[Plan]:
    """Return the plan that removes nothing, at the largest size below the dense one that is within the budget."""
    if measures.budget.kind == "size":
        return []
    within = [network for network in networks if not network.is_dense_size and _is_within(measures.at(network))]
    if not within:
        return []
    network = max(within, key=lambda item: item.pixels)
    keep = {group.leaf: np.ones(group.size, dtype=np.bool_) for group in network.structure.groups}
    assignment = Assignment("sensitivity", (measures.budget.strategy,), {})
    words = _planned_by(measures, Met(Draft(keep), measures.at(network).whole, 0))
    return [ChannelPlan(assignment, side=network.side, planned_by=words, keep=keep)]


def _combine(
    job: Job, measures: BudgetMeasures, network: Network, measured: Sequence[MeasuredBranch], advance: Advance
) -> list[_Combination]:
    """Return one plan per set of removed blocks."""
    check, allowed = measures.at(network), network.allowed_widths(job)
    here = {item.branch.id: renamed(item.branch, network.leaves) for item in measured}
    sets = offers(measured, lambda branch: _cost_of_branch(check.cost, here[branch.id]))
    found: list[_Combination] = []
    for removed in sets:
        branches = [here[item.id] for item in removed]
        met = meet(partial(_draw_by_sensitivity, network, allowed, branches, check), check)
        assignment = Assignment("sensitivity", (measures.budget.strategy,), {})
        plan = ChannelPlan(
            assignment,
            side=network.side,
            planned_by=_planned_by(measures, met),
            keep=met.draft.keep,
            removed=tuple(item.id for item in removed),
        )
        found.append(_Combination(network, plan, met))
        advance(len(found), len(sets))
    return found


def _cost_of_branch(cost: Cost, branch: Branch) -> float:
    """Return the cost of a branch."""
    return cost.total() - cost.total(dict.fromkeys(branch.leaves, 0.0))


def _draw_by_sensitivity(
    network: Network, allowed: Sequence[AllowedWidths], removed: Sequence[Branch], check: BudgetCheck, aim: float
) -> Draft:
    dense = aim * check.dense
    return Draft(allocate_rest(network.structure, check.cost, network.sensitivities, removed, dense, allowed))


def _divergence(job: Job, dense: Network, network: Network, plan: ChannelPlan | None) -> float:
    """Return the divergence on held-back images of a screened plan or, for class scores, of the unpruned network."""
    assert dense.recovery is not None and network.data is not None
    what = None if plan is None else plan.digest()
    name = f"rivals/{control_file_name(network)}" if plan is None else f"rivals/{plan.file_name}-{plan.digest()[:12]}"
    images = len(dense.recovery.images)
    key = job.key(network.model, data=job.data_key, plan=what, select=job.request.select, images=images)
    stored = job.store.load_json(name, key)
    if stored is None:
        model = network.raw.model.clone() if plan is None else _screen(job, network, plan)
        by_scores = dense.recovery.judged.class_scores is not None
        context = dense.recovery if by_scores or network.recovery is None else network.recovery
        stored = [_judge_network(context, network, model, job.request.judge)]
        job.store.save_json(name, key, stored)
    return float(stored[0])


def _judge_network(context: RecoveryContext, network: Network, model: ir.Model, judge: Sequence[str]) -> float:
    """Return the divergence of a raw or compact graph of `network` from the dense answers in `context`."""
    judged = find_answers(network.raw, network.structure, judge)
    graph = RunnableGraph(model, judged.values)
    images = _held_back_images(context, network)
    numbers = tuple(range(len(images)))
    return judge_answers(context, answers(graph, judged, Frontier(graph, images, numbers), numbers, cores())).mean


def _held_back_images(dense: RecoveryContext, network: Network) -> Float32Array:
    """Return the images that are held back at the dense size, prepared for this network's input."""
    assert network.data is not None
    held, own = list(dense.held_back), network.recovery
    if own is not None and len(own.images) == len(dense.images):
        return own.images[held]
    return recovery_images(network.data)[held]


def _screen(job: Job, network: Network, plan: ChannelPlan) -> ir.Model:
    assert network.recovery is not None
    found = recover_keep(network.recovery, plan.keep, job.request.select, network.sensitivities, walked=False)
    return materialise(network.raw, network.structure, {**plan.keep, **found.keep}, found.tensors)


def make_plans(job: Job, networks: Networks) -> list[Plan]:
    """Score and plan. The scores, several times the size of the model, are freed before planning by sensitivity."""
    dense = networks.dense
    scores, bounds = score_network(job, dense)
    with job.stages.stage("plan"):
        strategies = _plan_strategies(job, dense, scores, bounds)
        plans = [_translate(plan, network) for network in networks.pruned for plan in strategies]
    ranges = apply_constraints(dense.layers, bounds, True)
    budgets = measures_of(job, dense)
    for measures in budgets:
        with job.stages.stage("plan budgets"):
            plans += plan_scaled(job, measures, networks, ranges, _channel_scores(job, scores))
    del scores
    for measures in budgets:
        plans += plan_by_sensitivity(job, measures, networks)
    return plans


def _plan_strategies(job: Job, dense: Network, scores: Scores, bounds: Mapping[str, SparsityRange]) -> list[Plan]:
    """Return the plans of every strategy, signal and kind at the dense size."""
    plans: list[Plan] = []
    allowed, layers = dense.allowed_widths(job), dense.layers
    for kind in job.request.kinds:
        ranges = apply_constraints(layers, bounds, kind == "structured")
        known = _channel_scores(job, scores) if kind == "structured" else scores
        assignments = [item for s in known for item in assign(job.request.strategies, s, layers, ranges)]
        if kind == "n:m":
            found, left = plan_n_m(dense.raw, layers, known, assignments)
            plans += found
            job.note(*_pattern_notes(left))
        else:
            plans += plan_all(dense.structure, layers, allowed, known, assignments, (kind,))
    return plans


def _channel_scores(job: Job, scores: Scores) -> Scores:
    """Return the scores of the signals that structured candidates are made by; all where none of these is known."""
    wanted = channel_signals(job.request)
    return {signal: found for signal, found in scores.items() if signal in wanted} or scores


def measures_of(job: Job, dense: Network) -> list[BudgetMeasures]:
    """Return the measures of every budget that can be planned for, and note the others."""
    budgets = job.budgets
    timed = any(budget.is_time for budget in budgets)
    timer = open_timer(job.dense_file, job.target, job.transport, job.store) if timed else None
    able = [budget for budget in budgets if budget.kind != "latency" or timer is not None]
    unable = [budget for budget in budgets if budget not in able]
    job.note(*(f"{item.asked}: no time is measured here, so no candidate is planned for it" for item in unable))
    time = None
    if timer is not None and job.request.allocate_by == "latency":
        with job.stages.stage("latency table") as advance:
            time = model_time(job, dense, timer, advance)
    elif job.request.allocate_by == "latency":
        job.note("--allocate-by latency: no time is measured here, so widths are allocated by multiply-adds")
    return [BudgetMeasures(job, dense, budget, timer, time) for budget in able]


def _translate(plan: Plan, network: Network) -> Plan:
    """Return a plan of the dense network as a plan of another network."""
    if isinstance(plan, ChannelPlan):
        return replace(plan, keep=network.translate(plan.keep), side=network.side)
    return replace(plan, side=network.side)


def _pattern_notes(dense: Mapping[str, str]) -> list[str]:
    """Return one note per reason for the layers that stay dense under an n:m pattern."""
    by_reason: dict[str, list[str]] = {}
    for fqn, reason in dense.items():
        by_reason.setdefault(reason, []).append(fqn)
    return [
        f"n:m: {len(names)} layers stay dense ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}): {reason}"
        for reason, names in by_reason.items()
    ]
