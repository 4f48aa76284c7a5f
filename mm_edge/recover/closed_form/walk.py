"""The walk of E9: a pruned network recovered consumer by consumer, from its input to its output.

From the first consumer that lost inputs on, each one's inputs h come from the student as recovered so far; its wanted
output is the dense block's output less the student's own skip connection. What the walk solved is one proposal among
others (the screened weights, a gentle ridge, the dense weights, more or less of the outputs' spread restored):
held-back images decide.

Where the block adds to a skip connection, most of what is missing may be upstream's: restoring the spread of all of it
through one branch would shout. Elsewhere the whole spread is restored at first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mm_edge.arrays import Array, Arrays, BoolArray, Float64Array
from mm_edge.graph.axes import Keep
from mm_edge.graph.partial import Frontier, RunnableGraph, narrowest
from mm_edge.progress import Advance
from mm_edge.recover.closed_form.consumers import Consumer, read_branch
from mm_edge.recover.closed_form.context import (
    Judged,
    RecoveryContext,
    is_better,
    judge,
    pruned_network,
    rescale,
)
from mm_edge.recover.closed_form.moments import Moments, collect_paired, is_live
from mm_edge.recover.closed_form.solve import KeptBlocks, fit, kept_blocks

Proposal = Arrays

RIDGES = {"re-solved": 0.01, "gently": 0.1, "very gently": 1.0, "dense, mean moved": np.inf}
SHARES = {"alone": (1.0, 1.5, 0.0), "beside a skip": (0.0, 0.5)}


@dataclass(frozen=True)
class Way:
    """One way of solving a consumer: by the name and lambda of its ridge, and the share of the spread restored."""

    name: str
    ridge: float
    share: float


@dataclass(frozen=True)
class Walked:
    """The student after the walk: what was taken per weight (None: as screened), and the held-back divergence.

    `fitted` are the tensors that divergence is of; `tensors` were then solved again, held-back images included.
    """

    tensors: Arrays
    fitted: Arrays
    taken: Mapping[str, Way | None]
    kl_held_back: float


def walk(context: RecoveryContext, keep: Keep, screened: Arrays, progress: Advance | None = None) -> Walked:
    """Walk the candidate that `screened` (dense-shaped, masked) starts from; held back, it never becomes worse.

    What the held-back images decided is then solved again with them among the images: they are a fifth of all.
    """
    student = pruned_network(context, keep, screened)
    fitted = Frontier(student, context.images, context.fitted)
    held = Frontier(student, context.images, context.held_back)
    best = judge(context, student, held)
    taken: dict[str, Way | None] = {}
    changed: set[str] = set()
    affected = _affected(context, student, keep)
    for done, consumer in enumerate(affected):
        _advance_(student, consumer, context.threads, fitted, held)
        problem = _pose(context, student, consumer, keep, fitted)
        taken[consumer.weight], best = _decide_(context, student, problem, held, best)
        if taken[consumer.weight] is not None:
            changed |= set(problem.arrays)
        if progress is not None:
            progress(done + 1, len(affected))
    found = [_widen(context, keep, student, screened, changed), _solve_again(context, keep, screened, taken)]
    fitted_tensors, tensors = (rescale(context, keep, item, best.scale) for item in found)
    return Walked(tensors, fitted_tensors, taken, best.mean)


def _decide_(
    context: RecoveryContext, student: RunnableGraph, problem: _Problem, held: Frontier, best: Judged
) -> tuple[Way | None, Judged]:
    """Put the way into `student` that diverges least, if any is better than what is there; return it.

    Every ridge is tried with the first share, then the other shares with the ridge that came out best.
    """
    first, *others = SHARES["alone" if problem.skip is None else "beside a skip"]
    tried: dict[Way, tuple[Proposal, Judged]] = {}

    def attempt(way: Way) -> None:
        proposal = problem.solve(way)
        student.arrays.update(proposal)
        tried[way] = proposal, judge(context, student, held)

    def least() -> Way:
        return min(tried, key=lambda way: tried[way][1].mean)

    for name, ridge in RIDGES.items():
        attempt(Way(name, ridge, first))
    middle = least()
    for share in others:
        attempt(replace(middle, share=share))
    chosen = least()
    proposal, found = tried[chosen]
    if not is_better(found, best):
        student.arrays.update(problem.arrays)
        return None, best
    student.arrays.update(proposal)
    return chosen, found


def _solve_again(context: RecoveryContext, keep: Keep, screened: Arrays, taken: Mapping[str, Way | None]) -> Arrays:
    """Return the tensors of a walk over all images in which each consumer takes what was decided for it."""
    student = pruned_network(context, keep, screened)
    everything = Frontier(student, context.images, (*context.fitted, *context.held_back))
    changed: set[str] = set()
    for consumer in _in_order(context):
        way = taken.get(consumer.weight)
        if way is None:
            continue
        _advance_(student, consumer, context.threads, everything)
        proposal = _pose(context, student, consumer, keep, everything).solve(way)
        student.arrays.update(proposal)
        changed |= set(proposal)
    return _widen(context, keep, student, screened, changed)


def _advance_(student: RunnableGraph, consumer: Consumer, threads: int, *frontiers: Frontier) -> None:
    """Move the frontiers on to the narrowest place before `consumer`."""
    for frontier in frontiers:
        cut = narrowest(student, frontier.position, student.position(consumer.node))
        frontier.advance_(student, cut, threads)


def _in_order(context: RecoveryContext) -> list[Consumer]:
    found = [item for item in context.consumers.values() if item.node in context.dense.results]
    return sorted(found, key=lambda item: context.network.position(item.node))


def _affected(context: RecoveryContext, student: RunnableGraph, keep: Keep) -> list[Consumer]:
    """Return, in order, the consumers from the first that lost columns on: what they read is no longer what it was."""
    present = [item for item in _in_order(context) if student.holds(item.node)]
    first = next((at for at, item in enumerate(present) if not _blocks(context, item, keep).whole), len(present))
    return present[first:]


def _blocks(context: RecoveryContext, consumer: Consumer, keep: Keep) -> KeptBlocks:
    return kept_blocks(context.structure, consumer, context.network.arrays[consumer.weight].shape, keep)


@dataclass(frozen=True)
class _Problem:
    """One consumer of the student, and the moments that say what its weight should be.

    Attributes:
        consumer: with as many groups as the student keeps.
        arrays: the student's tensors that a solution changes, by name.
        start: the dense weight's kept part, as blocks.
        moments: what it reads, paired with what it should put out.
        live: which outputs reach the branch's result.
        skip: what is added to the branch, if anything.
    """

    consumer: Consumer
    arrays: Mapping[str, Array]
    start: Float64Array
    moments: Moments
    live: BoolArray
    skip: str | None

    def solve(self, way: Way) -> Proposal:
        """Return the compact tensors that `way` would put in."""
        shift = self.consumer.shift
        solved, change = fit(self.start, self.moments, way.ridge, 0.0 if shift is None else way.share)
        solved = np.where(self.live[:, :, None], solved, self.start)
        weight = self.consumer.weight
        proposal = {weight: self.consumer.weight_of(solved, self.arrays[weight])}
        if shift is not None:
            proposal[shift.tensor] = shift.moved(
                self.arrays[shift.tensor], np.where(self.live, change, 0.0).reshape(-1)
            )
        return proposal


def _pose(
    context: RecoveryContext, student: RunnableGraph, consumer: Consumer, keep: Keep, images: Frontier
) -> _Problem:
    """Return the problem of `consumer` with the student as it is now, its moments taken over `images`."""
    kept = _blocks(context, consumer, keep)
    rows = np.zeros((consumer.groups, len(kept.outputs)), dtype=np.bool_)
    rows[np.ix_(kept.groups, kept.outputs)] = True
    results = context.dense.results[consumer.node][:, :, rows.reshape(-1)]
    start = consumer.matrix(context.network.arrays[consumer.weight])
    start = start[kept.groups][:, kept.outputs][:, :, kept.columns]
    consumer = replace(consumer, groups=len(start))
    moments = collect_paired(student, consumer, images, images.numbers, results, context.threads)
    branch = read_branch(student, consumer)
    live = is_live(branch).reshape(start.shape[:2])
    changed = [consumer.weight] if consumer.shift is None else [consumer.weight, consumer.shift.tensor]
    arrays = {name: student.arrays[name] for name in changed}
    return _Problem(consumer, arrays, start, moments, live, branch.skip)


def _widen(context: RecoveryContext, keep: Keep, student: RunnableGraph, screened: Arrays, changed: set[str]) -> Arrays:
    """Return the changed compact tensors at their dense shapes; removed running means keep their dense values."""
    tensors = dict(screened)
    for name in changed:
        dense = context.network.arrays[name]
        full = np.zeros_like(dense) if name in context.raw.parameters else dense.copy()
        where = np.ix_(*(np.flatnonzero(axis) for axis in context.structure.kept(name, keep)))
        full[where] = student.arrays[name]
        tensors[name] = full
    return tensors
