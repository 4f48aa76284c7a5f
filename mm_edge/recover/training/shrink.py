"""A masked module made smaller where its code allows it, so that training it costs what the pruned network costs.

    masked module (dense shapes, zeros)  --  slices of a group dropped from every tensor  -->  same answers

By E8 the removed channels add nothing, in training as in evaluation, so the smaller module is the same function of the
weights that stay. But a module is code, and code may name a width (the heads in a reshape). That is found by running
it: a group whose slices change an answer, or stop the module, keeps its dense shape and its mask.
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
        """Return of a dense-shaped array what the smaller module has."""
        return np.ascontiguousarray(array[np.ix_(*self.kept[name])]) if name in self.kept else array

    def put(self, name: str, array: Array, into: Array) -> Array:
        """Return a copy of the dense-shaped `into` that holds `array` where the smaller module has it."""
        if name not in self.kept:
            return array
        whole = into.copy()
        whole[np.ix_(*self.kept[name])] = array
        return whole


def group_slices(structure: Structure, keep: Keep, held: Collection[str]) -> tuple[Slices, ...]:
    """Return, of each group that loses something, what stays of the tensors it reaches among those a module `held`."""
    names = [name for name in structure.tensor_axes if name in held]
    found = []
    for leaf, stays in keep.items():
        axes = {name: structure.kept(name, {leaf: stays}) for name in names}
        found.append({name: kept for name, kept in axes.items() if not all(axis.all() for axis in kept)})
    return tuple(group for group in found if group)


def shrink_(module: nn.Module, groups: Sequence[Slices], inputs: Tensor) -> Shrunk:
    """Drop from `module`, whose removed channels are zero, the slices of as many `groups` as it goes on answering with.

    Args:
        module: on the CPU; its parameters and buffers are replaced.
        groups: what stays of every tensor a group reaches.
        inputs: what the answers are compared on, (n, C, H, W).

    Returns:
        What the module has now of what it had.
    """
    if not groups:
        return Shrunk()
    was_training = module.training
    module.eval()
    places, whole = _find_places(module)
    groups = [_one_left(_under_all_names(group, whole)) for group in groups]
    wanted = _answers(module, inputs)

    def works(kept: Slices) -> bool:
        _set_(places, whole, kept)
        try:
            found = _answers(module, inputs)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError):  # whatever its code says of a shape
            return False
        return _agree(found, wanted)

    kept = _join(groups)
    if not works(kept):
        kept = {}
        for group in groups:
            more = _join([kept, group])
            if works(more):
                kept = more
        _set_(places, whole, kept)
    module.train(was_training)
    return Shrunk(kept)


def _one_left(group: Slices) -> Slices:
    """Keep one index where a group loses all: PyTorch computes nothing without channels, and its mask makes it zero."""
    return {
        name: tuple(axis if axis.any() else np.arange(len(axis)) == 0 for axis in axes) for name, axes in group.items()
    }


def _under_all_names(group: Slices, whole: Mapping[str, Tensor]) -> Slices:
    """Add the other names of tied tensors."""
    return {name: group[known] for known in group for name, item in whole.items() if item is whole[known]}


def _join(groups: Sequence[Slices]) -> dict[str, tuple[BoolArray, ...]]:
    """Return what stays when all `groups` have lost their slices."""
    joined: dict[str, tuple[BoolArray, ...]] = {}
    for group in groups:
        for name, axes in group.items():
            before = joined.get(name, axes)
            joined[name] = tuple(a & b for a, b in zip(before, axes, strict=True))
    return joined


@dataclass(frozen=True)
class _Place:
    """Where a module holds a tensor, and how many groups the convolution it belongs to had."""

    owner: nn.Module
    attribute: str
    groups: int


def _find_places(module: nn.Module) -> tuple[dict[str, list[_Place]], dict[str, Tensor]]:
    """Return, by name, every place that holds a parameter or buffer (a tied one has several), and the tensor."""
    held: dict[int, list[_Place]] = {}
    for owner in module.modules():
        for attribute, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None:
                held.setdefault(id(tensor), []).append(_Place(owner, attribute, getattr(owner, "groups", 1)))
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: held[id(tensor)] for name, tensor in named}, dict(named)


def _set_(places: Mapping[str, list[_Place]], whole: Mapping[str, Tensor], kept: Slices) -> None:
    """Give every place its tensor, sliced where `kept` says so."""
    for name, tensor in whole.items():
        smaller = tensor.detach()
        for axis, stays in enumerate(kept.get(name, ())):
            smaller = smaller.index_select(axis, torch.from_numpy(np.flatnonzero(stays)))
        made = tensor if name not in kept else nn.Parameter(smaller) if isinstance(tensor, nn.Parameter) else smaller
        for place in places[name]:
            setattr(place.owner, place.attribute, made)
            if place.attribute == "weight" and isinstance(place.owner, nn.modules.conv._ConvNd):
                _fit_convolution_(place.owner, place.groups, tensor.shape)


def _fit_convolution_(layer: nn.modules.conv._ConvNd, groups: int, dense: torch.Size) -> None:
    """Make the numbers of a convolution those of its weight; `groups` and the shape `dense` are what it had."""
    out, per_group = layer.weight.shape[:2]
    if layer.transposed:
        layer.in_channels, layer.out_channels = out, per_group * groups
        return
    # With all inputs of a group left it is whole groups that went, as in a depthwise convolution.
    layer.groups = groups if per_group != dense[1] else max(1, groups * out // dense[0])
    layer.in_channels, layer.out_channels = per_group * layer.groups, out


def _answers(module: nn.Module, inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [tensor.clone() for tensor in output_tensors(module(inputs))]


def _agree(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether all answers are the same to rounding, by the measure of parity.py."""
    if [item.shape for item in found] != [item.shape for item in wanted]:
        return False
    errors = (float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(found, wanted, strict=True))
    return all(math.isfinite(error) and error <= TOLERANCE for error in errors)
