"""What to remove for every candidate: the strategies of all signals, and what budgets ask for.

A strategy's plan is made at the dense size and moved to the others. For every budget and input size the ranges are
scaled as a whole, one plan per signal. One more plan, `sensitivity`, spends the budget on input size, whole blocks and
widths together, whatever diverges least from the dense network on calibration images that are held back. How a budget
is met is in plan/budgets.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from mm_edge.arrays import Float32Array
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import materialise
from mm_edge.graph.costs import Cost
from mm_edge.graph.deploy import deploy
from mm_edge.graph.depth import Branch, renamed
from mm_edge.graph.groups import Structure
from mm_edge.graph.widths import AllowedWidths, Counts, group_scores, lead, select_indices
from mm_edge.plan.budgets import BudgetCheck, Draft, Met, counts_of, meet, words_for
from mm_edge.plan.counts import count_macs, parameter_cost
from mm_edge.plan.latency_table import at_another_size, fit_time, measure_table
from mm_edge.plan.plans import ChannelPlan, Plan, plan_all, plan_n_m
from mm_edge.plan.ranges import apply_constraints
from mm_edge.plan.scaling import BUDGET_SLACK, plan_budget
from mm_edge.plan.scores import Scores
from mm_edge.plan.strategies import assign
from mm_edge.progress import Advance
from mm_edge.quality.evaluation import run_onnx
from mm_edge.records import Assignment, Budget, SparsityRange
from mm_edge.recover.closed_form.branches import MeasuredBranch, allocate_rest, offers
from mm_edge.recover.closed_form.context import RecoveryContext
from mm_edge.recover.closed_form.judging import judge_answers
from mm_edge.run.clock import Clock, open_clock
from mm_edge.run.closed_form import recover_keep
from mm_edge.run.job import Job
from mm_edge.run.make import control_file_name
from mm_edge.run.networks import Network, Networks, recovery_images
from mm_edge.run.score import score_network
from mm_edge.runtime import cores

# Counted budgets are used to the last step. Time is measured again later, and no two measurements agree to 1 %.
COUNTED_WINDOW = (1 - BUDGET_SLACK, 1.0)
MEASURED_AIM = 0.97
MEASURED_WINDOW = (0.95, 0.99)
# What a candidate's own id adds to the metadata of its file.
METADATA_BYTES = 256


class BudgetMeasures:
    """How the plans of one budget are drawn and checked, at each network of a run; made when asked for."""

    def __init__(self, job: Job, dense: Network, budget: Budget, clock: Clock | None, time: Cost | None = None) -> None:
        """Prepare for `budget`; `clock` is None where nothing is measured, `time` a model of it at the dense size."""
        self.budget = budget
        self._time = time if budget.is_time else None
        self._job = job
        self._dense = dense
        self._clock = clock if budget.is_time else None
        self._made: dict[int | None, BudgetCheck] = {}

    @property
    def measured(self) -> bool:
        """Whether shares are measured."""
        return self._clock is not None

    @property
    def by_table(self) -> bool:
        """Whether plans are drawn by measured latencies."""
        return self._time is not None

    def at(self, network: Network) -> BudgetCheck:
        """Return how plans are drawn and checked at `network`."""
        if network.side not in self._made:
            by_bytes = self.budget.kind == "size"
            self._made[network.side] = self._by_bytes(network) if by_bytes else self._by_macs(network)
        return self._made[network.side]

    def _by_macs(self, network: Network) -> BudgetCheck:
        structure, dense = network.structure, self._dense.structure.macs()
        if self._clock is None:
            check = partial(_macs_share, network, dense)
            whole = structure.macs() / dense
            return BudgetCheck(self._target(), structure.mac_cost, dense, whole, check, 1.0, COUNTED_WINDOW)
        timed = partial(_timed_share, self._job, self._clock, network)
        whole = 1.0 if network.is_dense_size else timed({})
        cost = structure.mac_cost
        if self._time is not None:
            dense_cost = self._dense.structure.mac_cost
            cost = self._time if network.is_dense_size else at_another_size(self._time, cost, dense_cost)
            dense = self._time.total()
        return BudgetCheck(self._target(), cost, dense, whole, timed, MEASURED_AIM, MEASURED_WINDOW)

    def _by_bytes(self, network: Network) -> BudgetCheck:
        file = (self._job.folder / "dense.onnx").stat().st_size
        cost = parameter_cost(network.raw, network.structure)
        # Metadata is not part of what is counted here, and the same in every file but for a few names.
        check = partial(_bytes_share, network, file, file + METADATA_BYTES - _count_bytes(self._dense, {}))
        return BudgetCheck(self._target(), cost, cost.total(), check({}), check, 1.0, COUNTED_WINDOW)

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


def _macs_share(network: Network, dense: float, keep: Keep) -> float:
    return count_macs(network.raw, network.structure, keep) / dense


def _count_bytes(network: Network, keep: Keep) -> int:
    """Return the bytes of a plan's file without its metadata."""
    return int(ir.to_proto(deploy(materialise(network.raw, network.structure, keep))).ByteSize())


