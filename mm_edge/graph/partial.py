"""Parts of a graph: which values are constant, how some nodes are run alone, and how a network is run in steps.

A value is *constant* when it does not depend on the network's input; every other value is *computed*.

`RunnableGraph` runs a network in steps: its weights may change between steps, and its intermediate values are kept. A
*frontier* at position p holds, for every image, each computed value that a node before p makes and that node p or a
later one reads. Any later value can be computed from the frontier without running the network from its input again. A
walk that changes one layer after the other so costs about two forward passes, not one per layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from mm_edge.arrays import Array, Arrays, IntArray, by_input
from mm_edge.runtime import in_order, open_session

# Operators whose result is constant even where their operand is computed, because the shapes of a raw graph are static.
SHAPE_READERS = frozenset({"Shape", "Size"})


def values_read(node: ir.Node) -> list[ir.Value]:
    """Return what a node reads: its operands, and what the graphs inside it (of If, Loop, Scan) read from outside."""
    found = {value: None for value in node.inputs if value is not None}
    for attribute in node.attributes.values():
        for graph in inner_graphs(attribute):
            own = {*graph.inputs, *graph.initializers.values()}
            for inner in graph:
                found.update((value, None) for value in values_read(inner) if value not in own)
                own.update(inner.outputs)
            found.update((value, None) for value in graph.outputs if value not in own)
    return list(found)


def inner_graphs(attribute: ir.Attr) -> list[ir.Graph]:
    """Return the graphs that an attribute holds."""
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def constant_values(graph: ir.Graph, *, static_shapes: bool = False) -> set[ir.Value]:
    """Return the values of `graph` that do not depend on its input: initialisers and what is computed from them alone.

    With `static_shapes` the results of `SHAPE_READERS` are constant too. The result of a node without operands is not,
    Constant nodes excepted: such nodes draw random numbers.
    """
    constant = set(graph.initializers.values())
    for node in graph:
        operands = values_read(node)
        alone = all(value in constant for value in operands) if operands else node.op_type == "Constant"
        if alone or (static_shapes and node.op_type in SHAPE_READERS):
            constant.update(node.outputs)
    return constant


def open_part(model: ir.Model, given: Sequence[str], wanted: Sequence[str], threads: int = 1) -> Part:
    """Return the nodes of `model` that compute the values `wanted` from the values `given`, ready to run.

    `threads` is as for `open_session`.

    Raises:
        ValueError: a name is unknown, or `wanted` needs an input of the graph that is not `given`.
        ModelError: ONNX Runtime cannot load the part.
    """
    computed = [name for name in wanted if name not in given]
    if not computed:
        return Part(None, tuple(given), tuple(wanted))
    content = _cut_out(model, given, computed).SerializeToString()
    return Part(open_session(content, threads), tuple(given), tuple(wanted))


def _cut_out(model: ir.Model, given: Sequence[str], wanted: Sequence[str]) -> onnx.ModelProto:
    """Return the nodes of `model` that compute the values `wanted` from the values `given`."""
    graph = ir.convenience.extract(model.graph, given, wanted)
    return ir.to_proto(ir.Model(graph, ir_version=model.ir_version))


def run_constants(model: ir.Model, names: Sequence[str]) -> Arrays:
    """Return the arrays of the constant values called `names`, computed once, by name."""
    return open_part(model, (), names, threads=0).run({})


class RunnableGraph:
    """One graph at batch 1 and the arrays of its initialisers; `holding` gives the same graph with other arrays.

    Attributes:
        nodes: in topological order.
        arrays: the initialisers by name.
        shapes: the static shape of every value.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs, and of the other values that are read at the end.
    """

    def __init__(self, model: ir.Model, also: Sequence[str] = ()) -> None:
        """Take over `model`; its shapes are inferred anew. The values called `also` stay available to the end."""
        self._model = model
        ir_passes.ShapeInferencePass()(model)
        proto = ir.to_proto(model)
        self.nodes: list[onnx.NodeProto] = list(proto.graph.node)
        self.arrays: Arrays = {
            name: value.const_value.numpy()
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
        }
        self.inputs = tuple(item.name for item in proto.graph.input if item.name not in self.arrays)
        self.outputs = tuple(dict.fromkeys([*(item.name for item in proto.graph.output), *also]))
        self.shapes: dict[str, tuple[int, ...]] = {}
        for item in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
            tensor = item.type.tensor_type
            self.shapes[item.name] = tuple(size.dim_value for size in tensor.shape.dim)
        self.made_at = {name: index for index, node in enumerate(self.nodes) for name in node.output}
        self.read_at: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in node.input:
                self.read_at.setdefault(name, []).append(index)
        self._positions = {node.name: index for index, node in enumerate(self.nodes)}
        self._constant = {"", *(value.name for value in constant_values(model.graph) if value.name is not None)}
        self._crossing = self._crossing_sizes()
        # The part that was opened last; graphs that hold other arrays share it.
        self._cut: dict[tuple[tuple[str, ...], tuple[str, ...]], onnx.ModelProto] = {}

    def holding(self, arrays: Mapping[str, Array]) -> RunnableGraph:
        """Return the same graph with other `arrays`, each of the name and shape of one it has."""
        assert all(self.arrays[name].shape == array.shape for name, array in arrays.items())
        twin = copy.copy(self)
        twin.arrays = {**self.arrays, **arrays}
        return twin

    def holds(self, node: str) -> bool:
        """Return whether there is a node called `node`; the nodes of a removed branch are not there."""
        return node in self._positions

    def position(self, node: str) -> int:
        """Return the position of the node called `node`."""
        return self._positions[node]

    def node(self, name: str) -> onnx.NodeProto:
        """Return the node called `name`."""
        return self.nodes[self._positions[name]]

    def constant(self, value: str) -> Array:
        """Return the array of a constant value; it is computed where it is not an initialiser."""
        return self.arrays[value] if value in self.arrays else self.open((), (value,)).run({})[value]

    def is_computed(self, value: str) -> bool:
        """Return whether `value` depends on the input."""
        return value not in self._constant

    def live(self, position: int) -> tuple[str, ...]:
        """Return the names of the values of the frontier at `position`: made before it, read at or after it."""
        names = [*self.inputs, *(name for node in self.nodes[:position] for name in node.output)]
        return tuple(name for name in names if name not in self._constant and self._last_read(name) >= position)

    def live_size(self, position: int) -> int:
        """Return the number of elements, per image, of the frontier at `position`."""
        return int(self._crossing[position])

    def open(self, given: Sequence[str], wanted: Sequence[str]) -> Part:
        """Return the part of the graph that computes `wanted` from `given`, ready to run."""
        computed = tuple(name for name in wanted if name not in given)
        if not computed:
            return Part(None, tuple(given), tuple(wanted))
        # Several arrays are tried for one weight, one after the other, and each time the same part is opened.
        key = (tuple(given), computed)
        if key not in self._cut:
            self._cut.clear()
            self._cut[key] = _cut_out(self._model, given, computed)
        proto = self._cut[key]
        for tensor in proto.graph.initializer:
            if tensor.name in self.arrays:
                array = np.asarray(self.arrays[tensor.name], order="C")
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        return Part(open_session(proto.SerializeToString()), tuple(given), tuple(wanted))

    def _last_read(self, name: str) -> int:
        return len(self.nodes) if name in self.outputs else max(self.read_at.get(name, [-1]))

    def _crossing_sizes(self) -> IntArray:
        """Return, for every position, the number of elements of its frontier."""
        change = np.zeros(len(self.nodes) + 2, dtype=np.int64)
        for name in {*self.inputs, *self.made_at} - self._constant:
            last = self._last_read(name)
            first = self.made_at.get(name, -1) + 1
            if last >= first:
                size = math.prod(self.shapes[name])
                change[first] += size
                change[last + 1] -= size
        return np.cumsum(change)


@dataclass(frozen=True)
class Part:
    """Some nodes of a network, from `given` values to `wanted` ones; `session` is None where all wanted are given."""

    session: Any
    given: tuple[str, ...]
    wanted: tuple[str, ...]

    def run(self, values: Mapping[str, Array]) -> Arrays:
        """Return the wanted values of one image; values that are both given and wanted are returned as given."""
        computed = [name for name in self.wanted if name not in self.given]
        found = self.session.run(computed, {name: values[name] for name in self.given}) if computed else []
        return {**dict(zip(computed, found, strict=True)), **{n: values[n] for n in self.wanted if n in self.given}}


class Frontier:
    """The frontier of some images at one position of a network.

    Attributes:
        position: the nodes from here on have not been run.
        numbers: the numbers of the images, in the order in which they are run.
    """

    def __init__(self, network: RunnableGraph, images: Array, numbers: Sequence[int]) -> None:
        """Start at the network's inputs with some examples of the batch `images`, such as (N, C, H, W)."""
        self.position = 0
        self.numbers = tuple(numbers)
        self._rows = {number: row for row, number in enumerate(self.numbers)}
        given = by_input(images[list(self.numbers)], network.inputs)
        self._values: Arrays = {
            name: array.reshape(len(self.numbers), *network.shapes[name]) for name, array in given.items()
        }

    def advance_(self, network: RunnableGraph, position: int, threads: int = 1) -> None:
        """Run every image on to `position`."""
        wanted = network.live(position)
        if not set(wanted) <= set(self._values):
            after: Arrays = {}
            for number, values in self.run(network, wanted, self.numbers, threads):
                for name, value in values.items():
                    if name not in after:
                        after[name] = np.empty((len(self.numbers), *value.shape), dtype=value.dtype)
                    after[name][self._rows[number]] = value
            self._values = after
        self._values = {name: self._values[name] for name in wanted}
        self.position = position

    def run(
        self, network: RunnableGraph, wanted: Sequence[str], images: Sequence[int], threads: int = 1
    ) -> Iterator[tuple[int, Arrays]]:
        """Yield, for one image number after the other, the `wanted` values; `threads` images are run at a time."""
        part = network.open(tuple(self._values), tuple(dict.fromkeys(wanted)))

        def run_one(number: int) -> Arrays:
            return part.run({name: array[self._rows[number]] for name, array in self._values.items()})

        yield from zip(images, in_order(run_one, images, threads), strict=True)


def narrowest(network: RunnableGraph, first: int, last: int) -> int:
    """Return the position from `first` to `last` with the smallest frontier; the later of equal ones."""
    return min(range(first, last + 1), key=lambda position: (network.live_size(position), -position))
