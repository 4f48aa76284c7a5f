"""Reads a user's own .onnx as a raw graph, and keeps what it leaves open.

Structure is read, and weights are solved, on a graph with static shapes. An artifact keeps the open sizes of the file,
and a batch above one. So two graphs are made:

    given    the file as it came, but for: functions inlined, weights that are initialisers alone, float32, every node
             and weight with a name of its own, and everything folded that no open size changes
    raw      the given graph at the sizes it is measured at, batch 1 where it takes that, its shapes folded

Weights and nodes have the same names in both, so that what is read from the raw graph is applied to the given one (see
`compact.materialise_artifact`). A size that the given graph computes, but that is the same at two different sizes of
the inputs, is folded: it is a width of the dense network, which must not change with the widths of a candidate.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch

from mm_edge.arrays import Arrays
from mm_edge.errors import ModelError, first_line
from mm_edge.graph.export import (
    FLOAT_TYPES,
    FOLDED_BYTES,
    RawGraph,
    export_raw,
    fold_rounds,
    remove_identities,
    split_shared_constants,
)
from mm_edge.graph.fold import add_constant_, fold_weight_arithmetic_
from mm_edge.graph.partial import constant_values, open_part, values_read
from mm_edge.load.models import LoadedModel
from mm_edge.load.network import ModelInput
from mm_edge.load.onnx_precision import other_precisions, to_float32_
from mm_edge.load.onnx_sizes import noise
from mm_edge.runtime import FATAL, open_session

# The oldest opset whose operators the rules read; older files are converted up.
OLDEST_OPSET = 11
# Operators whose results have a shape that the values they read decide.
SHAPED_BY_VALUES = frozenset(
    "NonZero NonMaxSuppression Unique Compress SequenceMap SplitToSequence SequenceAt SequenceInsert "
    "SequenceConstruct SequenceEmpty SequenceErase ConcatFromSequence StringSplit".split()
)

Shapes = Mapping[str, Sequence[int]]


def read_raw(model: LoadedModel) -> RawGraph:
    """Export the model once, or read the user's own .onnx."""
    if model.module is not None:
        return export_raw(model.module, *(torch.zeros(item.measured) for item in model.inputs))
    assert model.onnx_path is not None
    return raw_from_onnx(model.onnx_path, model.inputs)


def raw_from_onnx(path: Path, inputs: Sequence[ModelInput] = ()) -> RawGraph:
    """Read a user's own .onnx as a raw graph; every floating-point initialiser counts as a parameter.

    Without `inputs` every size must be fixed but the batch, which becomes 1.

    Raises:
        ModelError: the file is not a readable ONNX model, or a size is open that nothing states.
    """
    model = _load(path)
    _prepare_(model)
    inputs = tuple(inputs) or _fixed_inputs(model, path)
    _open_inputs_(model, inputs)
    statistics, floats = _state(model)
    _fold_(model, floats)
    split_shared_constants(model, floats)
    folded = fold_weight_arithmetic_(model, floats - statistics)
    _name_all_(model)
    if any(None in item.shape or item.shape[:1] not in ((), (1,)) for item in inputs):
        given, model = model, _at_measured(model, inputs)
    else:
        given = None
        _name_all_(model)
        _complete_shapes_(model)
    present = set((model if given is None else given).graph.initializers) & set(model.graph.initializers)
    parameters = frozenset((floats - statistics) & present) - folded
    return RawGraph(model, parameters, frozenset(statistics & present), (), folded, given, keeps_names=True)


