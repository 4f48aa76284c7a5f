"""The dense network and a pruned one as the same list of operations, the pruned one without its removed channels.

Both are the same code (traced.py), so that a value of the one has a counterpart of the same name in the other; where
channels are gone, which of the dense ones are left is found by running both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mm_edge.arrays import Arrays, BoolArray
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import AxisMask, apply_mask
from mm_edge.quality.parity import TOLERANCE
from mm_edge.recover.closed_form.context import RecoveryContext
from mm_edge.recover.training.shrink import Shrunk, group_slices, shrink_
from mm_edge.recover.training.traced import Traced


@dataclass(frozen=True)
class Pair:
    """A dense network and what pruning left of it.

    Attributes:
        dense: traced.
        student: traced, in smaller shapes where its code allows them.
        shrunk: which positions of the dense tensors the student has.
        channels: per value that is smaller in the student, the axis and which of its dense indices are left.
    """

    dense: Traced
    student: Traced
    shrunk: Shrunk
    channels: Mapping[str, tuple[int, Tensor]]

    def counterpart(self, name: str, value: Tensor) -> Tensor:
        """Return of the dense network's `value` what the student's has."""
        return value.index_select(*self.channels[name]) if name in self.channels else value

    def zeros(self, masks: Mapping[str, AxisMask]) -> dict[str, Tensor]:
        """Return, of the student's tensors that still hold removed weights, which of their weights are not removed."""
        known = masks.keys() & self.student.state.keys()
        smaller = {name: self.shrunk.take(name, masks[name].dense()) for name in known}
        return {name: torch.from_numpy(mask) for name, mask in smaller.items() if not mask.all()}


def masked_state(dense: Traced, masks: Mapping[str, AxisMask], tensors: Arrays) -> Arrays:
    """Return the state of `dense` by name, dense-shaped and masked, with `tensors` where they say otherwise."""
    arrays = {name: tensors.get(name, value.numpy()) for name, value in dense.state.items()}
    return {name: apply_mask(array, masks.get(name)) for name, array in arrays.items()}


@torch.no_grad()
def make_pair(
    context: RecoveryContext, module: nn.Module, dense: Traced, keep: Keep, tensors: Arrays, values: Sequence[str]
) -> Pair:
    """Return `module`, traced as `dense`, with what `tensors` (dense-shaped, masked) and `keep` make of it.

    `values` are to be compared. Where the smaller network does not compute the same ones, the student keeps the dense
    shapes, with zeros.
    """
    shape = context.images.shape[1:]
    masked = copy.deepcopy(module).eval()
    for name, tensor in masked.state_dict().items():
        if name in tensors:
            tensor.copy_(torch.from_numpy(np.array(tensors[name])).reshape(tensor.shape))
    student = Traced(masked, shape, dense.batch)
    images = torch.from_numpy(context.images[np.resize(context.fitted, dense.batch)])
    smaller = copy.deepcopy(masked)
    groups = group_slices(context.structure, keep, context.raw.parameters | context.raw.buffers)
    shrunk = shrink_(smaller, groups, images[:2])
    if not shrunk.kept:
        return Pair(dense, student, shrunk, {})
    traced = Traced(smaller, shape, dense.batch)
    channels = _match(student, traced, shrunk, images, values) if traced.operations == student.operations else None
    return Pair(dense, student, Shrunk(), {}) if channels is None else Pair(dense, traced, shrunk, channels)


def _match(
    masked: Traced, smaller: Traced, shrunk: Shrunk, images: Tensor, values: Sequence[str]
) -> dict[str, tuple[int, Tensor]] | None:
    """Return which indices the smaller network's `values` have of the masked one's; None where that is not clear."""
    wanted = masked.run(masked.state, {masked.input: images}, values)
    found = smaller.run(smaller.state, {smaller.input: images}, values)
    axes = {axis.tobytes(): axis for axes in shrunk.kept.values() for axis in axes}
    channels = {}
    for name in values:
        place = _place(wanted[name], found[name], list(axes.values()))
        if place is None:
            return None
        if wanted[name].shape != found[name].shape:
            channels[name] = place
    return channels


def _place(wanted: Tensor, found: Tensor, axes: Sequence[BoolArray]) -> tuple[int, Tensor] | None:
    """Return the axis in which `found` is smaller, and the indices that make the same of `wanted`."""
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
