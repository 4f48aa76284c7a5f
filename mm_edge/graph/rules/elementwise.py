"""Element-wise operators: every element of the result depends on one element of each operand."""

from __future__ import annotations

import onnx_ir as ir

from mm_edge.graph.reading import Reading
from mm_edge.graph.rules.operands import operand_axes

UNARY = (
    "Relu Gelu HardSwish HardSigmoid Sigmoid Tanh Erf Sqrt Abs Neg Sign LeakyRelu Elu Selu Celu Mish Softplus "
    "Softsign Exp Log Sin Cos Reciprocal Floor Ceil Round Identity Cast Not IsNaN IsInf Swish ThresholdedRelu"
).split()
BROADCAST = (
    "Add Sub Mul Div Pow Max Min Mod Where Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor PRelu Sum Mean "
    "BitwiseAnd BitwiseOr BitShift"
).split()


def unary(reading: Reading, node: ir.Node) -> None:
    """One operand; the result has its shape."""
    reading.set_axes(node.outputs[0], operand_axes(reading, node, 0))


def first_operand(reading: Reading, node: ir.Node) -> None:
    """The result has the shape of the first operand; the others are scalars or give a type. Trilu pins two axes."""
    axes = operand_axes(reading, node, 0)
    if node.op_type == "Trilu":
        reading.pin(axes[-2:], "Trilu reads positions along this axis")
    reading.set_axes(node.outputs[0], axes)


def elementwise(reading: Reading, node: ir.Node) -> None:
    """Any number of operands, broadcast against each other."""
    operands = [reading.axes_of(value) for value in node.inputs if value is not None]
    reading.set_axes(node.outputs[0], reading.broadcast(operands))
