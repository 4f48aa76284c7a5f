"""Which values of a graph say how like the dense network a pruned one is, found from the graph alone.

What is judged decides what recovery can keep (E10 in docs/method.md). A detector's decoded boxes alone hide what
happens to its class scores, and the head's tensors before decoding alone hide what decoding does to them. So up to two
*views* of the answers count alike:

    decoded    the network's outputs, or, where an output depends on the data in its shape or order (non-maximum
               suppression, top k, the largest index), the last values before that
    raw        the results of the last layers with weights, before decoding (sigmoid, softmax, grids of constants)

Each view is divided into *kinds* of channels, such as boxes and class scores, which count alike within it: the
operands of a concatenation along the channels are kinds of their own, and raw results with equally many channels, as
of a head at several scales, are one kind together. Class scores, an output (batch, classes) or what a last softmax
reads, are one view of one kind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from mm_edge.arrays import Array, Float32Array
from mm_edge.errors import UsageError
from mm_edge.graph.export import FLOAT_TYPES, RawGraph
from mm_edge.graph.groups import Structure
from mm_edge.graph.partial import constant_values

# The most positions of one kind that are compared in one image; of more, a fixed sample is taken.
POSITIONS_MOST = 4096
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})
# Operators after which equal positions no longer mean the same thing, or that leave no differences of degree.
DATA_DEPENDENT = frozenset(
    {"TopK", "NonMaxSuppression", "NonZero", "ArgMax", "ArgMin", "If", "Loop", "Scan", "Unique", "Compress"}
)
# Operators that only move values or leave them as they are.
MOVING = frozenset(
    {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Identity", "Cast"}
)
SOFTMAXES = frozenset({"Softmax", "LogSoftmax"})
# Operators that end a network whose two-dimensional output is an embedding and not class scores.
EMBEDDING_ENDS = frozenset(
    {"LpNormalization", "ReduceL2", "BatchNormalization", "LayerNormalization", "Sqrt", "Tanh", "Sigmoid"}
)


@dataclass(frozen=True)
class AnswerPart:
    """The channels from `start` up to `stop` along `axis` of the value called `value`."""

    value: str
    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class AnswerKind:
    """Channels that mean the same kind of thing, such as box coordinates.

    Attributes:
        parts: with equally many channels each; their positions are pooled.
        divergence: the name of the divergence they are compared by; "" for the one that fits `shape`.
        shape: the shape of the value; () where it has several parts.
    """

    parts: tuple[AnswerPart, ...]
    divergence: str
    shape: tuple[int, ...]

    def of(self, values: Mapping[str, Array]) -> Float32Array:
        """Return this kind's numbers of one image, (positions, channels), from the image's values by name."""
        pieces = []
        for part in self.parts:
            moved = np.moveaxis(values[part.value], part.axis, -1)
            pieces.append(moved.reshape(-1, moved.shape[-1])[:, part.start : part.stop])
        found = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if len(found) > POSITIONS_MOST:
            found = found[np.sort(np.random.default_rng(0).choice(len(found), POSITIONS_MOST, replace=False))]
        return np.ascontiguousarray(found, dtype=np.float32)


@dataclass(frozen=True)
class AnswerViews:
    """What is compared with the dense network; every view counts alike, and in it every kind."""

    views: tuple[tuple[AnswerKind, ...], ...]

    @property
    def kinds(self) -> tuple[AnswerKind, ...]:
        """The kinds of all views, in order."""
        return tuple(kind for view in self.views for kind in view)

    @property
    def values(self) -> tuple[str, ...]:
        """The names of the values that are read, without repetitions."""
        return tuple(dict.fromkeys(part.value for kind in self.kinds for part in kind.parts))

    @property
    def class_scores(self) -> str | None:
        """The name of the value that holds class scores where nothing else is compared; None otherwise."""
        kinds = self.kinds
        scores = len(kinds) == 1 and (kinds[0].divergence == "kl" or len(kinds[0].shape) == 2)
        return kinds[0].parts[0].value if scores and kinds[0].divergence != "channels" else None


def find_answers(raw: RawGraph, structure: Structure, judge: Sequence[str] = ()) -> AnswerViews:
    """Return what is compared with the dense network.

    Args:
        raw: the dense graph.
        structure: its groups: what may lose channels is not compared.
        judge: names of values that are compared instead of those found, each as a view of its own.

    Raises:
        UsageError: a name in `judge` is no floating-point value of the graph with a known shape.
    """
    reader = _Reader(raw, structure)
    if judge:
        return AnswerViews(tuple(reader.view_of(_named(raw, name)) for name in judge))
    values = _distinct(value for output in raw.model.graph.outputs for value in reader.comparable(output))
    if len(values) == 1 and (scores := reader.class_scores(values[0])) is not None:
        return AnswerViews((scores,))
    decoded = _merge([kind for value in values for kind in reader.view_of(value)])
    raw_kinds = reader.raw_view(values)
    return AnswerViews(tuple(view for view in (decoded, raw_kinds) if view))


def outputs_of(raw: RawGraph, structure: Structure) -> AnswerViews:
    """Return the network's own outputs, each a view, compared channel by channel."""
    reader = _Reader(raw, structure)
    found = [reader.view_of(value) for value in raw.model.graph.outputs if _is_comparable(value)]
    return AnswerViews(tuple(tuple(replace(kind, divergence="channels") for kind in view) for view in found))