def _bytes_share(network: Network, dense: int, metadata: int, keep: Keep) -> float:
    return (_count_bytes(network, keep) + metadata) / dense


def _timed_share(job: Job, clock: Clock, network: Network, keep: Keep, *, quiet: bool = False) -> float:
    key = job.key(network.model, keep=job.request.keep, prune_norms=job.request.prune_norms)
    return clock.share(key, network.raw, network.structure, keep, quiet=quiet)


def model_time(job: Job, dense: Network, clock: Clock, advance: Advance) -> Cost:
    """Return the model of time that the latency table of the dense network's groups gives on the clock's device."""
    time = partial(_timed_share, job, clock, dense, quiet=True)
    table = measure_table(dense.structure, dense.allowed_widths(job), time, advance)
    return fit_time(dense.structure.mac_cost, table)


def networks_for(budget: Budget, networks: Networks) -> tuple[Network, ...]:
    """Return where candidates of a budget are made: a smaller picture makes no smaller file."""
    pruned = networks.pruned
    return (max(pruned, key=lambda network: network.pixels),) if budget.kind == "size" and pruned else pruned


def plan_scaled(
    job: Job, measures: BudgetMeasures, networks: Networks, ranges: Mapping[str, SparsityRange], scores: Scores
) -> list[Plan]:
    """Return a plan per signal and size that meets the budget; none where the unpruned network is within it."""
    plans: list[Plan] = []
    for network in networks_for(measures.budget, networks):
        check = measures.at(network)
        if check.whole <= check.target:
            continue
        allowed = network.allowed_widths(job)
        met = meet(partial(_draw_scaled, network, allowed, ranges, check), check)
        counts, words = counts_of(met.draft.keep), _words(measures, met)
        for signal in scores:
            keep = select_indices(counts, group_scores(network.structure, scores[signal]))
            assignment = Assignment(signal, (measures.budget.strategy,), met.draft.sparsity)
            plans.append(ChannelPlan(assignment, side=network.side, planned_by=words, keep=keep))
        where = "" if network.is_dense_size else f" at {network.side} px"
        asked = f"{measures.budget.asked}{where}"
        unit = _UNITS[measures.budget.kind]
        job.note(*budget_notes(network.structure, allowed, counts, met, check, asked, unit))
    return plans


_UNITS = {"macs": "MACs", "size": "bytes", "speedup": "time", "latency": "time"}


def _words(measures: BudgetMeasures, met: Met) -> str:
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
    structure: Structure,
    allowed: Sequence[AllowedWidths],
    counts: Counts,
    met: Met,
    check: BudgetCheck,
    asked: str,
    unit: str,
) -> list[str]:
    """Say so when a budget cost groups the channel multiples of the target, or was missed, and what holds the rest."""
    notes = []
    finer = sum(counts[item.leaf] not in item.widths for item in allowed)
    if finer:
        notes.append(
            f"{asked}: {finer} of {len(allowed)} groups have widths between the target's multiples, "
            "which alone miss the budget by more than 3 %: expect less speed than the MACs say"
        )
    if not met.fits(check) or met.share < check.window[0] * check.target:
        held = sorted(structure.pinned, key=lambda item: -item.size * len(item.tensors))[:3]
        pins = "; ".join(f"{item.id}: {item.reason}" for item in held)
        reached = met.share / check.whole
        found = f"the nearest the widths reach is {reached:.3f} of the dense {unit} there"
        notes.append(f"{asked}: {found} (pinned: {pins})")
    return notes


