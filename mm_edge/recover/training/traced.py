"""A torch module as a list of operations, any part of which can be run with gradients and with any weights.

`torch.export` lists every operation with the names of the parameters it reads. A *cut* at position p is the set of
values that operations before p make and operations from p on read. Training a few layers then runs only the operations
between two cuts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from mm_edge.graph.export import exportable

Values = dict[str, Tensor]


class Traced:
    """The operations of a module at a fixed batch size.

    Attributes:
        state: parameters and buffers by name, as the module holds them.
        parameters: the names of those that are parameters.
        batch: images per run.
        nodes: the operations in order.
        readers: the positions of the operations that read a parameter or buffer, by its name.
        input: name of the input value.
        outputs: names of the output values, in the order in which an export lists them.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...], batch: int) -> None:
        """Trace `module`, in eval mode, on images of `shape` (C, H, W)."""
        fresh = exportable(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(fresh, (torch.zeros(batch, *shape),))
        self.batch = batch
        self.nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        self.state: Values = {}
        self.parameters: set[str] = set()
        self._names: dict[fx.Node, str] = {}
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                self.input = node.name
                continue
            name = str(spec.target)
            held = program.state_dict if name in program.state_dict else program.constants
            self.state[name] = held[name].detach()
            self._names[node] = name
            if spec.kind is InputKind.PARAMETER:
                self.parameters.add(name)
        (last,) = [node for node in program.graph.nodes if node.op == "output"]
        self.outputs = tuple(node.name for node in last.all_input_nodes)
        named = {node.name: node.meta.get("val") for node in (*placeholders, *self.nodes)}
        self._sizes = {node.name: _size(node) for node in (*placeholders, *self.nodes)}
        self._shapes = {name: tuple(value.shape) for name, value in named.items() if isinstance(value, Tensor)}
        self._read(placeholders)

    def _read(self, placeholders: Sequence[fx.Node]) -> None:
        """Find which values depend on the input, and where each value is made and last read."""
        computed = {self.input}
        self._made = {self.input: 0}
        self._last: dict[str, int] = {}
        self.readers: dict[str, list[int]] = {}
        for position, node in enumerate(self.nodes):
            for source in node.all_input_nodes:
                if source in self._names:
                    self.readers.setdefault(self._names[source], []).append(position)
                if source.name in computed:
                    computed.add(node.name)
                self._last[source.name] = position
            self._made[node.name] = position + 1
        self._last.update(dict.fromkeys(self.outputs, len(self.nodes)))
        self._computed = computed

    @property
    def operations(self) -> list[tuple[str, str]]:
        """The operations in order: the name of each value and the operator that makes it."""
        return [(node.name, str(node.target)) for node in self.nodes]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value that is a single tensor."""
        return self._shapes[name]

    def live(self, position: int) -> tuple[str, ...]:
        """Return the values that depend on the input and cross `position`."""
        return tuple(
            name
            for name, made in self._made.items()
            if name in self._computed and made <= position <= self._last.get(name, -1)
        )

    def size(self, position: int) -> int:
        """Return how many numbers per image cross `position`."""
        return sum(self._sizes[name] for name in self.live(position)) // self.batch

    def work(self, start: int, end: int) -> int:
        """Return how many numbers per image the operations from `start` to before `end` compute."""
        return sum(self._sizes[node.name] for node in self.nodes[start:end]) // self.batch

    def can_cut(self, position: int) -> bool:
        """Return whether only single tensors cross `position`: a list of tensors cannot be stored or fed."""
        return all(name in self._shapes for name in self.live(position))

    def narrowest(self, first: int, last: int) -> int:
        """Return the position from `first` to `last` that the fewest numbers cross, the last one of equal ones."""
        return min(range(first, last + 1), key=lambda position: (self.size(position), -position))

    def run(self, state: Mapping[str, Tensor], given: Mapping[str, Tensor], wanted: Sequence[str]) -> Values:
        """Return the values `wanted`, computed from those `given` with the weights in `state`."""
        values: dict[str, Any] = dict(given)
        needed = self._needed(set(given), wanted)

        def look_up(node: fx.Node) -> Any:
            return state[self._names[node]] if node in self._names else values[node.name]

        for position in needed:
            node = self.nodes[position]
            args, kwargs = fx.map_arg((node.args, node.kwargs), look_up)
            values[node.name] = _functional(node.target)(*args, **kwargs)
        return {name: values[name] for name in wanted}

    def _needed(self, given: set[str], wanted: Sequence[str]) -> list[int]:
        found: set[int] = set()
        stack = [name for name in wanted if name not in given]
        while stack:
            position = self._made[stack.pop()] - 1
            if position not in found:
                found.add(position)
                sources = (node for node in self.nodes[position].all_input_nodes if node not in self._names)
                stack += [node.name for node in sources if node.name not in given]
        return sorted(found)


def channels_last(value: Tensor) -> Tensor:
    """Return a value (N, C, H, W) in the channels-last memory format, and any other value as it is."""
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else [value]
    return sum(math.prod(part.shape) for part in parts if isinstance(part, Tensor))


def _functional(target: Any) -> Any:
    """Return the operator that does the same without changing its operands, so that values stored at a cut stay."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return target
    packet = str(target._schema.name).split("::")[1]
    plain = getattr(torch.ops.aten, packet.removesuffix("_"))
    return getattr(plain, target._overloadname)
