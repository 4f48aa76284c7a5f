"""The operator table: what each ONNX operator says about the axes of its operands.

One small function per operator, registered under its name. A rule unifies axes, splits or merges them,
pins what the operator reduces or reorders, records the edits its constants need in a compact graph, and
sets the axes of its outputs. An operator without a rule pins everything it touches.

Each rule follows the ONNX operator specification of the operator it names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from mm_edge.graph.axes import Axis
from mm_edge.graph.reading import (
    AttributeEdit,
    Axes,
    Contraction,
    MeanEdit,
    NormEdit,
    OperandEdit,
    Reading,
    SizeTerm,
    StructureMismatch,
    Work,
    is_static,
    shape_of,
)

OperatorRule = Callable[[Reading, ir.Node], None]
OPERATOR_RULES: dict[str, OperatorRule] = {}


def rule(*operators: str) -> Callable[[OperatorRule], OperatorRule]:
    """Register the decorated function as the rule of `operators`."""

    def register(function: OperatorRule) -> OperatorRule:
        for operator in operators:
            OPERATOR_RULES[operator] = function
        return function

    return register


def apply_rule(reading: Reading, node: ir.Node) -> None:
    """Read one node; what its rule does not describe is pinned with the operator's name."""
    known = OPERATOR_RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    try:
        if known is None:
            raise StructureMismatch(f"operator {node.op_type} has no rule")
        known(reading, node)
    except StructureMismatch as mismatch:
        pin_node(reading, node, f"{node.op_type}: {mismatch}")


def pin_node(reading: Reading, node: ir.Node, reason: str) -> None:
    """Pin every axis of every operand and result of `node`."""
    for value in node.inputs:
        if value is not None and is_static(value):
            reading.pin(reading.axes_of(value), reason)
    for value in node.outputs:
        assert value.name is not None
        reading.axes.pop(value.name, None)
        if is_static(value):
            reading.pin(reading.axes_of(value), reason)


def attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute."""
    value = node.attributes.get(name)
    return default if value is None else value.as_int()


def text(node: ir.Node, name: str, default: str) -> str:
    """Return a string attribute."""
    value = node.attributes.get(name)
    return default if value is None else value.as_string()


def numbers(node: ir.Node, name: str) -> list[int] | None:
    """Return a list-of-integers attribute, or None."""
    value = node.attributes.get(name)
    return None if value is None else list(value.as_ints())


def operand_axes(reading: Reading, node: ir.Node, index: int) -> Axes:
    """Return the axes of operand `index`, () when it is absent."""
    return reading.axes_of(node.inputs[index]) if index < len(node.inputs) else ()


def constant_ints(reading: Reading, node: ir.Node, index: int, name: str | None = None) -> list[int] | None:
    """Return a constant integer operand as a list (older opsets keep it in attribute `name`), None when absent.

    Raises:
        StructureMismatch: the operand is computed at run time.
    """
    if index < len(node.inputs) and node.inputs[index] is not None:
        array = reading.constant(node.inputs[index])
        if array is None:
            raise StructureMismatch(f"operand {index} is computed at run time")
        return [int(item) for item in np.asarray(array).reshape(-1)]
    return numbers(node, name) if name is not None else None


def name_of(node: ir.Node) -> str:
    """Return the node's unique name, given to it by export.fold_constants."""
    assert node.name is not None
    return node.name


def operand_names(node: ir.Node, *indices: int) -> tuple[str, ...]:
    """Return the value names of some operands."""
    return tuple(value.name or "" for value in (node.inputs[index] for index in indices) if value is not None)


def resize_operand(reading: Reading, node: ir.Node, operand: int, axes: Sequence[Axis]) -> None:
    """Record that integer operand `operand` lists the sizes of `axes`."""
    sizes = tuple(SizeTerm(0, (axis,)) for axis in axes)
    reading.edits.append(OperandEdit(name_of(node), operand, sizes))


# --- weights meet activations -------------------------------------------------------------------


