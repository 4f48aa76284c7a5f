"""Folds weight standardisation and other arithmetic on weights alone into the raw graph, before masks are made.

A network may compute the weights it uses: standardised kernels (w - mean(w)) / std(w), or position biases from a small
multi-layer perceptron. Statistics over a weight change with every index it loses, so that pruning would change the
values that stay. Folding makes the computed weight a constant, to which masks are then applied.

A value computed from weights alone is *mixed* when it, or a value it is computed from, is the result of an operator
that combines several elements of a weight. Mixed values are folded up to the node where another parameter joins: the
gain of a scaled convolution stays a parameter of its own, which a mask zeroes with the rows it scales. A folded value
of one parameter takes that parameter's name and shape.

A parameter is *live* when it also reaches activations unmixed: the projection that cross attention applies to constant
queries and to the keys of an image. The mask of a live parameter changes all that is computed from it, so that nothing
computed from it is folded; the rules read it as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from mm_edge.graph.partial import constant_values, run_constants

MIXING = frozenset(
    "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp ReduceProd CumSum "
    "MatMul Gemm Conv ConvTranspose Einsum Softmax LogSoftmax LayerNormalization InstanceNormalization "
    "BatchNormalization LpNormalization GroupNormalization RMSNormalization".split()
)

NameSet = frozenset[str]


def fold_weight_arithmetic_(model: ir.Model, parameters: Iterable[str]) -> NameSet:
    """Fold, in place, what is computed by mixing elements of weights.

    Returns the parameters whose names now hold the results. Other parameters that were folded are removed.
    """
    names = frozenset(parameters)
    _split_normalisations_(model, names)
    roots = _roots(model, names)
    if not roots:
        return frozenset()
    shapes = {
        name: initializer_shape(model.graph.initializers[name]) for name in names if name in model.graph.initializers
    }
    arrays = run_constants(model, [value.name or "" for value, _ in roots])
    for (value, _), array in zip(roots, arrays.values(), strict=True):
        value.replace_all_uses_with(add_constant_(model, f"{value.name}/folded", array))
    ir_passes.RemoveUnusedNodesPass()(model)
    folded: set[str] = set()
    for (value, sources), array in zip(roots, arrays.values(), strict=True):
        if len(sources) == 1:
            (name,) = sources
            folded |= _take_name_(model, f"{value.name}/folded", array, name, shapes[name])
    return frozenset(folded)


def _weights_only(model: ir.Model, parameters: NameSet) -> dict[ir.Value, NameSet]:
    """Return, for every constant value, the parameters it is computed from."""
    sources = {
        value: frozenset([name]) & parameters
        for name, value in model.graph.initializers.items()
        if value.name is not None
    }
    constant = constant_values(model.graph)
    for node in model.graph:
        if node.outputs[0] in constant:
            joined = frozenset[str]().union(*(sources[value] for value in node.inputs if value is not None))
            sources.update(dict.fromkeys(node.outputs, joined))
    return sources


def _roots(model: ir.Model, parameters: NameSet) -> list[tuple[ir.Value, NameSet]]:
    """Return the values to fold, each with its parameters: mixed values that some other computation reads."""
    sources = _weights_only(model, parameters)
    mixed: dict[ir.Value, NameSet] = {}
    for node in model.graph:
        if node.outputs[0] not in sources or not sources[node.outputs[0]]:
            continue
        inherited = frozenset[str]().union(
            *(mixed.get(value, frozenset()) for value in node.inputs if value is not None)
        )
        whole = sources[node.outputs[0]] if node.op_type in MIXING else inherited
        mixed.update(dict.fromkeys(node.outputs, whole))
    outputs = set(model.graph.outputs)
    live = _live(sources, mixed, outputs)
    whole_values = {value for value, names in mixed.items() if names and sources[value] <= names - live}
    return [
        (value, sources[value])
        for value in mixed
        if value in whole_values
        and (value in outputs or any(use.node.outputs[0] not in whole_values for use in value.uses()))
    ]


def _live(sources: Mapping[ir.Value, NameSet], mixed: Mapping[ir.Value, NameSet], outputs: set[ir.Value]) -> NameSet:
    """Return the parameters that a node which depends on the input reads unmixed, and those that are outputs so."""
    unmixed = {value: names - mixed.get(value, frozenset()) for value, names in sources.items()}
    return frozenset[str]().union(
        *(
            names
            for value, names in unmixed.items()
            if names and (value in outputs or any(use.node.outputs[0] not in sources for use in value.uses()))
        )
    )


def _split_normalisations_(model: ir.Model, parameters: NameSet) -> None:
    """Replace a BatchNormalization of a weight by one with gain 1 and shift 0, then a product and a sum.

    Only where gain or shift have parameters of their own, which then are not folded with the weight.
    """
    sources = _weights_only(model, parameters)
    for node in list(model.graph):
        if node.op_type != "BatchNormalization" or not sources.get(node.outputs[0]):
            continue
        data, gain, shift = node.inputs[0], node.inputs[1], node.inputs[2]
        assert data is not None and gain is not None and shift is not None and data.shape is not None
        if not (sources[gain] | sources[shift]) - sources[data]:
            continue
        channels = data.shape[1]
        assert isinstance(channels, int)
        column = [channels] + [1] * (len(data.shape) - 2)
        ones = add_constant_(model, f"{node.name}/ones", np.ones(channels, np.float32))
        zeros = add_constant_(model, f"{node.name}/zeros", np.zeros(channels, np.float32))
        shape = add_constant_(model, f"{node.name}/column", np.array(column, np.int64))
        node.replace_input_with(1, ones)
        node.replace_input_with(2, zeros)
        out = node.outputs[0]
        users = list(out.uses())
        steps = [ir.node("Reshape", [gain, shape]), ir.node("Reshape", [shift, shape])]
        steps.append(ir.node("Mul", [out, steps[0].outputs[0]]))
        steps.append(ir.node("Add", [steps[2].outputs[0], steps[1].outputs[0]]))
        for position, step in enumerate(steps):
            step.name = f"{node.name}/affine{position}"
            step.outputs[0].name = f"{node.name}/affine{position}_out"
            step.outputs[0].type = out.type
            step.outputs[0].shape = ir.Shape(column) if position < 2 else out.shape
        for use in users:
            use.node.replace_input_with(use.idx, steps[3].outputs[0])
        model.graph.insert_after(node, steps)


def initializer_shape(value: ir.Value) -> tuple[int, ...]:
    """Return the shape of an initialiser."""
    assert value.const_value is not None
    return tuple(value.const_value.shape.numpy())


def _take_name_(model: ir.Model, constant: str, array: np.ndarray, parameter: str, shape: tuple[int, ...]) -> NameSet:
    """Store a folded constant under its parameter's name and shape, where it has as many elements."""
    initializers = model.graph.initializers
    still_read = parameter in initializers and list(initializers[parameter].uses())
    if constant not in initializers or still_read or math.prod(shape) != array.size:
        return frozenset()
    value = initializers.pop(constant)
    initializers.pop(parameter, None)
    whole = add_constant_(model, parameter, array.reshape(shape))
    if array.shape == whole.shape:
        value.replace_all_uses_with(whole)
        return frozenset([parameter])
    target = add_constant_(model, f"{parameter}/shape", np.array(array.shape, np.int64))
    view = ir.node("Reshape", [whole, target], name=f"{parameter}/view")
    view.outputs[0].name, view.outputs[0].type, view.outputs[0].shape = f"{parameter}/viewed", value.type, value.shape
    first = next(node for node in model.graph if value in node.inputs)
    model.graph.insert_before(first, view)
    value.replace_all_uses_with(view.outputs[0])
    return frozenset([parameter])


def add_constant_(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """Add `array` to the graph's initialisers as `name` and return its value."""
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)  # unlike ascontiguousarray, this keeps scalars
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