def _named(raw: RawGraph, name: str) -> ir.Value:
    for node in raw.model.graph:
        for value in node.outputs:
            if value.name == name and _is_comparable(value):
                return value
    raise UsageError(
        f"--judge {name} is no floating-point value of the network with a known shape; "
        "'mm-edge inspect' shows those that are compared"
    )


def _distinct(values: Iterable[ir.Value]) -> list[ir.Value]:
    return list(dict.fromkeys(values))


def _merge(kinds: Sequence[AnswerKind]) -> tuple[AnswerKind, ...]:
    """Return the kinds without repetitions."""
    return tuple(dict.fromkeys(kinds))


class _Reader:
    """One pass over a graph: where the channels of every value lie, and which kinds they divide into."""

    def __init__(self, raw: RawGraph, structure: Structure) -> None:
        self._graph = raw.model.graph
        self._structure = structure
        self._constants = constant_values(self._graph, static_shapes=True)
        self._axis: dict[ir.Value, int] = {}
        self._kinds: dict[ir.Value, tuple[int, ...]] = {}
        for node in self._graph:
            self._trace(node)

    # ---- where the channels are

    def _trace(self, node: ir.Node) -> None:
        computed = [value for value in node.inputs if value is not None and value not in self._constants]
        for out in node.outputs:
            shape = _shape(out)
            if not shape:
                continue
            if self._weight_of(node) is not None:
                self._axis[out] = 1 if node.op_type.startswith("Conv") else len(shape) - 1
                continue
            if node.op_type in WEIGHTED:  # it sums over what were channels
                continue
            source = next((value for value in computed if value in self._axis), None)
            axis = None if source is None else _moved_axis(node, source, self._axis[source], shape)
            if source is None or axis is None:
                continue
            self._axis[out] = axis
            kinds = self._kinds_after(node, source, axis, computed, shape)
            if len(kinds) > 1:
                self._kinds[out] = kinds

    def _kinds_after(
        self, node: ir.Node, source: ir.Value, axis: int, computed: Sequence[ir.Value], shape: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Return the numbers of channels of each kind of the node's output, () where it has one kind only."""
        if node.op_type == "Concat" and _attribute(node, "axis") % len(shape) == axis:
            sizes: list[int] = []
            for value in node.inputs:
                assert value is not None
                sizes += self._kinds.get(value, (_shape(value)[axis],))
            return tuple(sizes)
        kinds = self._kinds.get(source, ())
        return kinds if sum(kinds) == shape[axis] else ()

    def _axis_of(self, value: ir.Value) -> int:
        shape = _shape(value)
        known = self._axis.get(value)
        if known is not None:
            return known
        # Channels lie behind the batch in maps; in lists of positions they are fewer than the positions.
        return len(shape) - 1 if len(shape) < 3 or (len(shape) == 3 and shape[2] <= shape[1]) else 1

    def _weight_of(self, node: ir.Node) -> ir.Value | None:
        """Return the weight that a node multiplies by; None where it has none, or only decodes a softmax."""
        if node.op_type not in WEIGHTED:
            return None
        computed = [value for value in node.inputs if value is not None and value not in self._constants]
        weights = [value for value in node.inputs[:2] if value is not None and value in self._constants]
        if len(computed) != 1 or not weights or len(_shape(weights[0])) < 2 or self._reads_softmax(computed[0]):
            return None
        return weights[0]

    def _reads_softmax(self, value: ir.Value) -> bool:
        """Return whether a value is a softmax, moved at most, as in decoding a distribution over distances."""
        node = value.producer()
        while node is not None and node.op_type in MOVING and node.inputs and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        return node is not None and node.op_type == "Softmax"

    # ---- what is compared

    def comparable(self, value: ir.Value) -> list[ir.Value]:
        """Return the value, or the nearest values before it whose positions can be compared."""
        if _is_comparable(value) and not self._depends_on_data(value):
            return [value]
        node = value.producer()
        if node is None:
            return []
        before = [item for item in node.inputs if item is not None and item not in self._constants]
        return _distinct([found for item in before for found in self.comparable(item)])

    def _depends_on_data(self, value: ir.Value) -> bool:
        pending, seen = [value], set()
        while pending:
            node = pending.pop().producer()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.op_type in DATA_DEPENDENT:
                return True
            if self._weight_of(node) is None:
                pending += [item for item in node.inputs if item is not None and item not in self._constants]
        return False

    def view_of(self, value: ir.Value) -> tuple[AnswerKind, ...]:
        """Return a value's channels, divided into kinds."""
        axis, shape = self._axis_of(value), _shape(value)
        sizes = self._kinds.get(value, (shape[axis],))
        ends = np.cumsum((0, *sizes)).tolist()
        assert value.name is not None
        return tuple(
            AnswerKind((AnswerPart(value.name, axis, start, stop),), "", shape)
            for start, stop in itertools.pairwise(ends)
        )

    def class_scores(self, value: ir.Value) -> tuple[AnswerKind, ...] | None:
        """Return the kind of class scores if `value` is the network's only answer and holds them."""
        shape, node = _shape(value), value.producer()
        while node is not None and node.op_type in MOVING and node.inputs and node.inputs[0] is not None:
            value, node = node.inputs[0], node.inputs[0].producer()
        if node is not None and node.op_type in SOFTMAXES and node.inputs[0] is not None:
            before = node.inputs[0]
            assert before.name is not None
            rank = len(_shape(before))
            axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else -1) % rank
            return (AnswerKind((AnswerPart(before.name, axis, 0, _shape(before)[axis]),), "kl", _shape(before)),)
        if len(shape) != 2 or self._ends_as_embedding(value):
            return None
        return self.view_of(value)[:1] if value.name in {item.name for item in self._graph.outputs} else None

    def _ends_as_embedding(self, value: ir.Value) -> bool:
        return any(node.op_type in EMBEDDING_ENDS for node in self._behind_weights([value])[1])

    def raw_view(self, values: Sequence[ir.Value]) -> tuple[AnswerKind, ...]:
        """Return the results of the last layers with weights; () where `values` only move them, or one may be pruned.

        Results with equally many channels are one kind.
        """
        heads, between = self._behind_weights(values)
        if not heads or all(node.op_type in MOVING for node in between):
            return ()
        pools: dict[tuple[int, int], list[AnswerPart]] = {}
        shapes: list[tuple[int, ...]] = []
        for head in heads:
            value = _with_bias(head, self._constants)
            if value.name is None or not _is_comparable(value) or not self._is_whole(head):
                return ()
            axis, shape = self._axis_of(value), _shape(value)
            part = AnswerPart(value.name, axis, 0, shape[axis])
            # Results of one shape are different things, such as sizes and offsets at one scale.
            pools.setdefault((shape[axis], shapes.count(shape)), []).append(part)
            shapes.append(shape)
        return tuple(AnswerKind(tuple(parts), "channels", ()) for parts in pools.values())

    def _is_whole(self, node: ir.Node) -> bool:
        """Return whether a node with a weight keeps all its outputs in every candidate."""
        weight = self._weight_of(node)
        if weight is None or weight.name not in self._structure.tensor_axes:
            return False
        axes = self._structure.tensor_axes[weight.name]
        table = self._structure.table
        leaves = table.leaves(axes[_output_axis(node, len(axes))])
        return all(table.size(leaf) == 1 or table.pin_reason(leaf) is not None for leaf in leaves)

    def _behind_weights(self, values: Sequence[ir.Value]) -> tuple[list[ir.Node], list[ir.Node]]:
        """Return the last nodes with weights before `values`, in graph order, and the nodes between."""
        heads: dict[ir.Node, None] = {}
        between: dict[ir.Node, None] = {}
        pending = list(values)
        while pending:
            node = pending.pop().producer()
            if node is None or node in heads or node in between:
                continue
            if self._weight_of(node) is not None:
                heads[node] = None
                continue
            between[node] = None
            pending += [item for item in node.inputs if item is not None and item not in self._constants]
        return [node for node in self._graph if node in heads], list(between)