@rule("Conv", "ConvTranspose")
def convolution(reading: Reading, node: ir.Node) -> None:
    """Conv W[O, I/g, ...]; ConvTranspose W[I, O/g, ...]. A depthwise convolution carries its axis through."""
    table = reading.table
    data, weight = operand_axes(reading, node, 0), operand_axes(reading, node, 1)
    groups = attribute(node, "group", 1)
    transposed = node.op_type == "ConvTranspose"
    channels = data[1]
    ins, outs = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    reading.pin(data[2:], "spatial axis of a convolution")
    reading.pin(weight[2:], "kernel of a convolution")
    if groups == 1:
        table.unify(channels, ins)
        out, contracted = outs, ins
    else:
        out, contracted = _grouped(reading, node, channels, ins, outs, groups)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        table.unify(operand_axes(reading, node, 2)[0], out)
    spatial = [table.fresh(size, pin="spatial axis of a convolution") for size in shape_of(node.outputs[0])[2:]]
    reading.contractions.append(Contraction(name_of(node), contracted, operand_names(node, 0, 1)))
    grid = data[2:] if transposed else tuple(spatial)
    # Conv: every output position reads kernel * I/g; transposed: every input position writes kernel * O/g.
    side = channels if transposed else out
    reading.work.append(Work(name_of(node), (data[0], side, weight[1], *weight[2:], *grid)))
    reading.set_axes(node.outputs[0], [data[0], out, *spatial])


