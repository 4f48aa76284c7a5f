"""LayerNormalization that loses channels, exactly.

The masked model still normalises over all D channels, of which the removed ones hold zero. With r = k / D the share
that stays, and m_k, v_k mean and variance over the k kept channels alone,

    m       = r m_k
    var     = r (v_k + m_k^2) - m^2 = r v_k + r (1 - r) m_k^2
    (x - m) / sqrt(var + e) = y_k a + b,   y_k = (x - m_k) / sqrt(v_k + e)
    a       = sqrt((v_k + e) / (var + e)),   b = (1 - r) m_k / sqrt(var + e)

so that the operator's own kernel computes the means (its optional outputs are m_k and 1 / sqrt(v_k + e)), a and b have
one number per position, and scale and shift are applied last. This takes five passes over the activations instead of
one, which the measured latency includes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mm_edge.graph.fold import add_constant_


def restore_normalization_(model: ir.Model, node: ir.Node, kept: int, dense: int) -> None:
    """Make the LayerNormalization `node`, whose operands have lost channels, agree with one over `dense` channels."""
    builder = _Builder(model, node)
    share = kept / dense
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    out = node.outputs[0]
    data, scale = node.inputs[0], node.inputs[1]
    shift = node.inputs[2] if len(node.inputs) > 2 else None
    assert data is not None and scale is not None and scale.const_value is not None
    ones = builder.constant(np.ones(scale.const_value.shape.numpy(), dtype=np.float32))
    norm = ir.node(
        "LayerNormalization", [data, ones], attributes=dict(node.attributes), num_outputs=3, name=f"{node.name}_kept"
    )
    builder.add(norm)
    plain, mean, inverse = norm.outputs
    variance = builder.step("Reciprocal", builder.step("Mul", inverse, inverse))
    square = builder.step("Mul", builder.step("Mul", mean, mean), builder.number(share * (1 - share)))
    scaled = builder.step("Add", builder.step("Mul", variance, builder.number(share)), square)
    deviation = builder.step("Sqrt", builder.step("Add", scaled, builder.number(epsilon * (1 - share))))
    factor = builder.step("Div", builder.step("Sqrt", variance), deviation)
    offset = builder.step("Div", builder.step("Mul", mean, builder.number(1 - share)), deviation)
    result = builder.step("Add", builder.step("Mul", plain, factor), offset)
    result = builder.step("Mul", result, scale)
    if shift is not None:
        result = builder.step("Add", result, shift)
    out.replace_all_uses_with(result)
    model.graph.insert_after(node, builder.nodes)
    model.graph.remove(node, safe=True)


class _Builder:
    """Collects the nodes that replace one, with names of their own."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.nodes: list[ir.Node] = []
        self._model = model
        self._name = f"{node.name}_restored"
        self._type = node.outputs[0].type

    def step(self, operator: str, *operands: ir.Value) -> ir.Value:
        """Add a node and return its result."""
        return self.add(ir.node(operator, list(operands), name=f"{self._name}_{len(self.nodes)}"))

    def add(self, node: ir.Node) -> ir.Value:
        """Add a node made elsewhere."""
        for position, value in enumerate(node.outputs):
            value.name, value.type = f"{self._name}_{len(self.nodes)}_{position}", self._type
        self.nodes.append(node)
        return node.outputs[0]

    def number(self, value: float) -> ir.Value:
        """Add a scalar constant."""
        return self.constant(np.array(value, dtype=np.float32))

    def constant(self, array: np.ndarray) -> ir.Value:
        """Add a constant."""
        name = f"{self._name}_constant_{len(self._model.graph.initializers)}"
        return add_constant_(self._model, name, array)