def _output_axis(node: ir.Node, rank: int) -> int:
    """Return along which axis of its weight the outputs of a node lie."""
    if node.op_type == "Gemm":
        transposed = node.attributes.get("transB")
        return 0 if transposed is not None and transposed.as_int() else 1
    return {"Conv": 0, "ConvTranspose": 1}.get(node.op_type, rank - 1)


def _with_bias(node: ir.Node, constants: set[ir.Value]) -> ir.Value:
    """Return the node's result, after a bias that alone reads it."""
    out = node.outputs[0]
    uses = list(out.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        others = [value for value in uses[0].node.inputs if value is not out]
        if all(value in constants for value in others):
            return uses[0].node.outputs[0]
    return out


def _moved_axis(node: ir.Node, source: ir.Value, axis: int, shape: tuple[int, ...]) -> int | None:
    """Return where the channels that lie along `axis` of `source` lie in the node's output; None if unknown."""
    before = _shape(source)
    if node.op_type == "Transpose":
        stated = node.attributes.get("perm")
        return (list(stated.as_ints()) if stated is not None else list(range(len(shape)))[::-1]).index(axis)
    if node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        behind, size = math.prod(before[axis + 1 :]), before[axis]
        fitting = [at for at in range(len(shape)) if math.prod(shape[at + 1 :]) == behind and size % shape[at] == 0]
        # A size of one may stand beside the channels at the same distance from the end.
        return max(fitting, key=lambda at: shape[at], default=None)
    moved = axis - len(before) + len(shape)
    return moved if 0 <= moved < len(shape) else None


def _attribute(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int()


def _is_comparable(value: ir.Value) -> bool:
    return value.dtype in FLOAT_TYPES and bool(_shape(value))


def _shape(value: ir.Value) -> tuple[int, ...]:
    """Return the static shape; () where it is unknown or symbolic."""
    sizes = () if value.shape is None else tuple(value.shape)
    known = tuple(size for size in sizes if isinstance(size, int))
    return known if len(known) == len(sizes) else ()
