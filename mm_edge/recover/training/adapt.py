"""Tuning for an input size: block by block at the size the network was given at, then taught at the candidate's own.

What the dense network puts out inside is right at the size it was given at and wrong on smaller pictures, so that
block-wise tuning happens there, and images of the candidate's own size say how much of it is taken over. Then the
candidate learns the answers to larger pictures (distil.py).
"""

from __future__ import annotations

from dataclasses import replace

from mm_edge.arrays import Arrays
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import apply_mask, mask_tensors
from mm_edge.progress import Advance
from mm_edge.recover.training.distil import Sized, distil
from mm_edge.recover.training.judging import Tuned, dropped, go, judge_views, mirrored, resized
from mm_edge.recover.training.tune import tune


def tune_for(
    own: Sized, given: Sized, keep: Keep, tensors: Arrays, *, seed: int = 0, progress: Advance | None = None
) -> Tuned:
    """Tune what is to run at the size of `own`; it may be that of `given`.

    Args:
        own: the size to run at.
        given: the size the network was given at.
        keep: the indices that stay, by group at the size to run at.
        tensors: what runs there now, as `tune` wants it.
        seed: of crops, mixtures and order.
        progress: called with (parts done, of how many).
    """
    if own.context is given.context:
        return tune(given.context, given.module, keep, tensors, seed=seed, progress=progress)
    if all(kept.all() for kept in keep.values()):
        return distil(own, given, keep, tensors, seed=seed, progress=progress)
    found = _tune_elsewhere(own, given, keep, tensors, seed, _part(progress, 0))
    taught = distil(own, given, keep, found.tensors, seed=seed, progress=_part(progress, 1))
    return replace(
        taught, kl_before=found.kl_before, better=found.better or taught.better, note=f"{found.note}; {taught.note}"
    )


def _part(progress: Advance | None, number: int) -> Advance | None:
    """Return how the first or the second half of the work reports."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, 2 * total)


def _tune_elsewhere(
    own: Sized, given: Sized, keep: Keep, tensors: Arrays, seed: int, progress: Advance | None
) -> Tuned:
    leaves = {group.id: group.leaf for group in own.context.structure.groups}
    groups = given.context.structure.groups
    there = {group.leaf: keep[leaves[group.id]] for group in groups if leaves.get(group.id) in keep}
    # Position tables have the shapes of their size, and stay.
    shapes = {name: array.shape for name, array in given.context.network.arrays.items()}
    shared = {name: array for name, array in tensors.items() if shapes.get(name) == array.shape}
    found = tune(given.context, given.module, there, shared, seed=seed, progress=progress)
    return adopt(own, given, keep, tensors, found)


def adopt(own: Sized, given: Sized, keep: Keep, tensors: Arrays, elsewhere: Tuned) -> Tuned:
    """Take what was tuned at one input size over to another, if the images there say it is better.

    Args:
        own: the size to run at.
        given: the size that `elsewhere` was tuned at.
        keep: the indices that stay, by group at the size to run at.
        tensors: what tuning started from, and what runs there now, dense-shaped and masked.
        elsewhere: what `tune` made of them; tensors of other shapes than here stay as they are.
    """
    views = resized(mirrored(given.context), own.context)
    before = judge_views(views, keep, tensors)
    if not elsewhere.better:
        return dropped(tensors, before, elsewhere.note)
    masks = mask_tensors(own.context.structure, keep)
    known = own.context.network.arrays
    start = {name: apply_mask(known[name], masks.get(name)) for name in elsewhere.tensors.keys() & known} | tensors
    ends = {name: end for name, end in elsewhere.tensors.items() if name in start and end.shape == start[name].shape}
    return go(views, keep, tensors, before, (start, ends), f"{elsewhere.note}; taken over", elsewhere.history)
