"""The dense network and a pruned one as the same list of operations, the pruned one without its removed channels.

Both are traced from the same code (traced.py), so that a value of one network has a counterpart of the same name in the
other. Where the pruned network's value has fewer channels, running both networks shows which channels those are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mm_edge.arrays import Arrays, BoolArray
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import AxisMask, apply_mask
from mm_edge.quality.parity import TOLERANCE
from mm_edge.recover.closed_form.context import RecoveryContext
from mm_edge.recover.training.shrink import Shrunk, group_slices, shrink_
from mm_edge.recover.training.traced import Traced


@dataclass(frozen=True)
class Pair:
    """A dense network and the network that pruning made of it.

    Attributes:
        dense: the dense network, traced.
        pruned: the pruned network, traced, in smaller shapes if its code works with them.
        shrunk: which positions of the dense tensors the pruned network has.
        channels: for every value that is smaller in the pruned network, the axis and which dense indices are left.
    """

    dense: Traced
    pruned: Traced
    shrunk: Shrunk
    channels: Mapping[str, tuple[int, Tensor]]

    def counterpart(self, name: str, value: Tensor) -> Tensor:
        """Return the part of the dense network's `value` that the pruned network has, `name` being its name."""
        return value.index_select(*self.channels[name]) if name in self.channels else value

    def zeros(self, masks: Mapping[str, AxisMask]) -> dict[str, Tensor]:
        """Return masks, True where a weight stays, of the pruned network's tensors that still hold removed weights."""
        known = masks.keys() & self.pruned.state.keys()
        smaller = {name: self.shrunk.take(name, masks[name].dense()) for name in known}
        return {name: torch.from_numpy(mask) for name, mask in smaller.items() if not mask.all()}


def masked_state(dense: Traced, masks: Mapping[str, AxisMask], tensors: Arrays) -> Arrays:
    """Return the state of `dense` by name, dense-shaped and masked, with `tensors` in place of those it names."""
    arrays = {name: tensors.get(name, value.numpy()) for name, value in dense.state.items()}
    return {name: apply_mask(array, masks.get(name)) for name, array in arrays.items()}


@torch.no_grad()
def make_pair(context: RecoveryContext, dense: Traced, keep: Keep, tensors: Arrays, values: Sequence[str]) -> Pair:
    """Return the dense network of `context` and the network that `keep` and `tensors` make of it.

    Where the smaller network does not compute the same `values`, the pruned network keeps the dense shapes, with zeros.

    Args:
        context: of the dense network, with its module.
        dense: the module, traced.
        keep: the indices that stay, by group.
        tensors: the pruned network's tensors by name, dense-shaped and masked.
        values: names of the values that will be compared between the two networks.
    """
    shape = context.image_shape
    masked = copy.deepcopy(context.trainable_module).eval()
    for name, tensor in masked.state_dict().items():
        if name in tensors:
            tensor.copy_(torch.from_numpy(np.array(tensors[name])).reshape(tensor.shape))
    pruned = Traced(masked, shape, dense.batch)
    images = torch.from_numpy(context.images[np.resize(context.fitted, dense.batch)])
    smaller = copy.deepcopy(masked)
    groups = group_slices(context.structure, keep, context.raw.parameters | context.raw.buffers)
    shrunk = shrink_(smaller, groups, images[:2])
    if not shrunk.kept:
        return Pair(dense, pruned, shrunk, {})
    traced = Traced(smaller, shape, dense.batch)
    channels = _match(pruned, traced, shrunk, images, values) if traced.operations == pruned.operations else None
    return Pair(dense, pruned, Shrunk(), {}) if channels is None else Pair(dense, traced, shrunk, channels)


def _match(
    masked: Traced, smaller: Traced, shrunk: Shrunk, images: Tensor, values: Sequence[str]
) -> dict[str, tuple[int, Tensor]] | None:
    """Return the axis and indices in the masked network of every value that is smaller in the smaller network.

    None if a value's indices cannot be found.
    """
    wanted = masked.run(masked.state, {masked.input: images}, values)
    found = smaller.run(smaller.state, {smaller.input: images}, values)
    axes = {axis.tobytes(): axis for axes in shrunk.kept.values() for axis in axes}
    channels = {}
    for name in values:
        selection = _find_indices(wanted[name], found[name], list(axes.values()))
        if selection is None:
            return None
        if wanted[name].shape != found[name].shape:
            channels[name] = selection
    return channels


def _find_indices(wanted: Tensor, found: Tensor, axes: Sequence[BoolArray]) -> tuple[int, Tensor] | None:
    """Return the axis in which `found` is smaller and the indices on it for which `wanted` equals `found`.

    `axes` are the masks to try; None if none of them makes the two equal.
    """
    differing = [axis for axis, size in enumerate(found.shape) if size != wanted.shape[axis]]
    if len(differing) > 1:
        return None
    (axis,) = differing or [0]
    whole = np.ones(wanted.shape[axis], dtype=np.bool_)
    for stays in axes if differing else [whole]:
        if len(stays) == wanted.shape[axis] and int(stays.sum()) == found.shape[axis]:
            indices = torch.from_numpy(np.flatnonzero(stays))
            same = wanted.index_select(axis, indices)
            if float((same - found).abs().max()) <= TOLERANCE * float(same.abs().max()):
                return axis, indices
    return None
