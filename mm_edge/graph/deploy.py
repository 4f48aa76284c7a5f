"""From a raw or compact graph to the file a device loads: the passes of `DEPLOY_PASSES`, in their order."""

from __future__ import annotations

import warnings

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import onnxscript.optimizer
import onnxscript.rewriter
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)

from mm_edge.graph.export import FOLDED_BYTES, constant_array, remove_identities


def deploy(model: ir.Model, *, keep_names: bool = False) -> ir.Model:
    """Turn a raw or compact graph, in place, into what a device loads: see `DEPLOY_PASSES`.

    With `keep_names` a convolution into which a BatchNormalization was folded keeps its own name.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = _names_before_normalization(model) if keep_names else {}
        for step in DEPLOY_PASSES:
            step(model)
    for node in model.graph:
        if node.op_type != "BatchNormalization":  # one that stays, after a convolution of shared weights, is no fusion
            node.name = names.get(node.outputs[0].name or "", node.name)
    return model


def _names_before_normalization(model: ir.Model) -> dict[str, str]:
    """Return the names of the nodes before each BatchNormalization, by the latter's result."""
    names: dict[str, str] = {}
    for node in model.graph:
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if node.op_type == "BatchNormalization" and before is not None and before.name:
            names[node.outputs[0].name or ""] = before.name
    return names


def fuse_batch_normalization(model: ir.Model) -> None:
    """Fold every BatchNormalization that follows a convolution or a Gemm into its weights."""
    rules = [fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_conv_transpose_rule, fuse_batchnorm_into_gemm_rule]
    onnxscript.rewriter.rewrite(model, pattern_rewrite_rules=rules)


def fold_weights(model: ir.Model) -> None:
    """Fold what is computed from weights alone (transposes, bias tables): kernels are faster with constant operands."""
    onnxscript.optimizer.fold_constants(model, input_size_limit=FOLDED_BYTES * 16, output_size_limit=FOLDED_BYTES * 16)


def absorb_added_constants(model: ir.Model) -> None:
    """Add a constant with one number per channel to the bias before it; a removed branch leaves such a constant."""
    for node in list(model.graph):
        if node.op_type != "Add":
            continue
        for value, constant in (node.inputs, node.inputs[::-1]):
            added = constant_array(constant)
            if value is None or added is None or not _absorb(value, added):
                continue
            if node.outputs[0].is_graph_output():
                value.name = node.outputs[0].name
            node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            break


def _absorb(value: ir.Value, added: np.ndarray) -> bool:
    """Add a constant to the bias of the node that makes `value`; return whether that was possible.

    It is where nothing else reads `value` or the values between.
    """
    node = value.producer()
    if node is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return False
    if node.op_type == "Conv" and len(node.inputs) > 2:
        per_channel = added.ndim == 4 and added.size == added.shape[1]
        return per_channel and _add_to_initializer(node.inputs[2], added.reshape(-1))
    if node.op_type != "Add":
        return False
    for operand in node.inputs:
        if operand is not None and constant_array(operand) is None and _absorb(operand, added):
            return True
    return any(_add_to_initializer(operand, added) for operand in node.inputs)


def _add_to_initializer(value: ir.Value | None, added: np.ndarray) -> bool:
    """Add to a constant with one reader and, apart from leading axes of size one, the same shape; return whether so."""
    array = constant_array(value)
    if value is None or array is None or len(list(value.uses())) != 1 or _inner(array) != _inner(added):
        return False
    value.const_value = ir.tensor(array + added.reshape(array.shape), name=value.name)
    return True


def _inner(array: np.ndarray) -> tuple[int, ...]:
    first = next((axis for axis, size in enumerate(array.shape) if size > 1), array.ndim)
    return array.shape[first:]


def tidy(model: ir.Model) -> None:
    """Make constants initialisers, share equal ones, remove unused nodes and infer shapes."""
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    remove_identities(model)
    ir_passes.RemoveUnusedNodesPass()(model)
    ir_passes.DeduplicateInitializersPass(size_limit=1024)(model)
    ir_passes.ShapeInferencePass()(model)


DEPLOY_PASSES = (fuse_batch_normalization, fold_weights, absorb_added_constants, tidy)
