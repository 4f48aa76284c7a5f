"""Input sizes: the same network on smaller or larger square pictures.

A convolutional network takes other sizes as it is. A transformer is built again at the new size, with timm's
`set_input_size`, or with its constructor's `img_size` and the weights converted by its `checkpoint_filter_fn`. Both
resample position embeddings and attention biases and give windows their new size. Then the network is exported again,
because a graph holds sizes as constants (reshape targets, paddings of 'same' convolutions, position tables). Weights
keep their names, so that groups, plans and masks of one size apply to the other by name.

    stride   product of the strides on the way to the coarsest map
    auto     every side below the dense one, down to 0.7 of it, that is a multiple of the stride; at most MOST_SIZES
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import onnx_ir as ir
import torch
from torch import nn

from mm_edge.errors import ExportError, ModelError, UsageError, cause_line, first_line
from mm_edge.graph.axes import Axis
from mm_edge.graph.export import RawGraph, export_raw
from mm_edge.graph.groups import Structure
from mm_edge.load.matching import find_misfits
from mm_edge.load.models import LoadedModel
from mm_edge.load.network import output_shape
from mm_edge.load.timm_models import create_timm
from mm_edge.load.weights import quiet_timm

SMALLEST_SHARE = 0.7
MOST_SIZES = 3
OPTION = "--input-sizes"

T = TypeVar("T")


def auto_sizes(side: int, stride: int) -> tuple[int, ...]:
    """Return the sides in pixels of `auto` below `side`, the largest first; see the top of the file."""
    first = -(-math.ceil(SMALLEST_SHARE * side) // stride)
    steps = range(first, -(-side // stride))
    pace = max(1, math.ceil(len(steps) / MOST_SIZES))
    return tuple(step * stride for step in steps[::-1][::pace])


def total_stride(model: LoadedModel, raw: RawGraph) -> int:
    """Return the side of the network's input divided by the side of its coarsest feature map."""
    return max(declared_stride(model.module), _graph_stride(raw.model))


def declared_stride(module: nn.Module | None) -> int:
    """Return the stride that timm states for the last feature map of its networks, 1 where it states none."""
    info = getattr(module, "feature_info", None)
    entries = getattr(info, "info", info)
    last = entries[-1] if isinstance(entries, Sequence) and entries else None
    reduction = last.get("reduction") if isinstance(last, Mapping) else None
    return reduction if isinstance(reduction, int) and reduction > 0 else 1


def _graph_stride(model: ir.Model) -> int:
    strides: dict[str, int] = {}
    for node in model.graph:
        names = [value.name for value in node.inputs if value is not None and value.name is not None]
        stride = max((strides.get(name, 1) for name in names), default=1)
        stride *= _node_stride(node)
        for value in node.outputs:
            if value.name is not None:
                strides[value.name] = stride
    return max(strides.values(), default=1)


def _node_stride(node: ir.Node) -> int:
    """Return the stride of a convolution or pooling; one that covers its whole input has none."""
    if node.op_type not in ("Conv", "MaxPool", "AveragePool", "LpPool") or "strides" not in node.attributes:
        return 1
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    weight = node.inputs[1].shape if node.op_type == "Conv" and node.inputs[1] is not None else None
    kernel = list(weight)[2:] if weight is not None else list(node.attributes["kernel_shape"].as_ints())
    if shape is not None and list(shape)[2:] == kernel:
        return 1
    return int(max(node.attributes["strides"].as_ints()))


def square_side(model: LoadedModel, asked: str) -> int:
    """Return the side of the network's input.

    Raises:
        UsageError: the input is not square, or the file has its sizes built in.
    """
    _, height, width = model.input.shape
    if model.module is None:
        raise UsageError(
            f"{OPTION} {asked}: an .onnx has its input size built in; give the weights with --arch, or one .onnx a size"
        )
    if len(model.inputs) > 1:
        raise UsageError(
            f"{OPTION} {asked}: the network has {len(model.inputs)} inputs; only one of images changes size"
        )
    if model.family == "ExportedProgram":
        raise UsageError(f"{OPTION} {asked}: a .pt2 has its input size built in; give the state_dict with --arch")
    if height != width:
        raise UsageError(f"{OPTION} {asked}: only square inputs change size; this network takes {height} x {width}")
    return height


