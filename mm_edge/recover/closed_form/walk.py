"""The walk: a pruned network recovered consumer by consumer, from its input to its output (E9 in docs/method.md).

The walk starts at the first consumer that lost inputs. A consumer's inputs h come from the pruned network as recovered
so far. Its wanted output is the dense network's result minus the pruned network's own skip connection (consumers.py).
Every consumer is solved several times, with other ridges and with other shares of its outputs' spread restored. The
held-back images choose among these solutions and the screened weights that the walk started from.

Where the consumer's result is added to a skip connection, an earlier layer may have caused most of the error. To
restore the whole spread through this one consumer would then make its output too large, so the first share tried is 0.
Elsewhere the first share is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mm_edge.arrays import Array, Arrays, BoolArray, Float64Array
from mm_edge.graph.axes import Keep
from mm_edge.graph.partial import Frontier, RunnableGraph, narrowest
from mm_edge.progress import Advance
from mm_edge.recover.closed_form.consumers import Consumer, read_product_path
from mm_edge.recover.closed_form.context import RecoveryContext, pruned_graph
from mm_edge.recover.closed_form.judging import Judged, is_better, judge, rescale
from mm_edge.recover.closed_form.moments import Moments, collect_paired, is_live
from mm_edge.recover.closed_form.solve import KeptBlocks, fit, kept_blocks

# The lambdas that are tried, by the name that notes give them.
RIDGES = {"re-solved": 0.01, "gently": 0.1, "very gently": 1.0, "dense, mean moved": np.inf}
# The shares of the spread that are tried, without a skip connection and with one.
SHARES_ALONE = (1.0, 1.5, 0.0)
SHARES_BESIDE_SKIP = (0.0, 0.5)


@dataclass(frozen=True)
class SolveOptions:
    """How a consumer is solved: lambda, the name that notes give it, and the share of the spread that is restored."""

    name: str
    ridge: float
    share: float


@dataclass(frozen=True)
class Walked:
    """The pruned network after the walk.

    Attributes:
        tensors: dense-shaped and masked, by name, solved on all images.
        fitted: the same, solved without the held-back images.
        chosen: how every walked consumer was solved, by its weight; None where its screened weight stays.
        kl_held_back: the divergence of `fitted` on the held-back images, in nats.
    """

    tensors: Arrays
    fitted: Arrays
    chosen: Mapping[str, SolveOptions | None]
    kl_held_back: float


def walk(context: RecoveryContext, keep: Keep, screened: Arrays, progress: Advance | None = None) -> Walked:
    """Walk a candidate from its `screened` tensors (dense-shaped, masked) on.

    On the held-back images, what is solved without them is never worse than the start. Once every choice is made, the
    same choices are solved again on all images, because the held-back ones are a fifth of them.

    Args:
        context: of the dense network.
        keep: the indices that stay, by group.
        screened: the candidate's tensors by name, from `screen`.
        progress: called with (consumers walked, of how many).
    """
    pruned = pruned_graph(context, keep, screened)
    fitted = Frontier(pruned, context.images, context.fitted)
    held = Frontier(pruned, context.images, context.held_back)
    best = judge(context, pruned, held)
    chosen: dict[str, SolveOptions | None] = {}
    changed: set[str] = set()
    affected = _affected(context, pruned, keep)
    for done, consumer in enumerate(affected):
        _advance_(pruned, consumer, context.threads, fitted, held)
        problem = _pose(context, pruned, consumer, keep, fitted)
        chosen[consumer.weight], best = _choose_(context, pruned, problem, held, best)
        if chosen[consumer.weight] is not None:
            changed |= set(problem.arrays)
        if progress is not None:
            progress(done + 1, len(affected))
    found = [_widen(context, keep, pruned, screened, changed), _solve_again(context, keep, screened, chosen)]
    fitted_tensors, tensors = (rescale(context, keep, item, best.scale) for item in found)
    return Walked(tensors, fitted_tensors, chosen, best.mean)


def _choose_(
    context: RecoveryContext, pruned: RunnableGraph, problem: _Problem, held: Frontier, best: Judged
) -> tuple[SolveOptions | None, Judged]:
    """Put the solution with the least divergence into `pruned` if it is better than what is there now.

    Every ridge is tried with the first share, then the best of these ridges with every other share.

    Returns:
        The options of the solution, None where nothing was better, and how far `pruned` is from dense now.
    """
    first, *others = SHARES_ALONE if problem.skip is None else SHARES_BESIDE_SKIP
    tried: dict[SolveOptions, tuple[Arrays, Judged]] = {}

    def attempt(options: SolveOptions) -> None:
        solution = problem.solve(options)
        pruned.arrays.update(solution)
        tried[options] = solution, judge(context, pruned, held)

    def least() -> SolveOptions:
        return min(tried, key=lambda options: tried[options][1].mean)

    for name, ridge in RIDGES.items():
        attempt(SolveOptions(name, ridge, first))
    best_ridge = least()
    for share in others:
        attempt(replace(best_ridge, share=share))
    chosen = least()
    solution, found = tried[chosen]
    if not is_better(found, best):
        pruned.arrays.update(problem.arrays)
        return None, best
    pruned.arrays.update(solution)
    return chosen, found


def _solve_again(
    context: RecoveryContext, keep: Keep, screened: Arrays, chosen: Mapping[str, SolveOptions | None]
) -> Arrays:
    """Return the tensors of a walk over all images in which every consumer is solved as it was `chosen` to be."""
    pruned = pruned_graph(context, keep, screened)
    everything = Frontier(pruned, context.images, (*context.fitted, *context.held_back))
    changed: set[str] = set()
    for consumer in _in_order(context):
        options = chosen.get(consumer.weight)
        if options is None:
            continue
        _advance_(pruned, consumer, context.threads, everything)
        solution = _pose(context, pruned, consumer, keep, everything).solve(options)
        pruned.arrays.update(solution)
        changed |= set(solution)
    return _widen(context, keep, pruned, screened, changed)


def _advance_(pruned: RunnableGraph, consumer: Consumer, threads: int, *frontiers: Frontier) -> None:
    """Move the frontiers forward to the narrowest position before `consumer`."""
    for frontier in frontiers:
        cut = narrowest(pruned, frontier.position, pruned.position(consumer.node))
        frontier.advance_(pruned, cut, threads)


def _in_order(context: RecoveryContext) -> list[Consumer]:
    found = [item for item in context.consumers.values() if item.node in context.dense.results]
    return sorted(found, key=lambda item: context.graph.position(item.node))


def _affected(context: RecoveryContext, pruned: RunnableGraph, keep: Keep) -> list[Consumer]:
    """Return, in graph order, the first consumer that lost columns and all after it: what these read has changed."""
    present = [item for item in _in_order(context) if pruned.holds(item.node)]
    first = next((at for at, item in enumerate(present) if not _blocks(context, item, keep).whole), len(present))
    return present[first:]


def _blocks(context: RecoveryContext, consumer: Consumer, keep: Keep) -> KeptBlocks:
    return kept_blocks(context.structure, consumer, context.graph.arrays[consumer.weight].shape, keep)


@dataclass(frozen=True)
class _Problem:
    """One consumer of the pruned network, and the moments that say what its weight should be.

    Attributes:
        consumer: with as many groups as the pruned network keeps.
        arrays: the pruned network's tensors that a solution changes, by name, as they are now.
        start: the kept part of the dense weight, (G, O, K).
        moments: of what the consumer reads, paired with what it should put out.
        live: which outputs reach the result of the consumer's path, (G, O).
        skip: name of the value that is added to the consumer's path; None without one.
    """

    consumer: Consumer
    arrays: Mapping[str, Array]
    start: Float64Array
    moments: Moments
    live: BoolArray
    skip: str | None

    def solve(self, options: SolveOptions) -> Arrays:
        """Return the solved tensors by name, in the compact shapes."""
        shift = self.consumer.shift
        solved, change = fit(self.start, self.moments, options.ridge, 0.0 if shift is None else options.share)
        solved = np.where(self.live[:, :, None], solved, self.start)
        weight = self.consumer.weight
        solution = {weight: self.consumer.weight_of(solved, self.arrays[weight])}
        if shift is not None:
            moved = np.where(self.live, change, 0.0).reshape(-1)
            solution[shift.tensor] = shift.moved(self.arrays[shift.tensor], moved)
        return solution


def _pose(
    context: RecoveryContext, pruned: RunnableGraph, consumer: Consumer, keep: Keep, images: Frontier
) -> _Problem:
    """Return the problem of `consumer` in the pruned network as it is now, with moments over `images`."""
    kept = _blocks(context, consumer, keep)
    rows = np.zeros((consumer.groups, len(kept.outputs)), dtype=np.bool_)
    rows[np.ix_(kept.groups, kept.outputs)] = True
    results = context.dense.results[consumer.node][:, :, rows.reshape(-1)]
    start = consumer.matrix(context.graph.arrays[consumer.weight])
    start = start[kept.groups][:, kept.outputs][:, :, kept.columns]
    consumer = replace(consumer, groups=len(start))
    moments = collect_paired(pruned, consumer, images, images.numbers, results, context.threads, context.emphasis)
    path = read_product_path(pruned, consumer)
    live = is_live(path).reshape(start.shape[:2])
    changed = [consumer.weight] if consumer.shift is None else [consumer.weight, consumer.shift.tensor]
    arrays = {name: pruned.arrays[name] for name in changed}
    return _Problem(consumer, arrays, start, moments, live, path.skip)


def _widen(context: RecoveryContext, keep: Keep, pruned: RunnableGraph, screened: Arrays, changed: set[str]) -> Arrays:
    """Return `screened` with the `changed` tensors of `pruned` in their dense shapes.

    Removed indices are zero in parameters; in buffers (running means) they keep their dense values.
    """
    tensors = dict(screened)
    for name in changed:
        dense = context.graph.arrays[name]
        full = np.zeros_like(dense) if name in context.raw.parameters else dense.copy()
        where = np.ix_(*(np.flatnonzero(axis) for axis in context.structure.kept(name, keep)))
        full[where] = pruned.arrays[name]
        tensors[name] = full
    return tensors
