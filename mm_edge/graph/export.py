"""Exports a PyTorch network to one raw ONNX graph.

The raw graph is not optimised: every parameter and floating-point buffer keeps its PyTorch name, so that structure is
read and weights are swapped by name. Only values that do not depend on a weight are folded.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import onnxscript.optimizer
import torch
from torch import nn

from mm_edge.errors import ExportError
from mm_edge.graph.fold import fold_weight_arithmetic_

FOLDING_ROUNDS = 4
FOLDED_BYTES = 1 << 24
FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class RawGraph:
    """The dense network as exported: static shapes, batch 1, weights under their own names.

    Attributes:
        model: the graph; treat it as read-only, candidates are made from copies.
        parameters: names of the initialisers that a mask may zero.
        buffers: names of the other floating-point state (BatchNorm statistics).
        unused: parameters of the module that its forward pass never reads.
        folded: parameters whose initialiser holds what the network computes from them (see fold.py): read for
            structure and scores, never masked nor swapped.
        given: the same graph with the sizes open, and the batch, that artifacts have (see onnx_graph.py); None where
            they have those of `model`.
        keeps_names: whether artifacts keep the names of nodes, which in a user's file are the user's.
    """

    model: ir.Model
    parameters: frozenset[str]
    buffers: frozenset[str]
    unused: tuple[str, ...] = ()
    folded: frozenset[str] = frozenset()
    given: ir.Model | None = None
    keeps_names: bool = False

    @property
    def weights(self) -> frozenset[str]:
        """Names of the initialisers that are weights: parameters, and what is computed from parameters alone."""
        return self.parameters | self.folded


def export_raw(module: nn.Module, *examples: torch.Tensor) -> RawGraph:
    """Export `module` for inputs shaped like `examples`, one for each input, such as (N, C, H, W).

    Raises:
        ExportError: torch.export refuses the network, or the export loses one of its parameters.
    """
    fresh = exportable(module)
    state = {name for name, _ in fresh.named_parameters()}
    buffers = {name for name, buffer in fresh.named_buffers() if buffer.is_floating_point()}
    model = _export(fresh, examples)
    _name_outputs_(model, fresh, examples)
    _name_tied_(model, fresh)
    fold_constants(model, keep=state | buffers)
    present = set(model.graph.initializers)
    absent = sorted(state - present)
    unused = _never_read(fresh, examples, absent)
    lost = [name for name in absent if name not in unused]
    if lost:
        raise ExportError(
            f"the export lost {len(lost)} of the network's parameters ({', '.join(lost[:3])}); "
            "its forward pass computes with cached copies of them: clear its caches or give an .onnx file"
        )
    folded = fold_weight_arithmetic_(model, state & present)
    present = set(model.graph.initializers)
    return RawGraph(model, frozenset(state & present) - folded, frozenset(buffers & present), tuple(absent), folded)


def fold_constants(model: ir.Model, keep: Iterable[str]) -> None:
    """Fold, in place, everything computed from constants alone except from the tensors named in `keep`.

    Afterwards nodes have unique names, constants are initialisers, shapes are inferred, and no
    floating-point constant has more than one reader.
    """
    names = set(keep)
    fold_rounds(model, names)
    split_shared_constants(model, names)
    for position, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{position}"


def fold_rounds(model: ir.Model, names: set[str]) -> None:
    """Fold, in place, everything computed from constants alone except from the tensors called `names`."""

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in names for value in node.inputs) else None

    # The next round can fold what was computed from shapes that this one finds (swin's rolls need two).
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(FOLDING_ROUNDS):
            infer_shapes(model)
            onnxscript.optimizer.fold_constants(
                model, should_fold=should_fold, input_size_limit=FOLDED_BYTES, output_size_limit=FOLDED_BYTES
            )
            ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            ir_passes.RemoveUnusedNodesPass()(model)
            for value in model.graph.initializers.values():
                if value.const_value is not None:
                    value.shape = ir.Shape(value.const_value.shape.numpy())
            infer_shapes(model)
            if _all_static(model):
                break


def remove_identities(model: ir.Model) -> None:
    """Remove Identity nodes, in place. The pass of onnx_ir fails on those inside the graphs of If, Loop and Scan."""
    if next(iter(model.graph.subgraphs()), None) is None:
        ir_passes.IdentityEliminationPass()(model)
        return
    for node in list(model.graph):
        if node.op_type == "Identity" and node.domain == "" and not node.outputs[0].is_graph_output():
            source = node.inputs[0]
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)


def infer_shapes(model: ir.Model) -> None:
    """Infer shapes in place. ONNX's inference stops at GroupNormalization, whose result has its operand's shape."""
    ir_passes.ShapeInferencePass()(model)
    while True:
        stopped = [
            (node.inputs[0], node.outputs[0])
            for node in model.graph
            if node.op_type == "GroupNormalization" and node.outputs[0].shape is None
        ]
        known = [(operand, out) for operand, out in stopped if operand is not None and operand.shape is not None]
        for operand, out in known:
            out.shape, out.type = operand.shape, operand.type
        if not known:
            return
        ir_passes.ShapeInferencePass()(model)


def _all_static(model: ir.Model) -> bool:
    shapes = [value.shape for node in model.graph for value in node.outputs]
    return all(shape is not None and shape.is_static() for shape in shapes)


def _export(module: nn.Module, examples: tuple[torch.Tensor, ...]) -> ir.Model:
    loud = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loud]
    try:
        for logger in loud:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(module, examples, dynamo=True, optimize=False, verbose=False)
    except Exception as error:
        raise ExportError(
            f"torch.export refuses this network: {_reason(error)}; export it yourself and give the .onnx file"
        ) from error
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)
    assert program is not None
    return program.model


def _reason(error: BaseException) -> str:
    """Return the innermost cause's first line: the exporter wraps what went wrong several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def exportable(module: nn.Module) -> nn.Module:
    """Return a copy in eval mode with plain attention, whose lazily filled dictionaries of tensors are empty.

    After one eval-mode forward timm's LeViT reads its attention biases from such a dictionary, and an
    export would turn them into anonymous constants. timm's fused attention is switched to its plain form: the
    exporter refuses it on five-dimensional operands (hiera, nest) and takes views of it that do not exist (maxvit).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying an exported program warns of PyTorch's own names
        fresh = copy.deepcopy(module).eval()
    for part in fresh.modules():
        if getattr(part, "fused_attn", False) is True:
            setattr(part, "fused_attn", False)  # noqa: B010  a plain attribute of timm's own modules
        for value in vars(part).values():
            own = value is not part._parameters and value is not part._buffers
            if isinstance(value, dict) and own and all(isinstance(item, torch.Tensor) for item in value.values()):
                value.clear()
    return fresh


def _name_tied_(model: ir.Model, module: nn.Module) -> None:
    """Give parameters that a module holds under several names their first one: the exporter may take another."""
    first = {id(tensor): name for name, tensor in module.named_parameters()}
    initializers = model.graph.initializers
    for name, tensor in module.named_parameters(remove_duplicate=False):
        own = first[id(tensor)]
        if name == own or name not in initializers:
            continue
        value = initializers.pop(name)
        if own in initializers:
            value.replace_all_uses_with(initializers[own])
        else:
            value.name = own
            initializers[own] = value


def _never_read(module: nn.Module, examples: tuple[torch.Tensor, ...], names: list[str]) -> set[str]:
    """Return those of `names` that no output depends on, by asking autograd."""
    if not names:
        return set()
    parameters = dict(module.named_parameters())
    chosen = [parameters[name].requires_grad_(True) for name in names]
    with torch.enable_grad():
        outputs = output_tensors(module(*examples))
        total = sum(output.float().sum() for output in outputs)
        if not isinstance(total, torch.Tensor) or not total.requires_grad:
            return set(names)
        grads = torch.autograd.grad(total, chosen, allow_unused=True)
    return {name for name, grad in zip(names, grads, strict=True) if grad is None}


def _name_outputs_(model: ir.Model, module: nn.Module, examples: tuple[torch.Tensor, ...]) -> None:
    """Give the outputs of a module that returns a dictionary the names of its keys, such as "out" and "aux.0"."""
    with torch.inference_mode():
        found = module(*examples)
    if not isinstance(found, dict):
        return
    names = [name for name, _ in _named_tensors(found)]
    values = list(model.graph.outputs)
    taken = {value.name for node in model.graph for value in node.outputs} | {item.name for item in model.graph.inputs}
    taken |= set(model.graph.initializers)
    if len(names) != len(values) or len({*names}) != len(names) or len({*values}) != len(values):
        return
    for name, value in zip(names, values, strict=True):
        if name not in taken and value.producer() is not None:
            value.name = name


def output_tensors(value: object) -> list[torch.Tensor]:
    """Return the tensors in what a module returned, in the order an export lists them."""
    return [tensor for _, tensor in _named_tensors(value)]


def _named_tensors(value: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in what a module returned with where they lie: keys and positions, joined by points."""
    if isinstance(value, torch.Tensor):
        yield path, value
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, item in items:
        yield from _named_tensors(item, f"{path}.{key}" if path else str(key))


def split_shared_constants(model: ir.Model, keep: set[str]) -> None:
    """Give every reader of a floating-point constant its own copy: each may lose other indices."""
    for name, value in list(model.graph.initializers.items()):
        uses = list(value.uses())
        if name in keep or len(uses) < 2 or value.const_value is None or value.dtype not in FLOAT_TYPES:
            continue
        if value.const_value.size == 1:
            continue
        for position, use in enumerate(uses[1:], start=1):
            twin = ir.Value(
                name=f"{name}__use{position}", shape=value.shape, type=value.type, const_value=value.const_value
            )
            model.graph.register_initializer(twin)
            use.node.replace_input_with(use.idx, twin)


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of a constant value, or None when it is computed at run time."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()
