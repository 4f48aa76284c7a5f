"""The walk of E9: a pruned network recovered consumer by consumer, from its input to its output.

Each consumer's inputs h come from the student as recovered so far; its wanted output is the dense block's output
less the student's own skip connection. What the walk solved is one proposal among others (the screened weights, a
gentle ridge, the dense weights): held-back images decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mm_edge.graph.compact import Keep, materialise
from mm_edge.progress import Advance
from mm_edge.recover.consumers import Consumer, read_branch
from mm_edge.recover.context import RecoveryContext, Tensors, divergences, is_better
from mm_edge.recover.moments import Moments, collect_paired, is_live
from mm_edge.recover.network import Frontier, Network, narrowest
from mm_edge.recover.solve import KeptBlocks, fit, kept_blocks

Floats = npt.NDArray[np.float64]
Proposal = dict[str, npt.NDArray[Any]]

RIDGES = {"re-solved": 0.01, "gently": 0.1, "very gently": 1.0, "dense, mean moved": np.inf}


@dataclass(frozen=True)
class Walked:
    """The student after the walk: what was taken per weight, and the divergence on held-back images."""

    tensors: Tensors
    taken: Mapping[str, str]
    kl_held_back: float


def walk(context: RecoveryContext, keep: Keep, screened: Tensors, progress: Advance | None = None) -> Walked:
    """Walk the candidate that `screened` (dense-shaped, masked) starts from; held back, it never becomes worse.

    What the held-back images decided is then solved again with them among the images: they are a fifth of all.
    """
    student = Network(materialise(context.raw, context.structure, keep, screened))
    fitted = Frontier(student, context.images, context.fitted)
    held = Frontier(student, context.images, context.held_back)
    best = divergences(context, student, held)
    taken: dict[str, str] = {}
    pruned = [
        item for item in _in_order(context) if not _blocks(context, item, keep).whole and student.holds(item.node)
    ]
    for done, consumer in enumerate(pruned):
        _advance_(student, consumer, context.threads, fitted, held)
        taken[consumer.weight] = "screened"
        for name, proposal in _proposals(context, student, consumer, keep, fitted, RIDGES).items():
            before = {tensor: student.arrays[tensor] for tensor in proposal}
            student.arrays.update(proposal)
            found = divergences(context, student, held)
            if is_better(found, best):
                best, taken[consumer.weight] = found, name
            else:
                student.arrays.update(before)
        if progress is not None:
            progress(done + 1, len(pruned))
    tensors = _solve_again(context, keep, screened, taken)
    return Walked(tensors, taken, max(0.0, float(best.mean())))


def _solve_again(context: RecoveryContext, keep: Keep, screened: Tensors, taken: Mapping[str, str]) -> Tensors:
    """Return the tensors of a walk over all images in which each consumer takes what was decided for it."""
    student = Network(materialise(context.raw, context.structure, keep, screened))
    everything = Frontier(student, context.images, (*context.fitted, *context.held_back))
    changed: set[str] = set()
    for consumer in _in_order(context):
        name = taken.get(consumer.weight, "screened")
        if name == "screened":
            continue
        _advance_(student, consumer, context.threads, everything)
        (proposal,) = _proposals(context, student, consumer, keep, everything, {name: RIDGES[name]}).values()
        student.arrays.update(proposal)
        changed |= set(proposal)
    return _widen(context, keep, student, screened, changed)


def _advance_(student: Network, consumer: Consumer, threads: int, *frontiers: Frontier) -> None:
    """Move the frontiers on to the narrowest place before `consumer`."""
    for frontier in frontiers:
        cut = narrowest(student, frontier.position, student.position(consumer.node))
        frontier.advance_(student, cut, threads)


def _in_order(context: RecoveryContext) -> list[Consumer]:
    found = [item for item in context.consumers.values() if item.node in context.dense.results]
    return sorted(found, key=lambda item: context.network.position(item.node))


def _blocks(context: RecoveryContext, consumer: Consumer, keep: Keep) -> KeptBlocks:
    return kept_blocks(context.structure, consumer, context.network.arrays[consumer.weight].shape, keep)


def _proposals(
    context: RecoveryContext,
    student: Network,
    consumer: Consumer,
    keep: Keep,
    images: Frontier,
    ridges: Mapping[str, float],
) -> dict[str, Proposal]:
    """Return the compact tensors that each way of solving `consumer` would put in."""
    kept = _blocks(context, consumer, keep)
    rows = np.zeros((consumer.groups, len(kept.outputs)), dtype=np.bool_)
    rows[np.ix_(kept.groups, kept.outputs)] = True
    results = context.dense.results[consumer.node][:, :, rows.reshape(-1)]
    start = consumer.matrix(context.network.arrays[consumer.weight])
    start = start[kept.groups][:, kept.outputs][:, :, kept.columns]
    consumer = replace(consumer, groups=len(start))
    moments = collect_paired(student, consumer, images, images.numbers, results, context.threads)
    live = is_live(read_branch(student, consumer)).reshape(start.shape[:2])
    return {name: _solve(student, consumer, start, moments, ridge, live) for name, ridge in ridges.items()}


def _solve(
    student: Network, consumer: Consumer, start: Floats, moments: Moments, ridge: float, live: npt.NDArray[np.bool_]
) -> Proposal:
    solved, shift = fit(start, moments, ridge)
    solved = np.where(live[:, :, None], solved, start)
    proposal = {consumer.weight: consumer.weight_of(solved, student.arrays[consumer.weight])}
    if consumer.shift is not None:
        name, change = consumer.shift.tensor, np.where(live, shift, 0.0).reshape(-1)
        proposal[name] = consumer.shift.moved(student.arrays[name], change)
    return proposal


def _widen(context: RecoveryContext, keep: Keep, student: Network, screened: Tensors, changed: set[str]) -> Tensors:
    """Return the changed compact tensors at their dense shapes; removed running means keep their dense values."""
    tensors = dict(screened)
    for name in changed:
        dense = context.network.arrays[name]
        full = np.zeros_like(dense) if name in context.raw.parameters else dense.copy()
        where = np.ix_(*(np.flatnonzero(axis) for axis in context.structure.kept(name, keep)))
        full[where] = student.arrays[name]
        tensors[name] = full
    return tensors
