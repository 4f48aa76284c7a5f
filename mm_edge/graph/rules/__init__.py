"""The operator table: what each ONNX operator says about the axes of its operands.

A rule is a function of the `Reading` and one node. It unifies axes that lose the same indices, splits or merges them,
pins the axes that the operator reorders or reduces, records the edits that the node needs in a compact graph, and sets
the axes of the node's outputs. Each rule follows the ONNX specification of its operator. An operator without a rule
pins every axis of its operands and results.

To add an operator, write its rule in a file of this folder and enter it in `OPERATOR_RULES`. If the operator puts out
zeros where it reads zeros, also enter it in `zeros.py`; otherwise the sums behind it are pinned (E8).
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from mm_edge.deferred import Deferred  # noqa: F401  for entries whose function lies in another module
from mm_edge.graph.partial import values_read
from mm_edge.graph.reading import Reading, StructureMismatch, is_static
from mm_edge.graph.rules.elementwise import BROADCAST, UNARY, elementwise, first_operand, unary
from mm_edge.graph.rules.indexing import SIZE_DEPENDENT, gather, gather_nd, positions
from mm_edge.graph.rules.joining import concat, expand, pad, resize, slice_, split, tile
from mm_edge.graph.rules.normalization import (
    along_axis,
    batch_normalization,
    group_normalization,
    instance_normalization,
    layer_normalization,
)
from mm_edge.graph.rules.products import convolution, einsum, gemm, matmul
from mm_edge.graph.rules.recurrent import BRANCHING, branching, recurrent
from mm_edge.graph.rules.reduction import POOLINGS, REDUCTIONS, pool, reduce
from mm_edge.graph.rules.shaping import depth_space, reshape, squeeze, transpose

OperatorRule = Callable[[Reading, ir.Node], None]

OPERATOR_RULES: dict[str, OperatorRule] = {
    "Conv": convolution,
    "ConvTranspose": convolution,
    "Gemm": gemm,
    "MatMul": matmul,
    "Einsum": einsum,
    **dict.fromkeys(UNARY, unary),
    "Clip": first_operand,
    "CastLike": first_operand,
    "Dropout": first_operand,
    "Trilu": first_operand,
    **dict.fromkeys(BROADCAST, elementwise),
    "BatchNormalization": batch_normalization,
    "InstanceNormalization": instance_normalization,
    "LayerNormalization": layer_normalization,
    "RMSNormalization": layer_normalization,
    "GroupNormalization": group_normalization,
    "Softmax": along_axis,
    "LogSoftmax": along_axis,
    "Hardmax": along_axis,
    "LpNormalization": along_axis,
    "CumSum": along_axis,
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(POOLINGS, pool),
    "Transpose": transpose,
    "Reshape": reshape,
    "Flatten": reshape,
    "Squeeze": squeeze,
    "Unsqueeze": squeeze,
    "DepthToSpace": depth_space,
    "SpaceToDepth": depth_space,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Expand": expand,
    "Tile": tile,
    "Pad": pad,
    "Resize": resize,
    "Upsample": resize,
    "Gather": gather,
    "GatherND": gather_nd,
    **dict.fromkeys(SIZE_DEPENDENT, positions),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), recurrent),
    **dict.fromkeys(BRANCHING, branching),
}


def apply_rule(reading: Reading, node: ir.Node) -> None:
    """Read one node. Where no rule describes it, pin all its axes, with the operator's name in the reason."""
    known = OPERATOR_RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    try:
        if known is None:
            raise StructureMismatch(f"operator {node.op_type} has no rule")
        known(reading, node)
    except StructureMismatch as mismatch:
        pin_node(reading, node, f"{node.op_type}: {mismatch}")


def pin_node(reading: Reading, node: ir.Node, reason: str) -> None:
    """Pin every axis of every operand and result of `node`."""
    for value in values_read(node):
        if is_static(value):
            reading.pin(reading.axes_of(value), reason)
    for value in node.outputs:
        assert value.name is not None
        reading.axes.pop(value.name, None)
        if is_static(value):
            reading.pin(reading.axes_of(value), reason)
