"""Prunable layers of a raw graph: the weights, the role of each in the network, and its multiply-adds.

A *site* is a Conv, ConvTranspose, Gemm, MatMul or Einsum node that multiplies activations by one weight. The weight may
be transposed, reshaped or standardised before; the layer is named after its initialiser. The role of a site is read
from the operators around it, never from names.

    macs      = output elements * reduced size       (one fused multiply-add is one, batch 1)
    positions = macs / weights                       (pixels or tokens the weight is applied to)
    stage     = round(log_4(positions of the first site / positions))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from mm_edge.arrays import Float32Arrays
from mm_edge.errors import ModelError
from mm_edge.graph.export import RawGraph
from mm_edge.graph.partial import SHAPE_READERS, constant_values
from mm_edge.records import Layer

WEIGHTED_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})
ATTENTION_OPERATORS = frozenset({"Attention", "MultiHeadAttention"})
ACTIVATIONS = frozenset(
    {"Celu", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish"}
    | {"PRelu", "QuickGelu", "Relu", "Selu", "Sigmoid", "Softplus", "Swish", "Tanh"}
)
NORMS = frozenset(
    {"BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"}
    | {"LpNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
)
POOLINGS = frozenset({"AveragePool", "LpPool", "MaxPool"})

# How each role is recognised; the first that applies is taken.
ROLES: dict[str, str] = {
    "classifier": "linear or 1x1 convolution whose outputs are the model's own",
    "patch_embedding": "turns pixels into tokens",
    "stem": "reads the model's input",
    "deep_stem": "follows a strided stem, unbranched and at its resolution, with a kernel larger than one",
    "depthwise": "convolution of each channel alone",
    "qkv": "its results enter an attention product",
    "attention_projection": "reads an attention product",
    "se": "one factor per channel (squeeze and excite), or what feeds it",
    "downsample": "strided, joins tokens, or 1x1 on a pooled shortcut",
    "conv": "any other convolution",
    "mlp_fc1": "linear, or convolution of a whole map, before an activation function",
    "mlp_fc2": "linear, or convolution of a whole map, after an activation function",
    "mlp": "any other linear",
}


@dataclass(frozen=True)
class _Site:
    """One product of activations (`data`) with the weight `fqn`; a constant site reads no activations."""

    node: ir.Node
    fqn: str
    kind: str
    shape: tuple[int, ...]
    data: ir.Value
    constant: bool
    macs: int

    @property
    def out(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def positions(self) -> int:
        return max(1, self.macs // max(1, math.prod(self.shape)))

    @property
    def strided(self) -> bool:
        return self.node.op_type == "Conv" and any(stride > 1 for stride in _ints(self.node, "strides"))

    @property
    def pointwise(self) -> bool:
        return self.kind == "linear" or all(size == 1 for size in self.shape[2:])

    @property
    def tiles(self) -> bool:
        """Whether it cuts its input into patches that do not overlap."""
        strides = _ints(self.node, "strides")
        return self.kind == "linear" or (strides == self.shape[2:] and any(stride > 1 for stride in strides))


def read_layers(raw: RawGraph) -> tuple[Layer, ...]:
    """Return every prunable weight of `raw` in graph order, with role, stage and dense MACs at batch 1.

    A weight used twice is one layer whose MACs are summed. A weight that is never multiplied by an activation has no
    MACs, because its result is folded before deployment. A site that no rule recognises has the role `conv` or `mlp`.
    """
    graph = _Graph(raw)
    roles, stages = _roles(graph), _stages(graph)
    layers: dict[str, Layer] = {}
    for number, site in enumerate(graph.sites):
        macs = 0 if site.constant else site.macs
        if site.fqn in layers:
            first = layers[site.fqn]
            layers[site.fqn] = Layer(
                first.fqn, first.kind, first.role, first.shape, first.index, first.stage, first.macs + macs
            )
            continue
        layers[site.fqn] = Layer(site.fqn, site.kind, roles[number], site.shape, len(layers), stages[number], macs)
    return tuple(layers.values())


def read_layer_weights(raw: RawGraph, layers: Iterable[Layer]) -> Float32Arrays:
    """Return the dense weights of `layers` as float32 arrays by fqn, in the layers' order.

    Raises:
        ModelError: a weight has no data or holds NaN or infinite values; the message names it.
    """
    weights: Float32Arrays = {}
    for layer in layers:
        tensor = raw.model.graph.initializers[layer.fqn].const_value
        if tensor is None:
            raise ModelError(f"weight '{layer.fqn}' has no data; export the network with its weights")
        weights[layer.fqn] = np.asarray(tensor.numpy(), dtype=np.float32)
        if not np.isfinite(weights[layer.fqn]).all():
            raise ModelError(f"weight '{layer.fqn}' holds NaN or infinite values; give a sound checkpoint")
    return weights


class _Graph:
    """The graph with its sites, and the properties of values that roles are read from, each computed in one pass.

    Sets of sites are bit masks: bit i is site i; two further bits mean an attention product and the graph's ends.
    """

    def __init__(self, raw: RawGraph) -> None:
        self.nodes = list(raw.model.graph)
        self.inputs = [value for value in raw.model.graph.inputs if not value.is_initializer()]
        self.outputs = list(raw.model.graph.outputs)
        self.constants = constant_values(raw.model.graph, static_shapes=True)
        self.learned: set[ir.Value] = set()
        origins = _weight_origins(raw, self.nodes, self.constants, self.learned)
        found = (_site(node, origins, self.constants, raw) for node in self.nodes)
        self.sites = [site for site in found if site is not None]
        self.number = {site.node: number for number, site in enumerate(self.sites)}
        self.attention_nodes = {node for node in self.nodes if self._attends(node)}
        self.attention_bit, self.end_bit = 1 << len(self.sites), 1 << (len(self.sites) + 1)

    @property
    def has_attention(self) -> bool:
        return bool(self.attention_nodes)

    def pick(self, mask: int) -> list[_Site]:
        """Return the sites of a bit mask."""
        return [site for number, site in enumerate(self.sites) if mask >> number & 1]

    def live_inputs(self, node: ir.Node) -> list[ir.Value]:
        """Return the inputs of `node` that are activations."""
        return [value for value in node.inputs if value is not None and value not in self.constants]

    def merges(self, node: ir.Node) -> bool:
        """Whether `node` adds two activations, as a residual connection does."""
        return node.op_type in ("Add", "Sum") and len(self.live_inputs(node)) > 1

    def shrinks(self, node: ir.Node) -> bool:
        """Whether `node` is a strided pooling or a strided convolution with a fixed kernel, such as a blur."""
        pools = node.op_type in POOLINGS or (node.op_type == "Conv" and node not in self.number)
        return pools and any(stride > 1 for stride in _ints(node, "strides"))

    @cached_property
    def readers(self) -> dict[ir.Value, int]:
        """Per value: the sites, attention products and model outputs it reaches before any other site."""
        masks: dict[ir.Value, int] = dict.fromkeys(self.outputs, self.end_bit)
        for node, inputs in self._backwards():
            if node in self.number:
                mask = 1 << self.number[node]
            elif node in self.attention_nodes:
                mask = self.attention_bit
            else:
                mask = _union(masks, node.outputs)
            for value in inputs:
                masks[value] = masks.get(value, 0) | mask
        return masks

    @cached_property
    def makers(self) -> dict[ir.Value, int]:
        """Per value: the sites (the end bit for the model's input) it is computed from with no site between."""
        masks: dict[ir.Value, int] = dict.fromkeys(self.inputs, self.end_bit)
        for node in self.nodes:
            mask = 1 << self.number[node] if node in self.number else _union(masks, self.live_inputs(node))
            masks.update((value, mask) for value in node.outputs if value not in self.constants)
        return masks

    @cached_property
    def attended(self) -> int:
        """The sites that read an attention product before any other weight."""
        return _union(self.readers, [value for node in self.attention_nodes for value in node.outputs])

    @cached_property
    def activated_after(self) -> set[ir.Value]:
        """Values that reach an activation function before a residual addition or a site that is not depthwise."""
        depthwise = {site.node for site in self.sites if site.kind == "depthwise"}
        met: set[ir.Value] = set()
        for node, inputs in self._backwards():
            carries = (self._carries(node) or node in depthwise) and not self.merges(node)
            passes = carries and not met.isdisjoint(node.outputs)
            if node.op_type in ACTIVATIONS or passes:
                met.update(inputs)
        return met

    @cached_property
    def gating(self) -> set[ir.Value]:
        """Values that end, before a site, as the smaller factor of a broadcast product."""
        met: set[ir.Value] = set()
        for node, inputs in self._backwards():
            whole = _numel(node.outputs[0])
            for value in inputs:
                scales = node.op_type == "Mul" and len(inputs) > 1 and _numel(value) < whole
                if scales or (self._carries(node) and not self.merges(node) and not met.isdisjoint(node.outputs)):
                    met.add(value)
        return met

    @cached_property
    def ending(self) -> set[ir.Value]:
        """Values that reach a model output through no site, norm or residual addition."""
        met: set[ir.Value] = set(self.outputs)
        for node, inputs in self._backwards():
            averages = self.merges(node) and all(self.makers.get(v, 0).bit_count() == 1 for v in inputs)
            ends_block = node.op_type in NORMS or (self.merges(node) and not averages)
            if self._carries(node) and not ends_block and not met.isdisjoint(node.outputs):
                met.update(inputs)
        return met

    @cached_property
    def merged(self) -> set[ir.Value]:
        """Values that are added to others before any site or activation function."""
        met: set[ir.Value] = set()
        for node, inputs in self._backwards():
            passes = self._carries(node) and node.op_type not in ACTIVATIONS and not met.isdisjoint(node.outputs)
            if self.merges(node) or passes:
                met.update(inputs)
        return met

    @cached_property
    def activated_before(self) -> set[ir.Value]:
        """Values that passed an activation function since the last site or residual addition."""
        met: set[ir.Value] = set()
        for node in self.nodes:
            if not self._carries(node) or self.merges(node):
                continue
            if node.op_type in ACTIVATIONS or not met.isdisjoint(self.live_inputs(node)):
                met.update(node.outputs)
        return met

    def _attends(self, node: ir.Node) -> bool:
        """Whether `node` multiplies activations by activations (or by a query made of parameters alone)."""
        if node.op_type in ATTENTION_OPERATORS:
            return True
        if node.op_type not in ("MatMul", "Einsum", "Gemm") or node in self.number or not self.live_inputs(node):
            return False
        factors = [value for value in node.inputs if value is not None]
        return all(value not in self.constants or value in self.learned for value in factors[:2])

    def _carries(self, node: ir.Node) -> bool:
        return node not in self.number and node not in self.attention_nodes

    def _backwards(self) -> Iterator[tuple[ir.Node, list[ir.Value]]]:
        for node in reversed(self.nodes):
            if inputs := [] if node.outputs[0] in self.constants else self.live_inputs(node):
                yield node, inputs


def _weight_origins(
    raw: RawGraph, nodes: Sequence[ir.Node], constants: set[ir.Value], learned: set[ir.Value]
) -> dict[ir.Value, str]:
    """Return, for each constant that is computed from parameters, the largest of those parameters.

    Adds to `learned` every constant that depends on a parameter.
    """
    origins: dict[ir.Value, str] = {}
    initializers = raw.model.graph.initializers
    for name in raw.weights:
        learned.add(initializers[name])
        if len(initializers[name].shape or ()) >= 2:
            origins[initializers[name]] = name
    for node in nodes:
        inputs = [value for value in node.inputs if value is not None]
        constant = node.outputs[0] in constants and node.op_type not in SHAPE_READERS
        if not constant or learned.isdisjoint(inputs):
            continue
        learned.update(node.outputs)
        names = [origins[value] for value in inputs if value in origins]
        if names and node.op_type not in WEIGHTED_OPERATORS:
            origins[node.outputs[0]] = max(names, key=lambda name: _numel(initializers[name]))
    return origins


def _site(node: ir.Node, origins: Mapping[ir.Value, str], constants: set[ir.Value], raw: RawGraph) -> _Site | None:
    """Return the site at `node`, or None when it does not multiply by exactly one weight."""
    if node.op_type not in WEIGHTED_OPERATORS or len(node.inputs) < 2:
        return None
    factors = list(node.inputs) if node.op_type == "Einsum" else list(node.inputs[:2])
    slots = [1] if node.op_type.startswith("Conv") else [*range(1, len(factors)), 0]
    weight = next((value for slot in slots if (value := factors[slot]) is not None and value in origins), None)
    if weight is None:
        return None
    data = [value for value in factors if value is not None and value is not weight]
    live = [value for value in data if value not in constants]
    if len(data) != 1 and len(live) != 1:
        return None
    fqn = origins[weight]
    shape = _shape(raw.model.graph.initializers[fqn])
    source = live[0] if live else data[0]
    return _Site(node, fqn, _kind(node, shape), shape, source, not live, _macs(node, source, weight, shape))


def _kind(node: ir.Node, shape: tuple[int, ...]) -> str:
    if not node.op_type.startswith("Conv"):
        return "linear"
    group = node.attributes.get("group")
    return "depthwise" if len(shape) > 1 and shape[1] == 1 and group is not None and group.as_int() > 1 else "conv"


def _macs(node: ir.Node, data: ir.Value, weight: ir.Value, shape: tuple[int, ...]) -> int:
    """Return the multiply-adds of `node`; with shapes unknown, those of one application of the weight."""
    out, entering = _shape(node.outputs[0]), _shape(data)
    if not out or not entering:
        return math.prod(shape)
    if node.op_type == "Conv":
        return math.prod(out[2:]) * math.prod(shape)
    if node.op_type == "ConvTranspose":
        return math.prod(entering[2:]) * math.prod(shape)
    if node.op_type == "Einsum":
        return math.prod(out) * _einsum_reduced(node)
    left = node.inputs[0] is data
    transposed = node.op_type == "Gemm" and "transA" in node.attributes and node.attributes["transA"].as_int() == 1
    axis = -2 if len(entering) > 1 and (transposed if left else not _gemm_transposes_right(node)) else -1
    return math.prod(out) * entering[axis]


def _gemm_transposes_right(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1


def _einsum_reduced(node: ir.Node) -> int:
    """Return the product of the sizes of the labels an Einsum sums over."""
    terms, _, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, value in zip(terms.split(","), node.inputs, strict=True):
        before, _, after = term.partition("...")
        shape = _shape(value) if value is not None else ()
        sizes.update(zip(before, shape, strict=False))
        sizes.update(zip(reversed(after), reversed(shape), strict=False))
    return math.prod(size for label, size in sizes.items() if label not in result)


def _roles(graph: _Graph) -> list[str]:
    found = _Found(
        patches=_patch_embedding(graph),
        deep_stems=_deep_stems(graph),
        gates=sum(1 << number for number, site in enumerate(graph.sites) if _is_gate(graph, site)),
        collapsed=_collapsed(graph),
    )
    return [_role(graph, site, found) for site in graph.sites]


@dataclass(frozen=True)
class _Found:
    """Sites that are recognised together; `gates` is a bit mask."""

    patches: set[ir.Node]
    deep_stems: set[ir.Node]
    gates: int
    collapsed: set[ir.Node]


def _role(graph: _Graph, site: _Site, found: _Found) -> str:
    """Return the role of `site`, by the first rule that recognises it; ROLES says them in words."""
    ahead, bit = graph.readers.get(site.out, 0), 1 << graph.number[site.node]
    if site.constant:
        return "mlp" if site.kind == "linear" else "conv"
    if _is_classifier(graph, site):
        return "classifier"
    if site.node in found.patches:
        return "patch_embedding"
    if graph.makers.get(site.data, 0) & graph.end_bit:
        return "stem"
    if site.node in found.deep_stems:
        return "deep_stem"
    if site.kind == "depthwise":
        return "depthwise"
    if ahead & graph.attention_bit:
        return "qkv"
    if graph.attended & bit:
        return "attention_projection"
    if found.gates & bit or _feeds_only(ahead, found.gates, site):
        return "se"
    if site.node not in found.collapsed:
        if site.strided or _merges_tokens(graph, site) or _is_pooled_shortcut(graph, site):
            return "downsample"
        if site.kind == "conv":
            return "conv"
    if site.out in graph.activated_after:
        return "mlp_fc1"
    return "mlp_fc2" if site.data in graph.activated_before else "mlp"


def _deep_stems(graph: _Graph) -> set[ir.Node]:
    """Return the sites of deep stems but for the first of each.

    In a deep stem (ResNet-D, Inception) a strided convolution is followed by others at its resolution, up to the first
    that is strided, pointwise or depthwise or that shares its input with another site.
    """
    found: set[ir.Node] = set()
    for first in graph.sites:
        if first.constant or not graph.makers.get(first.data, 0) & graph.end_bit:
            continue
        last: _Site | None = first if first.kind == "conv" and first.strided else None
        while last is not None:
            mask = graph.readers.get(last.out, 0)
            after = graph.pick(mask)
            alone = len(after) == 1 and not mask & (graph.attention_bit | graph.end_bit)
            last = after[0] if alone and after[0].node not in found and _goes_on(first, after[0]) else None
            found.update(() if last is None else (last.node,))
    return found


def _goes_on(first: _Site, site: _Site) -> bool:
    """Whether `site` may belong to the deep stem that starts with `first`."""
    return site.kind == "conv" and not site.strided and not site.pointwise and 2 * site.positions > first.positions


def _collapsed(graph: _Graph) -> set[ir.Node]:
    """Return the linear layers that are written as convolutions.

    These are kernels as large as the whole map they read, and the 1x1 convolutions that read nothing but their results.
    """
    found: set[ir.Node] = set()
    for site in graph.sites:
        if site.kind != "conv" or site.constant or site.positions > 1:
            continue
        covers = not site.pointwise and _shape(site.data)[2:] == site.shape[2:]
        makers = graph.makers.get(site.data, 0)
        follows = site.pointwise and makers and all(maker.node in found for maker in graph.pick(makers))
        if covers or (follows and not makers & graph.end_bit):
            found.add(site.node)
    return found


def _is_pooled_shortcut(graph: _Graph, site: _Site) -> bool:
    """Whether `site` is a 1x1 convolution of a shortcut that a pooling shrinks.

    The pooling is there for the shortcut alone: what it reads, other sites read too. Its result is added to theirs.
    """
    if site.kind != "conv" or not site.pointwise or site.out not in graph.merged:
        return False
    value = site.data
    while (node := value.producer()) is not None and node not in graph.number:
        live = graph.live_inputs(node)
        if len(live) != 1:
            return False
        if graph.shrinks(node):
            own = 1 << graph.number[site.node]
            return graph.readers.get(value, 0) == own and graph.readers.get(live[0], 0) != own
        value = live[0]
    return False


def _is_classifier(graph: _Graph, site: _Site) -> bool:
    """Whether `site` is a linear or 1x1 convolution whose outputs are the model's own."""
    if not site.pointwise or site.kind == "depthwise" or site.out not in graph.ending:
        return False
    width = _width(site)
    return any(width in _shape(value)[1:] for value in graph.outputs)


def _is_gate(graph: _Graph, site: _Site) -> bool:
    """Whether `site` computes one factor per channel by which a larger feature map is multiplied."""
    return site.positions == 1 and not site.constant and site.out in graph.gating


def _feeds_only(ahead: int, gate_mask: int, site: _Site) -> bool:
    """Whether `site` is the squeezing half: every site that reads it is a gate of the same single position."""
    return site.positions == 1 and ahead != 0 and ahead & ~gate_mask == 0


def _merges_tokens(graph: _Graph, site: _Site) -> bool:
    """Whether a linear reads tokens joined from several of every site before it (space to depth)."""
    before = graph.pick(graph.makers.get(site.data, 0))
    if site.kind != "linear" or site.positions == 1 or not before:
        return False
    return min(maker.positions for maker in before) >= 2 * site.positions


def _patch_embedding(graph: _Graph) -> set[ir.Node]:
    """Return the sites that turn pixels into tokens: a tiling stem, or the chain of convolutions before the tokens."""
    found: set[ir.Node] = set()
    if not graph.has_attention:
        return found
    for stem in graph.sites:
        if stem.constant or not graph.makers.get(stem.data, 0) & graph.end_bit:
            continue
        if stem.tiles:
            found.add(stem.node)
        found.update(_conv_chain(graph, stem))
    return found


def _conv_chain(graph: _Graph, stem: _Site) -> list[ir.Node]:
    """Return the unbranched convolutions from `stem` on when a linear reads the last, else nothing."""
    chain = [stem]
    while chain[-1].kind == "conv":
        mask = graph.readers.get(chain[-1].out, 0)
        after = graph.pick(mask)
        if any(site.kind == "linear" for site in after):
            return [site.node for site in chain]
        if len(after) != 1 or mask & (graph.attention_bit | graph.end_bit) or after[0] in chain:
            return []
        chain.append(after[0])
    return []


def _stages(graph: _Graph) -> list[int]:
    """Return the stage of each site; one that sees a single position inherits from the sites before it."""
    stages: list[int] = []
    first = next((site.positions for site in graph.sites if not site.constant and site.positions > 1), 1)
    for site in graph.sites:
        if site.positions > 1 and not site.constant:
            stages.append(max(0, round(math.log(first / site.positions, 4))))
            continue
        before = graph.makers.get(site.data, 0)
        inherited = max((stage for number, stage in enumerate(stages) if before >> number & 1), default=0)
        stages.append(inherited + site.strided)
    return stages


def _width(site: _Site) -> int:
    """Return the number of output channels."""
    shape = _shape(site.out)
    if not shape:
        return site.shape[0]
    return shape[1] if site.kind == "conv" and len(shape) > 1 else shape[-1]


def _union(masks: Mapping[ir.Value, int], values: Iterable[ir.Value]) -> int:
    mask = 0
    for value in values:
        mask |= masks.get(value, 0)
    return mask


def _ints(node: ir.Node, name: str) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return tuple(attribute.as_ints()) if attribute is not None else ()


def _shape(value: ir.Value) -> tuple[int, ...]:
    """Return the static shape, or () when it is unknown."""
    sizes = tuple(value.shape) if value.shape is not None else ()
    known = tuple(size for size in sizes if isinstance(size, int))
    return known if len(known) == len(sizes) else ()


def _numel(value: ir.Value) -> int:
    return math.prod(_shape(value))