def _grouped(reading: Reading, node: ir.Node, channels: Axis, ins: Axis, outs: Axis, groups: int) -> tuple[Axis, Axis]:
    """Tie the group factor of a grouped convolution; return its output axis and the axis each group sums over."""
    table = reading.table
    size = table.size(channels) // groups
    group, inner = table.split_product(channels, [groups, size])
    if node.op_type == "ConvTranspose":
        weight_group, weight_inner = table.split_product(ins, [groups, size])
        table.unify(group, weight_group)
        table.unify(inner, weight_inner)
        out = table.product([group, outs])
    else:
        table.unify(inner, ins)
        weight_group, _ = table.split_product(outs, [groups, table.size(outs) // groups])
        table.unify(group, weight_group)
        out = outs
    reading.edits.append(AttributeEdit(name_of(node), "group", group))
    return out, inner


@rule("Gemm")
def gemm(reading: Reading, node: ir.Node) -> None:
    """A' B' + C, each operand transposed as its flag says."""
    table = reading.table
    left, right = operand_axes(reading, node, 0), operand_axes(reading, node, 1)
    rows, inner = left[::-1] if attribute(node, "transA", 0) else left
    inner_right, columns = right[::-1] if attribute(node, "transB", 0) else right
    table.unify(inner, inner_right)
    bias = operand_axes(reading, node, 2)
    reading.broadcast([(rows, columns), bias])
    reading.contractions.append(Contraction(name_of(node), inner, operand_names(node, 0, 1)))
    reading.work.append(Work(name_of(node), (rows, columns, inner)))
    reading.set_axes(node.outputs[0], [rows, columns])


@rule("MatMul")
def matmul(reading: Reading, node: ir.Node) -> None:
    """Batched matrix product with numpy's broadcasting; vectors act as a row or a column."""
    table = reading.table
    left, right = operand_axes(reading, node, 0), operand_axes(reading, node, 1)
    inner = left[-1]
    table.unify(inner, right[-2] if len(right) > 1 else right[-1])
    batch = reading.broadcast([left[:-2], right[:-2]])
    out = [*batch, *left[-2:-1], *(right[-1:] if len(right) > 1 else ())]
    reading.contractions.append(Contraction(name_of(node), inner, operand_names(node, 0, 1)))
    reading.work.append(Work(name_of(node), (*out, inner)))
    reading.set_axes(node.outputs[0], out)


@rule("Einsum")
def einsum(reading: Reading, node: ir.Node) -> None:
    """One letter, one axis. Letters missing from the result are summed over."""
    equation = text(node, "equation", "").replace(" ", "")
    if "->" not in equation or "." in equation:
        raise StructureMismatch(f"equation '{equation}' is not explicit")
    terms, result = equation.split("->")
    letters: dict[str, Axis] = {}
    for index, term in enumerate(terms.split(",")):
        for letter, axis in zip(term, operand_axes(reading, node, index), strict=True):
            if reading.table.size(axis) == 1 and letter in letters:
                continue
            if letter in letters and reading.table.size(letters[letter]) > 1:
                reading.table.unify(letters[letter], axis)
            else:
                letters[letter] = axis
    for letter, axis in letters.items():
        if letter not in result:
            readers = [index for index, term in enumerate(terms.split(",")) if letter in term]
            reading.contractions.append(Contraction(name_of(node), axis, operand_names(node, *readers)))
    reading.work.append(Work(name_of(node), tuple(letters.values())))
    reading.set_axes(node.outputs[0], [letters[letter] for letter in result])


# --- element-wise ---------------------------------------------------------------------------------

UNARY = (
    "Relu Gelu HardSwish HardSigmoid Sigmoid Tanh Erf Sqrt Abs Neg Sign LeakyRelu Elu Selu Celu Mish Softplus "
    "Softsign Exp Log Sin Cos Reciprocal Floor Ceil Round Identity Cast Not IsNaN IsInf Swish ThresholdedRelu"
).split()
BROADCAST = (
    "Add Sub Mul Div Pow Max Min Mod Where Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor PRelu Sum Mean "
    "BitwiseAnd BitwiseOr BitShift"
).split()


@rule(*UNARY)
def unary(reading: Reading, node: ir.Node) -> None:
    """One operand, same shape."""
    reading.set_axes(node.outputs[0], operand_axes(reading, node, 0))


@rule("Clip", "CastLike", "Dropout", "Trilu")
def first_operand(reading: Reading, node: ir.Node) -> None:
    """The first operand's shape; the others are scalars or give only a type. Trilu reads positions."""
    axes = operand_axes(reading, node, 0)
    if node.op_type == "Trilu":
        reading.pin(axes[-2:], "Trilu reads positions along this axis")
    reading.set_axes(node.outputs[0], axes)


@rule(*BROADCAST)
def elementwise(reading: Reading, node: ir.Node) -> None:
    """Any number of operands under broadcasting."""
    operands = [reading.axes_of(value) for value in node.inputs if value is not None]
    reading.set_axes(node.outputs[0], reading.broadcast(operands))


# --- normalisation and reduction ----------------------------------------------------------------


@rule("BatchNormalization")
def batch_normalization(reading: Reading, node: ir.Node) -> None:
    """Per channel: scale, shift, mean and variance follow the channel axis."""
    axes = operand_axes(reading, node, 0)
    for index in range(1, 5):
        reading.table.unify(axes[1], operand_axes(reading, node, index)[0])
    reading.set_axes(node.outputs[0], axes)


@rule("InstanceNormalization")
def instance_normalization(reading: Reading, node: ir.Node) -> None:
    """Per sample and channel, over the rest."""
    axes = operand_axes(reading, node, 0)
    reading.pin(axes[2:], "InstanceNormalization averages over this axis")
    for index in (1, 2):
        reading.table.unify(axes[1], operand_axes(reading, node, index)[0])
    reading.set_axes(node.outputs[0], axes)


@rule("LayerNormalization", "RMSNormalization")
def layer_normalization(reading: Reading, node: ir.Node) -> None:
    """Over the trailing axes from `axis` on."""
    axes = operand_axes(reading, node, 0)
    start = attribute(node, "axis", -1) % len(axes)
    if reading.prune_norms and node.op_type == "LayerNormalization":
        for axis in axes[start:]:
            reading.contractions.append(Contraction(name_of(node), axis, operand_names(node, 0)))
        reading.edits.append(NormEdit(name_of(node), axes[start:]))
    else:
        reading.pin(axes[start:], f"{node.op_type} averages over this axis")
    for index in range(1, len(node.inputs)):
        reading.broadcast([axes, operand_axes(reading, node, index)])
    reading.set_axes(node.outputs[0], axes)


@rule("GroupNormalization")
def group_normalization(reading: Reading, node: ir.Node) -> None:
    """Over the channels of a group and all positions: whole groups may go."""
    axes = operand_axes(reading, node, 0)
    groups = attribute(node, "num_groups", 1)
    group, inner = reading.table.split_product(axes[1], [groups, reading.table.size(axes[1]) // groups])
    reading.pin([inner, *axes[2:]], "GroupNormalization averages over this axis")
    if groups == 1:
        reading.pin(axes[1:2], "GroupNormalization averages over this axis")
    for index in (1, 2):
        (parameter,) = operand_axes(reading, node, index)
        reading.table.unify(parameter, axes[1] if reading.table.size(parameter) != groups else group)
    reading.edits.append(AttributeEdit(name_of(node), "num_groups", group))
    reading.set_axes(node.outputs[0], axes)


@rule("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "CumSum")
def along_axis(reading: Reading, node: ir.Node) -> None:
    """Mix every index of one axis."""
    axes = operand_axes(reading, node, 0)
    along = attribute(node, "axis", -1)
    if node.op_type == "CumSum":
        (along,) = constant_ints(reading, node, 1) or [0]
    reading.pin([axes[along]], f"{node.op_type} mixes every index of this axis")
    reading.set_axes(node.outputs[0], axes)


@rule(*"ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceProd ReduceLogSumExp".split())
def reduce(reading: Reading, node: ir.Node) -> None:
    """Sums bear the loss of zero terms, a mean bears it when its divisor is kept, extremes do not."""
    axes = operand_axes(reading, node, 0)
    along = constant_ints(reading, node, 1, "axes")
    if not along:
        along = [] if attribute(node, "noop_with_empty_axes", 0) else list(range(len(axes)))
    reduced = sorted(index % len(axes) for index in along)
    for index in reduced:
        if node.op_type in ("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"):
            reading.contractions.append(Contraction(name_of(node), axes[index], operand_names(node, 0)))
        else:
            reading.pin([axes[index]], f"{node.op_type} over this axis")
    if node.op_type == "ReduceMean" and reduced:
        reading.edits.append(MeanEdit(name_of(node), tuple(axes[index] for index in reduced)))
    if attribute(node, "keepdims", 1):
        out = [reading.table.fresh(1) if index in reduced else axis for index, axis in enumerate(axes)]
    else:
        out = [axis for index, axis in enumerate(axes) if index not in reduced]
    reading.set_axes(node.outputs[0], out)


@rule("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool")
def pool(reading: Reading, node: ir.Node) -> None:
    """Per channel, over positions."""
    axes = operand_axes(reading, node, 0)
    reading.pin(axes[2:], "spatial axis of a pooling")
    spatial = [reading.table.fresh(size, pin="spatial axis of a pooling") for size in shape_of(node.outputs[0])[2:]]
    reading.set_axes(node.outputs[0], [*axes[:2], *spatial])


# --- shape ------------------------------------------------------------------------------------------


@rule("Transpose")
def transpose(reading: Reading, node: ir.Node) -> None:
    """Axes in another order."""
    axes = operand_axes(reading, node, 0)
    order = numbers(node, "perm") or list(range(len(axes)))[::-1]
    reading.set_axes(node.outputs[0], [axes[index] for index in order])


@rule("Reshape", "Flatten")
def reshape(reading: Reading, node: ir.Node) -> None:
    """Row-major: factors are merged and split, never reordered."""
    axes = operand_axes(reading, node, 0)
    out = reading.reshape(axes, shape_of(node.outputs[0]))
    if node.op_type == "Reshape":
        resize_operand(reading, node, 1, out)
    reading.set_axes(node.outputs[0], out)


@rule("Squeeze", "Unsqueeze")
def squeeze(reading: Reading, node: ir.Node) -> None:
    """Remove or insert axes of size one; the others keep their order."""
    wide = iter(axis for axis in operand_axes(reading, node, 0) if reading.table.size(axis) != 1)
    sizes = shape_of(node.outputs[0])
    reading.set_axes(node.outputs[0], [next(wide) if size != 1 else reading.table.fresh(1) for size in sizes])


@rule("Concat")
def concat(reading: Reading, node: ir.Node) -> None:
    """One axis is a sum of parts, the others are common."""
    operands = [reading.axes_of(value) for value in node.inputs if value is not None]
    along = attribute(node, "axis", 0) % len(operands[0])
    for other in operands[1:]:
        for index, (a, b) in enumerate(zip(operands[0], other, strict=True)):
            if index != along:
                reading.table.unify(a, b)
    out = list(operands[0])
    out[along] = reading.table.sum([axes[along] for axes in operands])
    reading.set_axes(node.outputs[0], out)


@rule("Split")
def split(reading: Reading, node: ir.Node) -> None:
    """The opposite of Concat."""
    axes = operand_axes(reading, node, 0)
    along = attribute(node, "axis", 0) % len(axes)
    sizes = [shape_of(value)[along] for value in node.outputs]
    parts = reading.table.split_sum(axes[along], sizes)
    resize_operand(reading, node, 1, parts)
    for value, part in zip(node.outputs, parts, strict=True):
        out = list(axes)
        out[along] = part
        reading.set_axes(value, out)


@rule("Slice")
def slice_(reading: Reading, node: ir.Node) -> None:
    """Consecutive indices are a part of a sum; strides pin."""
    axes = list(operand_axes(reading, node, 0))
    starts, ends = constant_ints(reading, node, 1) or [], constant_ints(reading, node, 2) or []
    along = constant_ints(reading, node, 3) or list(range(len(starts)))
    steps = constant_ints(reading, node, 4) or [1] * len(starts)
    first: list[SizeTerm] = []
    last: list[SizeTerm] = []
    for index, start, end, step in zip(along, starts, ends, steps, strict=True):
        axis = axes[index]
        begin, stop, stride = slice(start, end if end < 2**31 - 1 else None, step).indices(reading.table.size(axis))
        if stride != 1:
            reading.pin([axis], "a slice with a stride")
            size = len(range(begin, stop, stride))
            axes[index] = reading.table.fresh(size, pin="a slice with a stride")
            first.append(SizeTerm(start))
            last.append(SizeTerm(end))
            continue
        before, part, _ = reading.table.split_sum(axis, [begin, stop - begin, reading.table.size(axis) - stop])
        axes[index] = part
        first.append(SizeTerm(0, (before,)))
        last.append(SizeTerm(0, (before, part)))
    reading.edits.append(OperandEdit(name_of(node), 1, tuple(first)))
    reading.edits.append(OperandEdit(name_of(node), 2, tuple(last)))
    reading.set_axes(node.outputs[0], axes)


@rule("Gather")
def gather(reading: Reading, node: ir.Node) -> None:
    """Pick indices of one axis: it can lose none, the others are carried."""
    axes = operand_axes(reading, node, 0)
    along = attribute(node, "axis", 0) % len(axes)
    reading.pin([axes[along]], "a Gather picks indices of this axis by number")
    picked = [reading.table.fresh(size, pin="picked by a Gather") for size in shape_of(_operand(node, 1))]
    reading.set_axes(node.outputs[0], [*axes[:along], *picked, *axes[along + 1 :]])


@rule("GatherND")
def gather_nd(reading: Reading, node: ir.Node) -> None:
    """Index tuples address the axes after the batch ones; the rest is carried."""
    axes = operand_axes(reading, node, 0)
    indices = shape_of(_operand(node, 1))
    batch = attribute(node, "batch_dims", 0)
    addressed = axes[batch : batch + indices[-1]]
    reading.pin(addressed, "a GatherND picks indices of this axis by number")
    reading.pin(axes[:batch], "batch axis of a GatherND")
    picked = [reading.table.fresh(size, pin="picked by a GatherND") for size in indices[batch:-1]]
    reading.set_axes(node.outputs[0], [*axes[:batch], *picked, *axes[batch + indices[-1] :]])


@rule("Expand")
def expand(reading: Reading, node: ir.Node) -> None:
    """Repeat axes of size one."""
    axes = operand_axes(reading, node, 0)
    target = shape_of(node.outputs[0])
    wide = tuple(reading.table.fresh(size) for size in target)
    out = reading.broadcast([wide, axes])
    resize_operand(reading, node, 1, out)
    reading.set_axes(node.outputs[0], out)


@rule("Tile")
def tile(reading: Reading, node: ir.Node) -> None:
    """Repeat an axis as a whole: the repetition is the major factor."""
    axes = operand_axes(reading, node, 0)
    repeats = constant_ints(reading, node, 1) or []
    out = [
        axis if count == 1 else reading.table.product([reading.table.fresh(count, pin="repetitions of a Tile"), axis])
        for axis, count in zip(axes, repeats, strict=True)
    ]
    reading.set_axes(node.outputs[0], out)


@rule("Pad")
def pad(reading: Reading, node: ir.Node) -> None:
    """Padding adds parts that stay; reflected or negative padding pins."""
    axes = operand_axes(reading, node, 0)
    pads = constant_ints(reading, node, 1, "pads") or []
    along = constant_ints(reading, node, 3) if len(node.inputs) > 3 else None
    along = list(range(len(axes))) if along is None else along
    plain = text(node, "mode", "constant") == "constant"
    out = list(axes)
    for position, index in enumerate(along):
        before, after = pads[position], pads[position + len(along)]
        if before == after == 0:
            continue
        axis = axes[index]
        if not plain or before < 0 or after < 0:
            reading.pin([axis], f"{text(node, 'mode', 'constant')} padding along this axis")
            out[index] = reading.table.fresh(reading.table.size(axis) + before + after, pin="padded axis")
            continue
        edges = [reading.table.fresh(size, pin="padding") for size in (before, after)]
        out[index] = reading.table.sum([edges[0], axis, edges[1]])
    reading.set_axes(node.outputs[0], out)


@rule("Resize", "Upsample")
def resize(reading: Reading, node: ir.Node) -> None:
    """Axes that change size are positions; the others are carried."""
    axes = operand_axes(reading, node, 0)
    out = []
    for axis, size in zip(axes, shape_of(node.outputs[0]), strict=True):
        if size == reading.table.size(axis):
            out.append(axis)
            continue
        reading.pin([axis], "resized axis")
        out.append(reading.table.fresh(size, pin="resized axis"))
    reading.pin(axes[2:], "resized axis")
    if len(node.inputs) > 3 and node.inputs[3] is not None and len(constant_ints(reading, node, 3) or []) == len(axes):
        resize_operand(reading, node, 3, out)
    reading.set_axes(node.outputs[0], out)


@rule("DepthToSpace", "SpaceToDepth")
def depth_space(reading: Reading, node: ir.Node) -> None:
    """Blocks of positions move into the channel axis or out of it."""
    axes = operand_axes(reading, node, 0)
    block = attribute(node, "blocksize", 1)
    reading.pin(axes[2:], "spatial axis of a block rearrangement")
    spatial = [reading.table.fresh(size, pin="spatial axis") for size in shape_of(node.outputs[0])[2:]]
    if node.op_type == "SpaceToDepth":
        blocks = reading.table.fresh(block * block, pin="positions of a block")
        channels = reading.table.product([blocks, axes[1]])
    else:
        depth = reading.table.size(axes[1]) // (block * block)
        major = text(node, "mode", "DCR") == "CRD"
        sizes = [depth, block * block] if major else [block * block, depth]
        parts = reading.table.split_product(axes[1], sizes)
        channels, blocks = parts if major else parts[::-1]
        reading.pin([blocks], "positions of a block")
    reading.set_axes(node.outputs[0], [axes[0], channels, *spatial])


@rule("Shape", "Size", "ConstantOfShape", "Range", "EyeLike", "RandomNormalLike", "NonZero", "ArgMax", "ArgMin", "TopK")
def positions(reading: Reading, node: ir.Node) -> None:
    """What depends on sizes or positions themselves pins what it reads."""
    raise StructureMismatch("its result depends on the sizes or order of its operand's axes")


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


# --- what removed indices hold (E8) -----------------------------------------------------------------

ZERO_AT_ZERO = frozenset(
    "Relu Gelu HardSwish Tanh Erf Sqrt Abs Neg Sign LeakyRelu Elu Selu Celu Mish Softsign Sin Floor Ceil Round "
    "Identity Cast CastLike Swish Dropout PRelu ThresholdedRelu".split()
)
CARRIES = frozenset(
    "Transpose Reshape Flatten Squeeze Unsqueeze Slice Split Gather GatherND Expand Tile Pad Resize Upsample "
    "DepthToSpace SpaceToDepth MaxPool AveragePool GlobalAveragePool GlobalMaxPool LpPool ReduceMean ReduceSum "
    "ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare CumSum".split()
)
PRODUCTS = frozenset(
    "Mul And Div Pow MatMul Gemm Conv ConvTranspose Einsum BatchNormalization InstanceNormalization".split()
)
SUMS = frozenset("Add Sub Sum Mean Max Min Or".split())


def zero_operands(node: ir.Node) -> tuple[str, list[int]]:
    """Return how zeros pass through `node`, and from which operands.

    "any": a removed index of the result is zero where it is zero in one of the operands;
    "all": only where it is zero in all of them; "none": not even then.
    """
    count = len(node.inputs)
    if node.op_type == "Pad" and not _padding_keeps_zero(node):
        return "none", []
    if node.op_type in ZERO_AT_ZERO or node.op_type in CARRIES or node.op_type == "Div":
        return "any", [0]
    if node.op_type == "Clip":
        return ("any", [0]) if _clip_keeps_zero(node) else ("none", [])
    if node.op_type == "Pow":
        return ("any", [0]) if _is_positive(node.inputs[1]) else ("none", [])
    if node.op_type in ("BatchNormalization", "LayerNormalization"):
        return "any", [1]
    if node.op_type in PRODUCTS:
        return "any", list(range(count)) if node.op_type == "Einsum" else [0, 1]
    if node.op_type in SUMS or node.op_type == "Concat":
        return "all", list(range(count))
    if node.op_type == "Where":
        return "all", [1, 2]
    return "none", []


def added_operands(node: ir.Node) -> list[int]:
    """Return the operands a product-like node adds at its end: biases and shifts."""
    if node.op_type in (
        "Conv",
        "ConvTranspose",
        "Gemm",
        "BatchNormalization",
        "InstanceNormalization",
        "LayerNormalization",
    ):
        return [2] if len(node.inputs) > 2 and node.inputs[2] is not None else []
    return []


def carried_axes(reading: Reading, node: ir.Node, index: int) -> Axes:
    """Return the axes of operand `index` of a product that reappear in its result; the others are summed over."""
    axes = operand_axes(reading, node, index)
    if node.op_type == "MatMul":
        return axes[:-1] if index == 0 else (*axes[:-2], *axes[-1:]) if len(axes) > 1 else ()
    if node.op_type == "Gemm" and index < 2:
        transposed = attribute(node, "transA" if index == 0 else "transB", 0)
        return (axes[index] if not transposed else axes[1 - index],)
    if node.op_type == "Einsum":
        terms, arrow, result = text(node, "equation", "").replace(" ", "").partition("->")
        if not arrow or "." in terms:
            return ()
        return tuple(axis for letter, axis in zip(terms.split(",")[index], axes, strict=True) if letter in result)
    if node.op_type in ("Conv", "ConvTranspose") and index < 2:
        transposed = node.op_type == "ConvTranspose"
        # The channels of the data and the rows of a transposed kernel reappear as their group, all else is summed.
        own = axes[:1] if index == 0 else axes[1:2] if transposed else axes[:1]
        groups = attribute(node, "group", 1)
        if groups > 1 and (index == 0 or transposed):
            channels = axes[1] if index == 0 else axes[0]
            own += tuple(reading.table.split_product(channels, [groups, reading.table.size(channels) // groups])[:1])
        return own
    return axes


def undefined_at_zero(node: ir.Node) -> list[int]:
    """Return the operands that must not be zero: there the result would be infinite or no number."""
    if node.op_type in ("Div", "Mod"):
        return [1]
    if node.op_type in ("Reciprocal", "Log"):
        return [0]
    return [0] if node.op_type == "Pow" and not _is_positive(node.inputs[1]) else []


def _is_positive(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and bool(np.all(value.const_value.numpy() > 0))


def _padding_keeps_zero(node: ir.Node) -> bool:
    """Padding with a negative number is as good as zero where only maxima are taken of it."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    number: float | None = node.attributes["value"].as_float() if "value" in node.attributes else 0.0
    if value is not None:
        number = float(value.const_value.numpy()) if value.const_value is not None else None
    only_maxima = all(use.node.op_type == "MaxPool" for use in node.outputs[0].uses())
    return number == 0 or (number is not None and number < 0 and only_maxima)


def _clip_keeps_zero(node: ir.Node) -> bool:
    bounds = [-math.inf, math.inf]
    for index in (1, 2):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and value.const_value is not None:
            bounds[index - 1] = float(value.const_value.numpy())
    for position, name in enumerate(("min", "max")):
        if name in node.attributes:
            bounds[position] = node.attributes[name].as_float()
    return bounds[0] <= 0 <= bounds[1]