@dataclass(frozen=True)
class _Rival:
    """One way to spend a budget: a plan of a network, and how it meets the budget."""

    network: Network
    plan: ChannelPlan
    met: Met

    @property
    def words(self) -> str:
        """Size and removed branches, for the report."""
        gone = f" without {' and '.join(self.plan.removed)}" if self.plan.removed else ""
        return f"{self.network.pixels} px{gone}"


def plan_by_sensitivity(job: Job, measures: BudgetMeasures, networks: Networks) -> list[Plan]:
    """Spend a budget on input size, blocks and, by measured sensitivity, width; what diverges least is the plan.

    At every size that is above the budget, none to a few of the cheapest blocks are removed and the rest is taken from
    widths. The divergence is from the dense network at its own size, on images that are held back at every size. Where
    training follows that teaches smaller sizes, the whole network at the largest size within the budget is a plan too.
    """
    budget = measures.budget
    measured = [network for network in networks_for(budget, networks) if network.sensitivities]
    if not measured:
        return []
    untouched = _plan_whole(measures, measured) if job.recovery.teaches_sizes else []
    with job.stages.stage(f"size, blocks or width at {budget.asked}") as advance:
        above = [network for network in measured if measures.at(network).whole > measures.at(network).target]
        rivals = [
            rival for network in above for rival in _spend(job, measures, network, networks.dense.branches, advance)
        ]
        fitting = [rival for rival in rivals if rival.met.fits(measures.at(rival.network))]
        if len(fitting) < 2:
            least = [min(rivals, key=lambda rival: rival.met.share)] if rivals else []
            return [*(rival.plan for rival in fitting or least), *untouched]
        tried: list[tuple[float, str, Plan]] = []
        for rival in fitting:
            diverges = _divergence(job, networks.dense, rival.network, rival.plan)
            tried.append((diverges, rival.words, rival.plan))
            advance(len(tried), len(fitting))
        within = [network for network in networks.others if _is_within(measures, network)]
        controls = [(_divergence(job, networks.dense, network, None), f"{network.side} px") for network in within]
    tried.sort(key=lambda item: item[0])
    text = ", ".join(f"{name} {kl:.3g}" for kl, name, _ in tried)
    note = f"{budget.asked} by sensitivity: {tried[0][1]} diverges least (nats: {text})"
    text = ", ".join(f"{name} {kl:.3g}" for kl, name in controls)
    job.note(note + (f"; the dense network within the budget: {text}" if text else ""))
    return [tried[0][2], *untouched]


def _is_within(measures: BudgetMeasures, network: Network) -> bool:
    if measures.budget.kind == "size":
        return False
    check = measures.at(network)
    return check.whole <= check.target


def _plan_whole(measures: BudgetMeasures, networks: Sequence[Network]) -> list[Plan]:
    """Return the plan that removes nothing at the largest size, below the dense one, that is within the budget."""
    within = [network for network in networks if not network.is_dense_size and _is_within(measures, network)]
    if not within:
        return []
    network = max(within, key=lambda item: item.pixels)
    keep = {group.leaf: np.ones(group.size, dtype=np.bool_) for group in network.structure.groups}
    assignment = Assignment("sensitivity", (measures.budget.strategy,), {})
    words = _words(measures, Met(Draft(keep), measures.at(network).whole, 0))
    return [ChannelPlan(assignment, side=network.side, planned_by=words, keep=keep)]


def _spend(
    job: Job, measures: BudgetMeasures, network: Network, measured: Sequence[MeasuredBranch], advance: Advance
) -> list[_Rival]:
    """Return one plan per set of removed blocks."""
    check, allowed = measures.at(network), network.allowed_widths(job)
    here = {item.branch.id: renamed(item.branch, network.leaves) for item in measured}
    sets = offers(measured, lambda branch: _saved(check.cost, here[branch.id]))
    rivals: list[_Rival] = []
    for removed in sets:
        branches = [here[item.id] for item in removed]
        met = meet(partial(_draw_by_sensitivity, network, allowed, branches, check), check)
        assignment = Assignment("sensitivity", (measures.budget.strategy,), {})
        plan = ChannelPlan(
            assignment,
            side=network.side,
            planned_by=_words(measures, met),
            keep=met.draft.keep,
            removed=tuple(item.id for item in removed),
        )
        rivals.append(_Rival(network, plan, met))
        advance(len(rivals), len(sets))
    return rivals