def _load(path: Path) -> ir.Model:
    try:
        proto = onnx.load(str(path))
        if other_precisions(proto):
            to_float32_(proto)
        opset = max((item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")), default=None)
        if opset is not None and opset < OLDEST_OPSET:
            proto = onnx.version_converter.convert_version(proto, OLDEST_OPSET)
        return ir.from_proto(proto)
    except Exception as error:  # each library raises its own
        raise ModelError(
            f"'{path}' is not an ONNX model that can be read ({type(error).__name__}: {first_line(error)}); give a "
            "file made by torch.onnx.export"
        ) from error


def _prepare_(model: ir.Model) -> None:
    """Make functions, Constant nodes and Identities disappear, and weights initialisers alone."""
    ir_passes.InlinePass()(model)
    ir_passes.RemoveInitializersFromInputsPass()(model)
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)(model)
    remove_identities(model)
    ir_passes.RemoveUnusedNodesPass()(model)


def _fixed_inputs(model: ir.Model, path: Path) -> tuple[ModelInput, ...]:
    """Return the inputs of a file of which nothing else is known: its fixed sizes, and 1 for an open batch.

    Raises:
        ModelError: another size is open.
    """
    found: list[ModelInput] = []
    for value in model.graph.inputs:
        own = [] if value.shape is None else list(value.shape)
        sizes = [size if isinstance(size, int) else None for size in own]
        if sizes and sizes[0] is None:
            sizes[0] = 1
        if None in sizes or value.shape is None:
            raise ModelError(f"'{path}': input '{value.name}' has the shape {value.shape}; state the open sizes")
        shape = tuple(size for size in sizes if size is not None)
        found.append(ModelInput(value.name or "", shape, shape, shape))
    return tuple(found)


def _open_inputs_(model: ir.Model, inputs: Sequence[ModelInput]) -> None:
    """Give the inputs the shapes that artifacts have; what was known of other shapes may rest on the file's own."""
    known = {item.name: item for item in inputs}
    outputs = {value: value.shape for value in model.graph.outputs}
    replaced = False
    for value in model.graph.inputs:
        own: list[Any] = [] if value.shape is None else list(value.shape)
        shape = known[value.name or ""].shape
        own = own or [None] * len(shape)
        replaced |= any(isinstance(old, int) and old != size for size, old in zip(shape, own, strict=True))
        value.shape = ir.Shape(
            size if size is not None else old if _is_symbol(old) else f"{value.name}_{index}"
            for index, (size, old) in enumerate(zip(shape, own, strict=True))
        )
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in graph:
            for value in node.outputs:
                value.shape = None
    for value, sizes in outputs.items():
        value.shape = None if replaced else sizes


def _is_symbol(size: object) -> bool:
    return isinstance(size, ir.SymbolicDim) and any(map(str.isalnum, str(size.value or "")))


def _state(model: ir.Model) -> tuple[set[str], set[str]]:
    """Return the names of BatchNormalization's statistics, and of every floating-point initialiser that has axes."""
    statistics = {
        value.name
        for node in model.graph
        if node.op_type == "BatchNormalization"
        for value in node.inputs[3:5]
        if value is not None and value.name is not None
    }
    floats = {
        name
        for name, value in model.graph.initializers.items()
        if value.dtype in FLOAT_TYPES and value.const_value is not None and value.const_value.shape.rank() > 0
    }
    return statistics, floats


def _name_all_(model: ir.Model) -> None:
    """Give every node without a name of its own one, numbered by its position."""
    taken = {node.name for node in model.graph if node.name}
    seen: set[str] = set()
    for position, node in enumerate(model.graph):
        if node.name and node.name not in seen:
            seen.add(node.name)
            continue
        name = base = node.name or f"{node.op_type}_{position}"
        while name in taken or name in seen:
            name = f"{base}_{position}"
            position += len(taken)
        node.name = name
        seen.add(name)


def _at_measured(given: ir.Model, inputs: Sequence[ModelInput]) -> ir.Model:
    """Return the given graph at the sizes it is measured at, with batch 1 where it takes that."""
    _fold_fixed_sizes_(given, inputs)
    measured = {item.name: item.measured for item in inputs}
    floats = {name for name, value in given.graph.initializers.items() if value.dtype in FLOAT_TYPES}
    batches = {shape[0] for shape in measured.values() if shape}
    single = {name: (1, *shape[1:]) for name, shape in measured.items()}
    if len(batches) == 1 and batches != {1} and all(measured.values()):
        model = _static(given, single, floats)
        if _runs(model, inputs, single):
            _complete_shapes_(model)
            return model
    model = _static(given, measured, floats)
    _complete_shapes_(model)
    return model


def _static(given: ir.Model, shapes: Shapes, floats: set[str]) -> ir.Model:
    model = given.clone()
    for value in model.graph.inputs:
        value.shape = ir.Shape(shapes[value.name or ""])
    for value in model.graph.outputs:
        value.shape = None
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    _fold_(model, floats)
    _name_all_(model)
    return model


def _fold_(model: ir.Model, floats: set[str]) -> None:
    """Fold what is computed from constants other than `floats`; ONNX Runtime computes what onnxscript leaves."""
    fold_rounds(model, floats)
    kept = {value for name, value in model.graph.initializers.items() if name in floats}
    constant = constant_values(model.graph)
    for node in model.graph:  # what is computed from a weight stays
        if not kept.isdisjoint(values_read(node)):
            kept.update(node.outputs)
    wanted = [
        value.name
        for node in model.graph
        for value in node.outputs
        if value in constant and value not in kept and value.name and not value.is_graph_output()
    ]
    if wanted:
        arrays = open_part(model, (), wanted, threads=0).run({})
        _replace_by_constants_(model, {name: array for name, array in arrays.items() if array.nbytes <= FOLDED_BYTES})
        fold_rounds(model, floats)


def _complete_shapes_(model: ir.Model) -> None:
    """Give values that shape inference knows nothing of, behind loops and other domains, the shape they have.

    A shape counts as theirs where it is the same for two different inputs.
    """
    depends: set[ir.Value] = set()
    for node in model.graph:
        if node.op_type in SHAPED_BY_VALUES or not depends.isdisjoint(values_read(node)):
            depends.update(node.outputs)
    unknown = {
        value.name: value
        for node in model.graph
        for value in node.outputs
        if value not in depends and value.name and (value.shape is None or not value.shape.is_static())
    }
    if not unknown:
        return
    feeds, other = (
        {
            value.name or "": noise(value.shape.numpy(), value.dtype.numpy().name, seed)
            for value in model.graph.inputs
            if value.shape is not None and value.dtype is not None
        }
        for seed in (0, 1)
    )
    part = open_part(model, tuple(feeds), tuple(unknown), threads=0)
    again = part.run(other)
    for name, array in part.run(feeds).items():
        if isinstance(array, np.ndarray) and np.shape(again[name]) == array.shape:
            unknown[name].shape = ir.Shape(array.shape)
            unknown[name].type = ir.TensorType(ir.DataType.from_numpy(array.dtype))


def _runs(model: ir.Model, inputs: Sequence[ModelInput], shapes: Shapes) -> bool:
    feeds = {item.name: noise(tuple(shapes[item.name]), item.dtype) for item in inputs}
    try:
        open_session(ir.to_proto(model).SerializeToString(), 0, severity=FATAL).run(None, feeds)
    except Exception:  # whatever it is, the network is not read at these sizes
        return False
    return True


def _fold_fixed_sizes_(model: ir.Model, inputs: Sequence[ModelInput]) -> None:
    """Fold what is computed from shapes alone and is the same at two sizes of the inputs."""
    computed = constant_values(model.graph, static_shapes=True) - constant_values(model.graph)
    names = [
        value.name
        for node in model.graph
        for value in node.outputs
        if value in computed and value.name and isinstance(value.type, ir.TensorType) and not value.is_graph_output()
    ]
    if not names or all(item.other == item.measured for item in inputs):
        return
    part = open_part(model, tuple(item.name for item in inputs), names, threads=0)
    first, second = (
        part.run({item.name: noise(shape, item.dtype) for item, shape in zip(inputs, shapes, strict=True)})
        for shapes in ([item.measured for item in inputs], [item.other for item in inputs])
    )
    _replace_by_constants_(model, {name: first[name] for name in names if _equal(first[name], second[name])})


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether a value is the same at both sizes; a comparison of sizes may come out otherwise at a third one."""
    same = first.shape == second.shape and first.dtype == second.dtype and first.dtype != np.bool_
    return same and bool(np.array_equal(first, second))


def _replace_by_constants_(model: ir.Model, arrays: Arrays) -> None:
    for node in model.graph:
        for value in node.outputs:
            if value.name in arrays:
                value.replace_all_uses_with(add_constant_(model, f"{value.name}/fixed", arrays[value.name]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ir_passes.RemoveUnusedNodesPass()(model)
