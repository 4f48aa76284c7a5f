"""Consumers: the nodes that multiply activations by one weight, and what happens to their product afterwards.

A consumer computes y = W h at every position, with W (O, K) in `groups` independent blocks. Up to the next residual
addition or non-linearity, what follows is affine per channel (bias, BatchNorm, layer scale):

    z = scale * y + offset,           and at a residual addition             A = z + skip

Solved for y, this says what the product should be when the sum A should be the dense network's:

    y = (A - skip - offset) / scale

A transposed convolution is read as the convolution it equals: over its input with stride - 1 zeros between positions,
with the kernel turned round. Its weight is solved like any other; the rows of h hold the zeros too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from mm_edge.arrays import Array, Float32Array, Float64Array, IntArray
from mm_edge.graph.export import RawGraph
from mm_edge.graph.partial import RunnableGraph

# Operators that move values and do not change them.
MOVES = frozenset("Transpose Reshape Squeeze Unsqueeze Flatten Identity Dropout".split())


@dataclass(frozen=True)
class Window:
    """The patch that a convolution reads for an output position, one number per spatial axis in every field.

    `before` and `after` are the numbers of padded positions at the two ends of an axis. `spread` is, for a transposed
    convolution, how far apart the input's positions are once zeros stand between them; 1 for every other.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    spread: tuple[int, ...]

    @property
    def is_point(self) -> bool:
        """Whether every output position reads one input position."""
        return all(size == 1 for size in self.kernel + self.spread) and not any(self.before + self.after)


@dataclass(frozen=True)
class Shift:
    """The tensor that takes up a change of a consumer's mean output: `sign` times the change is added to it."""

    tensor: str
    sign: float

    def moved(self, array: Array, change: Float64Array) -> Array:
        """Return the tensor's `array` after the consumer's mean output has changed by `change`, both (O,)."""
        return (array + self.sign * change).astype(array.dtype)