def _saved(cost: Cost, branch: Branch) -> float:
    """Return what the cost falls by without a branch."""
    return cost.total() - cost.total(dict.fromkeys(branch.leaves, 0.0))


def _draw_by_sensitivity(
    network: Network, allowed: Sequence[AllowedWidths], removed: Sequence[Branch], check: BudgetCheck, aim: float
) -> Draft:
    dense = aim * check.dense
    return Draft(allocate_rest(network.structure, check.cost, network.sensitivities, removed, dense, allowed))


def _divergence(job: Job, dense: Network, network: Network, plan: ChannelPlan | None) -> float:
    """Return what a screened plan diverges by on held-back images, nats; the whole network's without a plan."""
    assert dense.recovery is not None and network.data is not None
    what = None if plan is None else plan.digest()
    name = f"rivals/{control_file_name(network)}" if plan is None else f"rivals/{plan.file_name}-{plan.digest()[:12]}"
    images = len(dense.recovery.images)
    key = job.key(network.model, data=job.data_key, plan=what, select=job.request.select, images=images)
    stored = job.store.load_json(name, key)
    if stored is None:
        model = network.raw.model.clone() if plan is None else _screen(job, network, plan)
        held_back = _held_back_images(dense.recovery, network)
        labels = np.zeros(len(held_back), np.int64)
        logits = run_onnx(ir.to_proto(deploy(model)).SerializeToString(), [(held_back, labels)], cores())
        stored = [judge_answers(dense.recovery, logits).mean]
        job.store.save_json(name, key, stored)
    return float(stored[0])


def _held_back_images(dense: RecoveryContext, network: Network) -> Float32Array:
    """Return the images that decide at the dense size, as they are at the network's own."""
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
    """Score and plan. The scores are several times the model's size, and are let go once the plans are made."""
    dense = networks.dense
    scores, bounds = score_network(job, dense)
    with job.stages.stage("plan"):
        strategies = _plan_strategies(job, dense, scores, bounds)
        plans = [_move(plan, network) for network in networks.pruned for plan in strategies]
    ranges = apply_constraints(dense.layers, bounds, True)
    budgets = measures_of(job, dense)
    for measures in budgets:
        with job.stages.stage("plan budgets"):
            plans += plan_scaled(job, measures, networks, ranges, scores)
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
        assignments = [item for s in scores for item in assign(job.request.strategies, s, layers, ranges)]
        if kind == "n:m":
            found, left = plan_n_m(dense.raw, layers, scores, assignments)
            plans += found
            job.note(*_pattern_notes(left))
        else:
            plans += plan_all(dense.structure, layers, allowed, scores, assignments, (kind,))
    return plans


def measures_of(job: Job, dense: Network) -> list[BudgetMeasures]:
    """Return what every budget of the job is planned with; note what cannot be planned for."""
    budgets = job.budgets
    timed = any(budget.is_time for budget in budgets)
    clock = open_clock(job.folder / "dense.onnx", job.target, job.transport, job.store) if timed else None
    able = [budget for budget in budgets if budget.kind != "latency" or clock is not None]
    unable = [budget for budget in budgets if budget not in able]
    job.note(*(f"{item.asked}: no time is measured here, so no candidate is planned for it" for item in unable))
    time = None
    if clock is not None and job.request.allocate_by == "latency":
        with job.stages.stage("latency table") as advance:
            time = model_time(job, dense, clock, advance)
    elif job.request.allocate_by == "latency":
        job.note("--allocate-by latency: no time is measured here, so widths are allocated by multiply-adds")
    return [BudgetMeasures(job, dense, budget, clock, time) for budget in able]


def _move(plan: Plan, network: Network) -> Plan:
    """Return a plan of the dense network for the network at another size."""
    if isinstance(plan, ChannelPlan):
        return replace(plan, keep=network.translate(plan.keep), side=network.side)
    return replace(plan, side=network.side)


def _pattern_notes(dense: Mapping[str, str]) -> list[str]:
    """Say once per reason which layers stay dense under an n:m pattern."""
    by_reason: dict[str, list[str]] = {}
    for fqn, reason in dense.items():
        by_reason.setdefault(reason, []).append(fqn)
    return [
        f"n:m: {len(names)} layers stay dense ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}): {reason}"
        for reason, names in by_reason.items()
    ]
