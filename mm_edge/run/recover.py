"""The candidates worth more work: the closed form's second step, then tuning or fine-tuning.

made candidates -> front and budgets -> walked again -> improved by the recovery that was asked for
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mm_edge.errors import ParityError
from mm_edge.plan.plans import Plan
from mm_edge.progress import Advance
from mm_edge.records import Candidate, DenseRow
from mm_edge.run.job import Job
from mm_edge.run.kept import kept
from mm_edge.run.make import MakeSettings, make_candidate
from mm_edge.run.networks import Networks
from mm_edge.run.work import Work
from mm_edge.select import mark_pareto, quality
from mm_edge.store import hash_file

# Makes one candidate better: (its number among those chosen, the candidate, its plan, digest of its weights).
Improve = Callable[[int, Candidate, Plan, str], Candidate]


def walk_front(
    job: Job,
    networks: Networks,
    settings: MakeSettings,
    plans: Mapping[str, Plan],
    candidates: Sequence[Candidate],
    dense: DenseRow,
) -> list[Candidate]:
    """Take the closed form's second, slower step for the candidates on the front and for what the budgets asked for.

    The controls do not compete here: the step is what may bring a candidate past them.
    """
    if all(network.recovery is None for network in networks):
        return list(candidates)
    marked = mark_pareto(candidates, dense)
    front = [item for item in marked if item.kind == "structured" and (item.pareto or _asked_for(item, plans[item.id]))]

    def walk(index: int, candidate: Candidate, plan: Plan, screened: str) -> Candidate:
        step = "walk, held out" if settings.held_out else "walk"
        key = job.key(data=job.data_key, plan=plan.digest(), recover=step, select=settings.select, screened=screened)
        network = networks.at(plan.side)
        make = lambda: make_candidate(network, plan, settings, walked=True)  # noqa: E731
        return kept(job, f"walked/{plan.file_name}", key, make)

    with job.stages.stage("walk the front") as advance:
        return _improve(job, candidates, front, plans, walk, lambda done: advance(done, len(front)))


def improve_front(
    job: Job,
    networks: Networks,
    settings: MakeSettings,
    plans: Mapping[str, Plan],
    candidates: Sequence[Candidate],
    dense: DenseRow,
) -> list[Candidate]:
    """Let the recovery improve the candidates that are worth it, each from what was made of it before."""
    recovery = job.recovery
    improve = recovery.improve
    if improve is None:
        return list(candidates)
    chosen = [item for item in worth_training(candidates, dense) if item.kind in recovery.improves]

    def work(index: int, candidate: Candidate, plan: Plan, start: str) -> Candidate:
        share = _share(advance, index, len(chosen))
        improved: Candidate = improve(Work(job, networks, settings, plan, candidate, start, share))
        return improved

    with job.stages.stage(recovery.stage) as advance:
        return _improve(job, candidates, chosen, plans, work)


def drop_repeated_controls(job: Job, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates without those that are a control again, and note which.

    A budget may ask for the whole network at a smaller size, to be tuned; where tuning did not better it, it is no
    other network than the control.
    """
    again = [item for item in candidates if item.is_budget and not item.is_pruned and item.recovered_by != "tune"]
    job.note(*(f"{item.id}, the whole network, is the control again: {item.stopped or 'not tuned'}" for item in again))
    return [item for item in candidates if item not in again]


def worth_training(candidates: Sequence[Candidate], dense: DenseRow) -> list[Candidate]:
    """Return the candidates to train: per kind those that nothing beats, and of every budget the most accurate alone.

    A whole network on smaller pictures does not compete with what is pruned: it is the control until it is trained.

    Structured candidates are compared by accuracy against MACs; masks change no MACs and are compared by sparsity.
    Without accuracy nothing can be compared, and all are returned.
    """
    if any(item.accuracy_top1 is None for item in candidates):
        return list(candidates)
    budgets: dict[tuple[str, bool], list[Candidate]] = {}
    for item in candidates:
        if item.is_budget:
            budgets.setdefault((item.strategy, item.is_pruned), []).append(item)
    best = {max(rivals, key=quality).id for rivals in budgets.values()}
    # Candidates of one budget differ by a hair in MACs, so that all of them may be on the front.
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
    """Return whether `other` beats the candidate: no less sparse, no less good, and better in one."""
    mine, theirs = (candidate.sparsity, *quality(candidate)), (other.sparsity, *quality(other))
    no_worse = theirs[0] >= mine[0] and theirs[1:] >= mine[1:]
    return no_worse and mine != theirs


def _asked_for(candidate: Candidate, plan: Plan) -> bool:
    """Return whether a budget asked for a candidate: at sizes besides the dense one, the best by sensitivity only."""
    return candidate.is_budget and (plan.side is None or candidate.signal == "sensitivity")


def _improve(
    job: Job,
    candidates: Sequence[Candidate],
    chosen: Sequence[Candidate],
    plans: Mapping[str, Plan],
    make: Improve,
    done: Callable[[int], None] = lambda count: None,
) -> list[Candidate]:
    """Put in place of each `chosen` candidate what `make` makes of it.

    Where brain surgeon chose the channels, plans of several signals have become one network: it is made once.
    """
    by_id = {item.id: item for item in candidates}
    same: dict[str, Candidate] = {}
    for index, candidate in enumerate(chosen):
        assert candidate.masked_state_dict is not None
        plan = plans[candidate.id]
        digest = f"{hash_file(job.folder / candidate.masked_state_dict)}@{plan.side}"
        if digest not in same:
            try:
                same[digest] = make(index, candidate, plan, digest)
            except ParityError as error:
                job.note(str(error))
                continue
        by_id[candidate.id] = replace(
            same[digest],
            id=candidate.id,
            signal=candidate.signal,
            strategy=candidate.strategy,
            also_named=candidate.also_named,
            planned_by=candidate.planned_by,
        )
        done(index + 1)
    return list(by_id.values())


def _share(advance: Advance, index: int, count: int) -> Advance:
    """Return how one of `count` candidates reports, in thousandths: at other sizes training takes other steps."""
    return lambda done, total: advance(1000 * index + 1000 * done // total, 1000 * count)