def remake(model: LoadedModel, side: int) -> LoadedModel:
    """Return a copy of the network for square inputs of `side` pixels, preprocessing scaled with it.

    Raises:
        UsageError: it cannot take that size; the message says why.
    """
    square_side(model, str(side))
    assert model.module is not None
    channels = model.input.shape[0]
    module = _resize(model, side)
    try:
        output_shape(copy.deepcopy(module), (1, channels, side, side))
    except ModelError as error:
        raise UsageError(
            f"{OPTION} {side}: {model.info.name} does not run at that size: {cause_line(error)}"
        ) from error
    shape = (channels, side, side)
    return replace(
        model,
        module=module,
        input=replace(model.input, shape=shape),
        info=replace(model.info, input_shape=shape),
        inputs=tuple(
            replace(item, shape=(1, *shape), measured=(1, *shape), other=(1, *shape)) for item in model.inputs
        ),
        warnings=(),
    )


def _resize(model: LoadedModel, side: int) -> nn.Module:
    module = copy.deepcopy(model.module)
    assert module is not None
    fixed = _is_fixed(module)
    stride = declared_stride(module)
    resize: Any = getattr(module, "set_input_size", None)
    if (fixed or resize is not None) and side % stride:
        near = ", ".join(str(stride * count) for count in dict.fromkeys((max(1, side // stride), side // stride + 1)))
        raise UsageError(f"{OPTION} {side}: {model.info.name} takes multiples of {stride}; the nearest are {near}")
    if resize is not None:
        try:
            with quiet_timm():
                resize(img_size=(side, side))
        except Exception as error:  # each architecture checks the size in its own way
            raise UsageError(f"{OPTION} {side}: {model.info.name} refuses it: {first_line(error)}") from error
        return module
    return _rebuild(model, side) if fixed else module


def _is_fixed(module: nn.Module) -> bool:
    config = getattr(module, "pretrained_cfg", None)
    return bool(config.get("fixed_input_size")) if isinstance(config, Mapping) else False


def _rebuild(model: LoadedModel, side: int) -> nn.Module:
    """Build a timm network with a fixed input size again, its weights resampled by its own converter."""
    assert model.module is not None
    what = f"{OPTION} {side}: {model.info.name} fixes its input size"
    if model.build is None:
        raise UsageError(f"{what} and was not built from a timm name, so it cannot be made again at another")
    arguments: dict[str, Any] = {**model.build.arguments, "img_size": side}
    try:
        fresh = create_timm(model.build.name, meta=False, **arguments)
    except ModelError as error:
        raise UsageError(f"{what} and timm has no way to change it: {cause_line(error)}") from error
    state = dict(model.module.state_dict())
    converter = getattr(inspect.getmodule(type(fresh)), "checkpoint_filter_fn", None)
    if converter is not None:
        try:
            state = dict(converter(dict(state), fresh))
        except Exception as error:  # a converter is written for checkpoints of its publisher
            raise UsageError(f"{what} and timm cannot convert its weights: {first_line(error)}") from error
    misfits = [name for name, _, _ in find_misfits(state, fresh.state_dict())]
    if misfits:
        raise UsageError(f"{what}: timm does not resample {misfits[0]}, which depends on it")
    fresh.load_state_dict(state, strict=False)
    return fresh.float().eval()


def export_at(model: LoadedModel) -> RawGraph:
    """Return the raw graph of the network that `remake` returned.

    Raises:
        UsageError: it cannot be exported.
    """
    assert model.module is not None
    try:
        return export_raw(model.module, torch.zeros(1, *model.input.shape))
    except ExportError as error:
        raise UsageError(f"{OPTION} {model.input.shape[1]}: {error}") from error


def match_groups(dense: Structure, sized: Structure, side: int) -> dict[Axis, Axis]:
    """Return, for the leaf of each group of the `dense` structure, the leaf of the same group at another size.

    Raises:
        UsageError: the coupled groups are others than at the dense size.
    """
    here = {group.id: group for group in sized.groups}
    leaves: dict[Axis, Axis] = {}
    for group in dense.groups:
        same = here.pop(group.id, None)
        if same is None or same.size != group.size:
            raise UsageError(f"{OPTION} {side}: the network prunes differently there (group {group.id}); leave it out")
        leaves[group.leaf] = same.leaf
    if here:
        raise UsageError(
            f"{OPTION} {side}: the network prunes differently there (group {next(iter(here))}); leave it out"
        )
    return leaves
