"""Recovery of the best candidates: the closed form's second step, then tuning or fine-tuning.

candidates -> the front and budgets -> walked -> improved by the recovery that was asked for
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mm_edge.errors import ParityError
from mm_edge.plan.plans import Plan
from mm_edge.progress import Advance
from mm_edge.records import Candidate, DenseFigures
from mm_edge.run.job import Job
from mm_edge.run.make import MakeSettings, make_candidate
from mm_edge.run.networks import Networks
from mm_edge.run.reuse import load_or_make
from mm_edge.run.work import Work
from mm_edge.select import mark_pareto, quality
from mm_edge.store import hash_file

# Returns a recovered candidate: (its number among those chosen, the candidate, its plan, digest of its weights).
Improve = Callable[[int, Candidate, Plan, str], Candidate]


def walk_front(
    job: Job,
    networks: Networks,
    settings: MakeSettings,
    plans: Mapping[str, Plan],
    candidates: Sequence[Candidate],
    dense: DenseFigures,
) -> list[Candidate]:
    """Take the closed form's second, slower step for the candidates on the front and for what the budgets asked for.

    With --effort quick it is left out. Controls are not compared here, because this step may make a candidate better
    than a control.
    """
    if job.request.effort == "quick" or all(network.recovery is None for network in networks):
        return list(candidates)
    front = _worth_walking(networks, plans, candidates, dense)

    def walk(index: int, candidate: Candidate, plan: Plan, screened: str) -> Candidate:
        step = "walk, held out" if settings.held_out else "walk"
        key = job.key(data=job.data_key, plan=plan.digest(), recover=step, select=settings.select, screened=screened)
        network = networks.at(plan.side)
        make = lambda: make_candidate(network, plan, settings, walked=True)  # noqa: E731
        return load_or_make(job, f"walked/{plan.file_name}", key, make)

    with job.stages.stage("walk the front") as advance:
        return _improve(job, candidates, front, plans, walk, lambda done: advance(done, len(front)))


def _worth_walking(
    networks: Networks, plans: Mapping[str, Plan], candidates: Sequence[Candidate], dense: DenseFigures
) -> list[Candidate]:
    """Return the structured candidates to walk: those on the front and of the budgets.

    Where class scores are not what is compared, only the best of each budget is walked. The screened candidates by a
    signal are then far behind those by sensitivity, and a walk of a detector takes minutes.
    """
    structured = [item for item in candidates if item.kind == "structured"]
    recovery = networks.dense.recovery
    if recovery is not None and recovery.judged.class_scores is None:
        return worth_training(structured, dense)
    marked = mark_pareto(candidates, dense)
    return [
        item for item in marked if item.kind == "structured" and (item.pareto or _is_of_budget(item, plans[item.id]))
    ]


def improve_front(
    job: Job,
    networks: Networks,
    settings: MakeSettings,
    plans: Mapping[str, Plan],
    candidates: Sequence[Candidate],
    dense: DenseFigures,
) -> list[Candidate]:
    """Let the recovery improve the candidates that `worth_training` returns."""
    recovery = job.recovery
    improve = recovery.improve
    if improve is None:
        return list(candidates)
    chosen = [item for item in worth_training(candidates, dense) if item.kind in recovery.improves]

    def work(index: int, candidate: Candidate, plan: Plan, start: str) -> Candidate:
        progress = _progress_of(advance, index, len(chosen))
        improved: Candidate = improve(Work(job, networks, settings, plan, candidate, start, progress))
        return improved

    with job.stages.stage(recovery.stage) as advance:
        return _improve(job, candidates, chosen, plans, work)


def drop_repeated_controls(job: Job, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates without those that are the same network as a control, and note which.

    A budget may ask for the unpruned network at a smaller size, to be tuned. If tuning did not improve it, it is the
    same network as the control.
    """
    again = [item for item in candidates if item.is_budget and not item.is_pruned and item.recovered_by != "tune"]
    job.note(*(f"{item.id}, the whole network, is the control again: {item.stopped or 'not tuned'}" for item in again))
    return [item for item in candidates if item not in again]


def worth_training(candidates: Sequence[Candidate], dense: DenseFigures) -> list[Candidate]:
    """Return the candidates to train: for each kind those on the front, and for each budget the most accurate only.

    For a budget, the unpruned network at a smaller size is not compared with pruned candidates, because it is the same
    as the control until it is trained. Structured candidates are compared by accuracy against MACs; masks change no
    MACs and are compared by sparsity. If one was not compared with labels or the dense network, all are returned.
    """
    if any(item.merit is None for item in candidates):
        return list(candidates)
    budgets: dict[tuple[str, bool], list[Candidate]] = {}
    for item in candidates:
        if item.is_budget:
            budgets.setdefault((item.strategy, item.is_pruned), []).append(item)
    best = {max(rivals, key=quality).id for rivals in budgets.values()}
    # The MACs of one budget's candidates differ so little that all of them may be on the front.
    beaten = {item.id for rivals in budgets.values() for item in rivals} - best
    front: set[str] = set()
    for kind in dict.fromkeys(item.kind for item in candidates):
        same_kind = [item for item in candidates if item.kind == kind]
        if kind == "structured":
            front |= {item.id for item in mark_pareto(same_kind, dense) if item.pareto}
        else:
            front |= {item.id for item in same_kind if not any(_is_beaten(item, other) for other in same_kind)}
    return [item for item in candidates if item.id in (front | best) - beaten]


def _is_beaten(candidate: Candidate, other: Candidate) -> bool:
    """Return whether `other` is no less sparse and no less good than the candidate, and better in one."""
    own, theirs = (candidate.sparsity, *quality(candidate)), (other.sparsity, *quality(other))
    no_worse = theirs[0] >= own[0] and theirs[1:] >= own[1:]
    return no_worse and own != theirs


def _is_of_budget(candidate: Candidate, plan: Plan) -> bool:
    """Return whether a candidate of a budget is walked: at other input sizes only those by sensitivity are."""
    return candidate.is_budget and (plan.side is None or candidate.signal == "sensitivity")


def _improve(
    job: Job,
    candidates: Sequence[Candidate],
    chosen: Sequence[Candidate],
    plans: Mapping[str, Plan],
    make: Improve,
    done: Callable[[int], None] = lambda count: None,
) -> list[Candidate]:
    """Return the candidates with what `make` returns in place of each `chosen` one.

    Where brain surgeon chose the channels, several signals may have led to the same weights; these are made once.
    """
    by_id = {item.id: item for item in candidates}
    made: dict[str, Candidate] = {}
    for index, candidate in enumerate(chosen):
        assert candidate.masked_state_dict is not None
        plan = plans[candidate.id]
        digest = f"{hash_file(job.folder / candidate.masked_state_dict)}@{plan.side}"
        if digest not in made:
            try:
                made[digest] = make(index, candidate, plan, digest)
            except ParityError as error:
                job.note(str(error))
                continue
        by_id[candidate.id] = replace(
            made[digest],
            id=candidate.id,
            signal=candidate.signal,
            strategy=candidate.strategy,
            also_named=candidate.also_named,
            planned_by=candidate.planned_by,
        )
        done(index + 1)
    return list(by_id.values())


def _progress_of(advance: Advance, index: int, count: int) -> Advance:
    """Return the progress of candidate `index` of `count`, in thousandths: candidates differ in their steps."""
    return lambda done, total: advance(1000 * index + 1000 * done // total, 1000 * count)
