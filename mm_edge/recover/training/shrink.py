"""A masked module made smaller where its code allows it, so that training it costs what the pruned network costs.

    masked module (dense shapes, zeros)  --  slices of a group dropped from every tensor  -->  same answers

Removed channels add nothing, in training as in evaluation (E8 in docs/method.md), so the smaller module is the same
function of the weights that stay. But a module's code can contain a width (the number of heads in a reshape). Running
the module shows this: a group keeps its dense shape and its mask if dropping its slices changes an answer or raises an
error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mm_edge.arrays import Array, BoolArray
from mm_edge.graph.axes import Keep
from mm_edge.graph.export import output_tensors
from mm_edge.graph.groups import Structure
from mm_edge.quality.parity import TOLERANCE

# Of one group: for every tensor it reaches, which positions of each axis stay.
Slices = Mapping[str, tuple[BoolArray, ...]]


@dataclass(frozen=True)
class Shrunk:
    """Which positions of each axis a smaller module has of its dense self, by parameter and buffer."""

    kept: Slices = field(default_factory=dict)

    def take(self, name: str, array: Array) -> Array:
        """Return the part of a dense-shaped array that the smaller module has."""
        return np.ascontiguousarray(array[np.ix_(*self.kept[name])]) if name in self.kept else array

    def put(self, name: str, array: Array, into: Array) -> Array:
        """Return a copy of the dense-shaped `into` with `array` at the positions that the smaller module has."""
        if name not in self.kept:
            return array
        whole = into.copy()
        whole[np.ix_(*self.kept[name])] = array
        return whole


def group_slices(structure: Structure, keep: Keep, held: Collection[str]) -> tuple[Slices, ...]:
    """Return the slices of each group that loses something.

    Args:
        structure: the coupled groups.
        keep: the indices that stay, by group.
        held: the names of the tensors that the module holds; others get no slices.
    """
    names = [name for name in structure.tensor_axes if name in held]
    found = []
    for leaf, stays in keep.items():
        axes = {name: structure.kept(name, {leaf: stays}) for name in names}
        found.append({name: kept for name, kept in axes.items() if not all(axis.all() for axis in kept)})
    return tuple(group for group in found if group)


def shrink_(module: nn.Module, groups: Sequence[Slices], inputs: Tensor) -> Shrunk:
    """Drop the slices of as many `groups` as possible from `module` without changing its answers.

    Args:
        module: on the CPU, with zeros in its removed channels; its parameters and buffers are replaced.
        groups: the slices of each group, from `group_slices`.
        inputs: what the answers are compared on, (n, C, H, W).

    Returns:
        Which positions of its tensors the module still has.
    """
    if not groups:
        return Shrunk()
    was_training = module.training
    module.eval()
    holders, whole = _find_holders(module)
    groups = [_one_left(_under_all_names(group, whole)) for group in groups]
    wanted = _answers(module, inputs)

    def works(kept: Slices) -> bool:
        _set_(holders, whole, kept)
        try:
            found = _answers(module, inputs)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError):  # what code raises on a wrong shape
            return False
        return _agree(found, wanted)

    kept = _join(groups)
    if not works(kept):
        kept = {}
        for group in groups:
            more = _join([kept, group])
            if works(more):
                kept = more
        _set_(holders, whole, kept)
    module.train(was_training)
    return Shrunk(kept)


def _one_left(group: Slices) -> Slices:
    """Keep one index where a group loses all, because PyTorch needs a channel; its mask still makes it zero."""
    return {
        name: tuple(axis if axis.any() else np.arange(len(axis)) == 0 for axis in axes) for name, axes in group.items()
    }


def _under_all_names(group: Slices, whole: Mapping[str, Tensor]) -> Slices:
    """Add the other names of tied tensors."""
    return {name: group[known] for known in group for name, item in whole.items() if item is whole[known]}


def _join(groups: Sequence[Slices]) -> dict[str, tuple[BoolArray, ...]]:
    """Return what stays of every tensor when all `groups` lose their slices."""
    joined: dict[str, tuple[BoolArray, ...]] = {}
    for group in groups:
        for name, axes in group.items():
            before = joined.get(name, axes)
            joined[name] = tuple(a & b for a, b in zip(before, axes, strict=True))
    return joined


@dataclass(frozen=True)
class _Holder:
    """The attribute of a module that holds a tensor, and how many groups the module had if it is a convolution."""

    owner: nn.Module
    attribute: str
    groups: int


def _find_holders(module: nn.Module) -> tuple[dict[str, list[_Holder]], dict[str, Tensor]]:
    """Return every parameter and buffer by name, and the attributes that hold it: a tied one has several."""
    held: dict[int, list[_Holder]] = {}
    for owner in module.modules():
        for attribute, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None:
                held.setdefault(id(tensor), []).append(_Holder(owner, attribute, getattr(owner, "groups", 1)))
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: held[id(tensor)] for name, tensor in named}, dict(named)


def _set_(holders: Mapping[str, list[_Holder]], whole: Mapping[str, Tensor], kept: Slices) -> None:
    """Set every attribute to its tensor, sliced if `kept` names it."""
    for name, tensor in whole.items():
        smaller = tensor.detach()
        for axis, stays in enumerate(kept.get(name, ())):
            smaller = smaller.index_select(axis, torch.from_numpy(np.flatnonzero(stays)))
        made = tensor if name not in kept else nn.Parameter(smaller) if isinstance(tensor, nn.Parameter) else smaller
        for holder in holders[name]:
            setattr(holder.owner, holder.attribute, made)
            if holder.attribute == "weight" and isinstance(holder.owner, nn.modules.conv._ConvNd):
                _fit_convolution_(holder.owner, holder.groups, tensor.shape)


def _fit_convolution_(layer: nn.modules.conv._ConvNd, groups: int, dense: torch.Size) -> None:
    """Set the channel and group counts of a convolution to fit its weight; it had `groups` and the shape `dense`."""
    out, per_group = layer.weight.shape[:2]
    if layer.transposed:
        layer.in_channels, layer.out_channels = out, per_group * groups
        return
    # If every group still has all its inputs, whole groups were removed, as in a depthwise convolution.
    layer.groups = groups if per_group != dense[1] else max(1, groups * out // dense[0])
    layer.in_channels, layer.out_channels = per_group * layer.groups, out


def _answers(module: nn.Module, inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [tensor.clone() for tensor in output_tensors(module(inputs))]


def _agree(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Return whether all answers are equal within the tolerance of quality/parity.py."""
    if [item.shape for item in found] != [item.shape for item in wanted]:
        return False
    errors = (float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(found, wanted, strict=True))
    return all(math.isfinite(error) and error <= TOLERANCE for error in errors)
