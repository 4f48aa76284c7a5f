"""Tuning a candidate for its input size, which may be smaller than the size the network was given at.

1. Block-wise tuning (tune.py) at the given size: there the dense network's inner values are the right targets, which
   they are not on smaller pictures.
2. The tuned weights are taken over to the candidate's own size as far as images of that size find them better.
3. Distilling (distil.py): the candidate learns the dense network's answers to the larger pictures.

At the given size the first step is all; a candidate that keeps every index needs the last one only. Boxes and masks of
two input sizes are not compared number by number, so that a network that is no classifier is tuned at the candidate's
own size, by the dense network there.
"""

from __future__ import annotations

from dataclasses import replace

from mm_edge.arrays import Arrays
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import apply_mask, mask_tensors
from mm_edge.progress import Advance
from mm_edge.recover.closed_form.context import RecoveryContext
from mm_edge.recover.training.acceptance import Tuned, accept, judge_views, mirrored, reject, resized
from mm_edge.recover.training.distil import distil
from mm_edge.recover.training.tune import tune


def tune_for(
    own: RecoveryContext,
    given: RecoveryContext,
    keep: Keep,
    tensors: Arrays,
    *,
    seed: int = 0,
    progress: Advance | None = None,
) -> Tuned:
    """Tune a candidate for the input size of `own`; both contexts must hold their modules.

    Args:
        own: the dense network at the candidate's input size.
        given: the dense network at the size it was given at; the same object as `own` if that is the candidate's.
        keep: the indices that stay, by group of `own`.
        tensors: the candidate's tensors, dense-shaped and masked, solved without the held-back images.
        seed: of crops, mixtures and order.
        progress: called with (parts done, of how many).

    Raises:
        ValueError: a context has no module.
    """
    if own is given or given.judged.class_scores is None:
        return tune(own, keep, tensors, seed=seed, progress=progress)
    if all(kept.all() for kept in keep.values()):
        return distil(own, given, keep, tensors, seed=seed, progress=progress)
    tuned = _tune_at_given_size(own, given, keep, tensors, seed, _part(progress, 0))
    distilled = distil(own, given, keep, tuned.tensors, seed=seed, progress=_part(progress, 1))
    better, note = tuned.better or distilled.better, f"{tuned.note}; {distilled.note}"
    return replace(distilled, kl_before=tuned.kl_before, better=better, note=note)


def _part(progress: Advance | None, number: int) -> Advance | None:
    """Return how the first or the second half of the work reports."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, 2 * total)


def _tune_at_given_size(
    own: RecoveryContext,
    given: RecoveryContext,
    keep: Keep,
    tensors: Arrays,
    seed: int,
    progress: Advance | None,
) -> Tuned:
    leaves = {group.id: group.leaf for group in own.structure.groups}
    groups = given.structure.groups
    there = {group.leaf: keep[leaves[group.id]] for group in groups if leaves.get(group.id) in keep}
    # The shape of a position table follows the input size, so that it cannot be tuned at another one.
    shapes = {name: array.shape for name, array in given.graph.arrays.items()}
    shared = {name: array for name, array in tensors.items() if shapes.get(name) == array.shape}
    tuned = tune(given, there, shared, seed=seed, progress=progress)
    return adopt(own, given, keep, tensors, tuned)


def adopt(own: RecoveryContext, given: RecoveryContext, keep: Keep, tensors: Arrays, tuned: Tuned) -> Tuned:
    """Take over what was tuned at one input size to another, as far as images of that size find it better.

    Args:
        own: the dense network at the candidate's input size.
        given: the dense network at the size that `tuned` was tuned at.
        keep: the indices that stay, by group of `own`.
        tensors: the candidate's tensors that tuning started from, dense-shaped and masked.
        tuned: the result of `tune`; a tensor of another shape than at the candidate's size is not taken over.
    """
    views = resized(mirrored(given), own)
    before = judge_views(views, keep, tensors)
    if not tuned.better:
        return reject(tensors, before, tuned.note)
    masks = mask_tensors(own.structure, keep)
    known = own.graph.arrays
    start = {name: apply_mask(known[name], masks.get(name)) for name in tuned.tensors.keys() & known} | tensors
    ends = {name: end for name, end in tuned.tensors.items() if name in start and end.shape == start[name].shape}
    return accept(views, keep, tensors, before, (start, ends), f"{tuned.note}; taken over", tuned.history)