@dataclass(frozen=True)
class Consumer:
    """One product of activations with a weight.

    Attributes:
        node: name of the node.
        weight: name of the initialiser.
        in_axis: the weight's axis of inputs (per group), 0 or 1; the other one of the two is the axis of outputs.
        groups: the number of independent blocks.
        window: the patch a convolution reads; None for a matrix product.
        shift: the tensor that takes up a change of the mean output; None if there is none.
        turned: whether the kernel is applied turned round, as by a transposed convolution.
    """

    node: str
    weight: str
    in_axis: int
    groups: int
    window: Window | None
    shift: Shift | None
    turned: bool = False

    def matrix(self, weight: Array) -> Float64Array:
        """Return `weight` as blocks (groups, outputs per group, K)."""
        rows = np.moveaxis(self._turn(weight), self.in_axis, 1) if weight.ndim > 1 else weight[:, None]
        return np.asarray(rows, dtype=np.float64).reshape(self.groups, rows.shape[0] // self.groups, -1)

    def weight_of(self, blocks: Float64Array, like: Array) -> Array:
        """Return the blocks of `matrix` in the layout and type of `like`."""
        rows = np.moveaxis(like, self.in_axis, 1)
        return self._turn(np.moveaxis(blocks.reshape(rows.shape), 1, self.in_axis)).astype(like.dtype)

    def _turn(self, weight: Array) -> Array:
        return np.flip(weight, tuple(range(2, weight.ndim))) if self.turned else weight


@dataclass(frozen=True)
class ProductPath:
    """What happens to a consumer's product y in one graph, up to a residual addition or the end of the affine chain.

    Attributes:
        result: name of the value at the end: the sum, or the last value that is affine in y.
        skip: name of the value that the addition adds; None without an addition.
        index: for every (position, output channel) of y, its index in the flattened `result`.
        scale: factor per output channel, (O,).
        offset: term per output channel, (O,).
    """

    result: str
    skip: str | None
    index: IntArray
    scale: Float64Array
    offset: Float64Array


def read_consumers(raw: RawGraph, graph: RunnableGraph) -> tuple[Consumer, ...]:
    """Return, in graph order, the products whose weight is a parameter that nothing else reads.

    They are Conv, ConvTranspose, Gemm and MatMul.
    A weight that is computed before it is used (weight standardisation) is left out: its columns cannot be solved for.
    So is a transposed convolution in groups, of which whole groups are removed.
    """
    found = []
    for node in graph.nodes:
        consumer = _consumer(raw, graph, node)
        if consumer is not None:
            found.append(consumer)
    return tuple(found)


def read_product_path(graph: RunnableGraph, consumer: Consumer) -> ProductPath:
    """Follow the product of `consumer` through `graph` up to the value that should equal the dense network's."""
    node = graph.node(consumer.node)
    value = node.output[0]
    index = _channels_last(np.arange(_count(graph.shapes[value])).reshape(graph.shapes[value]), consumer)
    scale, offset = np.ones(index.shape[1]), np.zeros(index.shape[1])
    if len(node.input) > 2 and node.input[2]:
        offset = offset + _vector(graph, node.input[2], value, index)
    while True:
        step = _follow(graph, value, index)
        if step is None:
            return ProductPath(value, None, index, scale, offset)
        following, kind, factor, term = step
        if kind == "add":
            skip = next((name for name in following.input if name != value), value)
            return ProductPath(following.output[0], skip, index, scale, offset)
        if kind == "move":
            index = _moved(graph, following, index)
        else:
            scale, offset = scale * factor, offset * factor + term
        value = following.output[0]


def input_of(graph: RunnableGraph, consumer: Consumer) -> str:
    """Return the name of the value that `consumer` reads in `network`."""
    return str(graph.node(consumer.node).input[0])


def columns(data: Array, consumer: Consumer, positions: IntArray) -> Float32Array:
    """Return what `consumer` reads at some output positions, (positions, groups, K).

    `data` is the consumer's input at batch 1; `positions` are flat indices of output positions.
    """
    if consumer.window is None:
        rows = data.reshape(-1, data.shape[-1])[positions]
    elif consumer.window.is_point:
        rows = _strided(data[0], consumer.window).reshape(data.shape[1], -1)[:, positions].T
    else:
        rows = _patches(data[0], consumer.window, positions)
    return np.asarray(rows, dtype=np.float32).reshape(len(positions), consumer.groups, -1)


def count_positions(graph: RunnableGraph, consumer: Consumer) -> int:
    """Return how many output positions per image `consumer` has."""
    shape = graph.shapes[graph.node(consumer.node).output[0]]
    return _count(shape[2:]) if consumer.window is not None else _count(shape[:-1])


def _consumer(raw: RawGraph, graph: RunnableGraph, node: onnx.NodeProto) -> Consumer | None:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or not graph.is_computed(node.input[0]):
        return None
    weight, turned = _origin(graph, node.input[1])
    if weight not in raw.parameters or len(graph.read_at[weight]) != 1 or graph.arrays[weight].ndim < 2:
        return None
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    window, groups, in_axis = None, 1, 0
    if node.op_type == "Conv":
        window = _window(attributes, graph.arrays[weight].shape[2:], graph.shapes[node.input[0]][2:])
        groups, in_axis = int(attributes.get("group", 1)), 1
    elif node.op_type == "ConvTranspose":
        window = _transposed_window(attributes, graph, node)
        if window is None or attributes.get("group", 1) != 1:
            return None
    elif graph.arrays[weight].ndim != 2 or attributes.get("transA") or attributes.get("alpha", 1.0) != 1.0:
        return None
    elif turned != bool(attributes.get("transB")):
        in_axis = 1
    return Consumer(
        node.name, weight, in_axis, groups, window, _shift(raw, graph, node), turned=node.op_type == "ConvTranspose"
    )


def _origin(graph: RunnableGraph, value: str) -> tuple[str, bool]:
    """Return the initialiser behind `value` and whether it was transposed."""
    if value in graph.arrays or value not in graph.made_at:
        return value, False
    node = graph.nodes[graph.made_at[value]]
    if node.op_type != "Transpose" or len(graph.read_at[value]) != 1:
        return "", False
    return str(node.input[0]), True


def _window(attributes: dict[str, Any], kernel: tuple[int, ...], size: tuple[int, ...]) -> Window:
    strides = tuple(attributes.get("strides", [1] * len(kernel)))
    dilations = tuple(attributes.get("dilations", [1] * len(kernel)))
    pads = tuple(attributes.get("pads", [0] * 2 * len(kernel)))
    mode = attributes.get("auto_pad", b"NOTSET").decode()
    if mode.startswith("SAME"):
        total = [
            max(0, (-(-side // stride) - 1) * stride + (edge - 1) * dilation + 1 - side)
            for side, stride, edge, dilation in zip(size, strides, kernel, dilations, strict=True)
        ]
        less, more = tuple(item // 2 for item in total), tuple(item - item // 2 for item in total)
        pads = less + more if mode == "SAME_UPPER" else more + less
    return Window(tuple(kernel), strides, dilations, pads[: len(kernel)], pads[len(kernel) :], (1,) * len(kernel))


def _transposed_window(attributes: dict[str, Any], graph: RunnableGraph, node: onnx.NodeProto) -> Window | None:
    """Return what a transposed convolution reads of its spread input; None where it cuts off what it makes.

    Padding of the convolution it equals: (kernel - 1) * dilation - pads. What is missing at the end to the size of the
    result is its output padding.
    """
    kernel = graph.arrays[node.input[1]].shape[2:] if node.input[1] in graph.arrays else ()
    if not kernel or "output_shape" in attributes or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        return None
    rank = len(kernel)
    ones = (1,) * rank
    strides, dilations = tuple(attributes.get("strides", ones)), tuple(attributes.get("dilations", ones))
    reach = [(edge - 1) * dilation for edge, dilation in zip(kernel, dilations, strict=True)]
    before = tuple(size - pad for size, pad in zip(reach, attributes.get("pads", [0] * rank), strict=False))
    sides = graph.shapes[node.input[0]][2:]
    spread = [(side - 1) * stride + 1 for side, stride in zip(sides, strides, strict=True)]
    results = graph.shapes[node.output[0]][2:]
    after = tuple(
        result + size - first - side for result, size, first, side in zip(results, reach, before, spread, strict=True)
    )
    if min(before + after) < 0:
        return None
    return Window(tuple(kernel), ones, dilations, before, after, strides)


def _shift(raw: RawGraph, graph: RunnableGraph, node: onnx.NodeProto) -> Shift | None:
    """Return the bias that is added to the product or the running mean that is subtracted from it; None without one.

    A tensor that other nodes read as well does not count, because a change of it would reach them too.
    """
    if len(node.input) > 2 and node.input[2] in raw.parameters:
        return _sole(graph, node.input[2], 1.0)
    value = node.output[0]
    while True:
        readers = graph.read_at.get(value, [])
        if len(readers) != 1 or value in graph.outputs:
            return None
        following = graph.nodes[readers[0]]
        if following.op_type in MOVES:
            value = following.output[0]
            continue
        if following.op_type == "BatchNormalization" and following.input[3] in raw.buffers | raw.parameters:
            return _sole(graph, following.input[3], -1.0)
        if following.op_type == "Add":
            other = next((name for name in following.input if name != value), "")
            if other in raw.parameters and graph.arrays[other].ndim == 1:
                return _sole(graph, other, 1.0)
        return None


def _sole(graph: RunnableGraph, tensor: str, sign: float) -> Shift | None:
    return Shift(tensor, sign) if len(graph.read_at[tensor]) == 1 else None


def _follow(graph: RunnableGraph, value: str, index: IntArray) -> tuple[onnx.NodeProto, str, Array, Array] | None:
    """Return the only reader of `value` with what it does to y: "move", "affine" (factor, term) or "add"."""
    readers = graph.read_at.get(value, [])
    if len(readers) != 1 or value in graph.outputs:
        return None
    node = graph.nodes[readers[0]]
    one, zero = np.ones(1), np.zeros(1)
    if node.op_type in MOVES:
        return node, "move", one, zero
    if node.op_type == "BatchNormalization":
        scale, shift, mean, variance = (np.asarray(graph.arrays[name], dtype=np.float64) for name in node.input[1:5])
        epsilon = next((item.f for item in node.attribute if item.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        shape = (1, -1, *[1] * (len(graph.shapes[value]) - 2))
        found = [_spread(item.reshape(shape), graph.shapes[value], index) for item in (factor, shift - mean * factor)]
        return None if found[0] is None or found[1] is None else (node, "affine", found[0], found[1])
    if node.op_type not in ("Add", "Mul") or graph.shapes[node.output[0]] != graph.shapes[value]:
        return None
    other = next((name for name in node.input if name != value), value)
    if graph.is_computed(other):
        fits = node.op_type == "Add" and other != value and graph.shapes[other] == graph.shapes[value]
        return (node, "add", one, zero) if fits else None
    vector = _spread(np.asarray(graph.constant(other), dtype=np.float64), graph.shapes[value], index)
    if vector is None:
        return None
    return (node, "affine", one, vector) if node.op_type == "Add" else (node, "affine", vector, zero)


def _vector(graph: RunnableGraph, name: str, value: str, index: IntArray) -> Array:
    bias = np.asarray(graph.constant(name), dtype=np.float64)
    shape = graph.shapes[value]
    if graph.nodes[graph.made_at[value]].op_type in ("Conv", "ConvTranspose"):
        bias = bias.reshape(1, -1, *[1] * (len(shape) - 2))
    found = _spread(bias, shape, index)
    return np.zeros(index.shape[1]) if found is None else found


def _spread(array: Array, shape: tuple[int, ...], index: IntArray) -> Array | None:
    """Return what an operand of a value of `shape` holds per output channel; None if it differs between positions."""
    rows = np.broadcast_to(array, shape).reshape(-1)[index]
    return rows[0] if (rows == rows[:1]).all() else None


def _moved(graph: RunnableGraph, node: onnx.NodeProto, index: IntArray) -> IntArray:
    """Return where the entries at `index` of the node's input lie in its output."""
    before, after = graph.shapes[node.input[0]], graph.shapes[node.output[0]]
    if node.op_type != "Transpose":
        return index
    order = next((list(item.ints) for item in node.attribute if item.name == "perm"), list(range(len(before)))[::-1])
    source = np.arange(_count(before)).reshape(before).transpose(order).reshape(-1)
    target = np.empty_like(source)
    target[source] = np.arange(_count(after))
    return np.asarray(target[index], dtype=np.int64)


def _channels_last(array: Array, consumer: Consumer) -> IntArray:
    if consumer.window is not None:
        array = np.moveaxis(array, 1, -1)
    return np.asarray(array.reshape(-1, array.shape[-1]), dtype=np.int64)


def _strided(image: Array, window: Window) -> Array:
    return image[(slice(None), *(slice(None, None, stride) for stride in window.strides))]


def _spread_out(image: Array, spread: tuple[int, ...]) -> Array:
    """Return `image` (C, *spatial) with its positions `spread` apart and zeros between them."""
    if all(size == 1 for size in spread):
        return image
    sizes = [(side - 1) * step + 1 for side, step in zip(image.shape[1:], spread, strict=True)]
    found = np.zeros((image.shape[0], *sizes), dtype=image.dtype)
    found[(slice(None), *(slice(None, None, step) for step in spread))] = image
    return found


def _patches(image: Array, window: Window, positions: IntArray) -> Array:
    """Return the patches of `image` (C, *spatial) at flat output positions, (positions, C * kernel)."""
    padded = np.pad(_spread_out(image, window.spread), [(0, 0), *zip(window.before, window.after, strict=True)])
    sizes = [
        (side - (edge - 1) * dilation - 1) // stride + 1
        for side, edge, dilation, stride in zip(
            padded.shape[1:], window.kernel, window.dilations, window.strides, strict=True
        )
    ]
    where = np.unravel_index(positions, sizes)
    rank = len(sizes)
    grid: list[Any] = [slice(None)]
    for axis in range(rank):
        offsets = np.arange(window.kernel[axis]) * window.dilations[axis]
        shape = [1] * rank
        shape[axis] = -1
        start = where[axis] * window.strides[axis]
        grid.append(start.reshape(-1, *[1] * rank) + offsets.reshape(1, *shape))
    found = padded[tuple(grid)]  # (C, positions, *kernel)
    return np.asarray(np.moveaxis(found, 0, 1).reshape(len(positions), -1))


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
