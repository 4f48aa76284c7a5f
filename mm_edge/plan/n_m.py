"""n:m sparsity (2:4): at most n non-zeros in every m consecutive weights along the reduced dimension.

The reduced dimension is the one a layer sums over: the inputs of a linear layer, the input channels of a convolution,
for each kernel position on its own. In every group of m the n weights with the larger scores stay, which is the best of
the (m choose n) patterns (six for 2:4) by the sum of scores kept; ties go to the lower index. A last group of fewer
than m is taken as filled up with zeros, as the hardware does.

Closed-form compensation within a pattern: with H = E[x x^T] of the layer's inputs and S the kept inputs of one output,
    w'_S = w_S + (H_SS + r I)^-1 H_SR w_R,    r = ridge * mean(diag H),    R the removed inputs,
minimises E[((w - w') x)^2] + r |w'_S - w_S|^2 and leaves w'_R = 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mm_edge.arrays import BoolArray, Float32Array, Float32Arrays, Float64Array
from mm_edge.bench.pattern import PatternLayer
from mm_edge.bench.target import Target, pattern_options
from mm_edge.errors import ParityError, UsageError
from mm_edge.graph.export import constant_array
from mm_edge.graph.onnx_graph import raw_from_onnx
from mm_edge.load.network import LoadOptions
from mm_edge.load.onnx_file import read_onnx
from mm_edge.records import Layer

# The pattern halves a layer: a strategy that wants to lose less than half of that leaves the layer dense.
LEAST_RHO = 0.25
# TensorRT's sparse kernels gain from about this many input and output channels on (TensorRT issues 3849, 4065).
LEAST_CHANNELS = 256
# A tensor of the exported model is a layer's own when this share of the layer's pruned weights is zero in it.
SAME_TENSOR = 0.9
SOLVE_BYTES = 1 << 28


@dataclass(frozen=True)
class Pattern:
    """`n` of every `m` consecutive weights may differ from zero."""

    n: int
    m: int

    def __str__(self) -> str:
        """Return "n:m"."""
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Projection:
    """Masks by fqn of the layers that take the pattern, and why each other layer stays dense."""

    pattern: Pattern
    masks: dict[str, BoolArray]
    dense: dict[str, str]


@dataclass(frozen=True)
class Violation:
    """A layer of an exported model that does not follow its pattern; `groups` with too many non-zeros, None if lost."""

    fqn: str
    initializer: str | None
    groups: int | None


@dataclass(frozen=True)
class RuntimeInstructions:
    """How a runtime is told to use the pattern.

    Attributes:
        trtexec: the engine command, as an argument list.
        provider_options: of ONNX Runtime's TensorRT provider.
        pytorch: lines of Python for `module`, a network on the GPU with the projected weights.
    """

    trtexec: tuple[str, ...]
    provider_options: dict[str, str]
    pytorch: tuple[str, ...]


def parse_pattern(text: str) -> Pattern:
    """Return the pattern written "n:m".

    Raises:
        UsageError: it is not n:m with 0 < n < m.
    """
    match = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"'{text}' is not a pattern n:m with n below m, such as 2:4")
    return Pattern(int(match[1]), int(match[2]))


def require_support(target: Target, pattern: Pattern) -> None:
    """Refuse a pattern the target has no kernels for.

    Raises:
        UsageError: with the reason the profile gives and what to use instead.
    """
    if str(pattern) in target.n_m:
        return
    why = target.sources.get("n_m", "the profile lists no n:m pattern")
    has = f"it has {', '.join(target.n_m)}" if target.n_m else why
    raise UsageError(
        f"{pattern} gains nothing on {target.name}: {has}; use --kinds structured, which removes whole channels"
    )


def reduced_axes(model: ir.Model) -> dict[str, int]:
    """Return the axis each weight of a raw graph is summed over, by name of its initialiser.

    A weight that reaches its product through anything but transposes is absent.
    """
    axes: dict[str, int] = {}
    for node, operand, axis in _products(model):
        found = _untransposed(node.inputs[operand], axis)
        if found is not None:
            axes.setdefault(*found)
    return axes


def project_mask(score: Float32Array, pattern: Pattern, axis: int) -> BoolArray:
    """Return the mask (the score's shape, True keeps) with the best n of every m scores along `axis`."""
    moved = np.moveaxis(score, axis, -1)
    length = moved.shape[-1]
    padding = -length % pattern.m
    padded = np.pad(moved.astype(np.float64), [(0, 0)] * (moved.ndim - 1) + [(0, padding)], constant_values=-np.inf)
    groups = padded.reshape(*moved.shape[:-1], -1, pattern.m)
    order = np.argsort(-groups, axis=-1, kind="stable")
    kept = np.zeros(groups.shape, dtype=np.bool_)
    np.put_along_axis(kept, order[..., : pattern.n], True, axis=-1)
    flat = kept.reshape(*moved.shape[:-1], -1)[..., :length]
    return np.ascontiguousarray(np.moveaxis(flat, -1, axis))


def project(
    layers: Sequence[Layer],
    scores: Mapping[str, Float32Array],
    sparsity: Mapping[str, float],
    axes: Mapping[str, int],
    pattern: Pattern,
    *,
    least_rho: float = LEAST_RHO,
    least_channels: int = LEAST_CHANNELS,
) -> Projection:
    """Return the masks of one strategy under `pattern`: a layer takes it whole or stays dense with a reason.

    `scores` have each layer's weight shape, `sparsity` is the strategy's rho by fqn, `axes` come from `reduced_axes`.
    """
    masks: dict[str, BoolArray] = {}
    dense: dict[str, str] = {}
    for layer in layers:
        reason = _why_dense(layer, sparsity.get(layer.fqn, 0.0), axes, pattern, least_rho, least_channels)
        if reason is None:
            masks[layer.fqn] = project_mask(scores[layer.fqn], pattern, axes[layer.fqn])
        else:
            dense[layer.fqn] = reason
    return Projection(pattern, masks, dense)


def check_pattern(
    model: ir.Model | Path, masks: Mapping[str, BoolArray], axes: Mapping[str, int], pattern: Pattern
) -> tuple[Violation, ...]:
    """Return the layers of `masks` whose weights in a deployed model do not follow `pattern`.

    A layer's tensor is found by its name, or, where folding renamed and transposed it, among the weights of its shape
    by where its zeros lie.
    """
    graph = ir.load(model) if isinstance(model, Path) else model
    stored = _stored_weights(graph)
    found: list[Violation] = []
    for fqn, mask in masks.items():
        wanted = np.moveaxis(mask, axes[fqn], -1)
        name = _own_tensor(fqn, wanted, stored)
        if name is None:
            found.append(Violation(fqn, None, None))
            continue
        broken = _count_broken(stored.pop(name), pattern)
        if broken:
            found.append(Violation(fqn, name, broken))
    return tuple(found)


def require_pattern(
    model: ir.Model | Path, masks: Mapping[str, BoolArray], axes: Mapping[str, int], pattern: Pattern
) -> None:
    """Raise ParityError unless every layer of `masks` follows `pattern` in the deployed `model`."""
    violations = check_pattern(model, masks, axes, pattern)
    if violations:
        first = violations[0]
        what = "is not in the exported model" if first.groups is None else f"has {first.groups} groups with more"
        raise ParityError(
            f"{len(violations)} of {len(masks)} layers do not keep {pattern}: '{first.fqn}' {what}; "
            "it was not kept as an artifact"
        )


def compensate(weight: Float32Array, moment: Float64Array, mask: BoolArray, ridge: float = 0.01) -> Float32Array:
    """Return the masked weight (outputs, inputs) that makes good what `mask` (same shape) removes.

    `moment` is H (inputs, inputs), the uncentred second moment of the inputs. Formula at the top of the file.
    """
    damping = ridge * float(np.trace(moment)) / max(1, len(moment))
    result = np.zeros(weight.shape, dtype=np.float32)
    counts = mask.sum(axis=1)
    for count in np.unique(counts[counts > 0]):
        rows = np.flatnonzero(counts == count)
        size = max(1, SOLVE_BYTES // (8 * int(count) ** 2))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            kept = np.nonzero(mask[part])[1].reshape(len(part), count)
            full = weight[part].astype(np.float64)
            missing = np.where(mask[part], 0.0, full) @ moment
            square = moment[kept[:, :, None], kept[:, None, :]] + damping * np.eye(count)
            change = np.linalg.solve(square, np.take_along_axis(missing, kept, axis=1)[..., None])[..., 0]
            values = np.take_along_axis(full, kept, axis=1) + change
            result[part[:, None], kept] = values
    return result


def pattern_layers(path: Path, pattern: Pattern) -> list[PatternLayer]:
    """Return the products of a deployed model whose weights keep `pattern` and are not dense.

    Raises:
        ModelError: the file is not an ONNX model.
    """
    model = raw_from_onnx(path, read_onnx(path, LoadOptions(guess_sizes=True, only_run=True)).inputs).model
    found = []
    for node, operand, axis in _products(model):
        value, result = node.inputs[operand], node.outputs[0]
        array = constant_array(value)
        if value is None or array is None or array.ndim < 2 or result.shape is None or not np.any(array == 0):
            continue
        weight = np.moveaxis(array, axis, -1)
        if weight.shape[-1] % pattern.m or _count_broken(weight, pattern):
            continue
        sizes = [int(size) for size in result.shape if isinstance(size, int)]
        spatial = array.shape[2:] if node.op_type.startswith("Conv") else ()
        outputs = int(weight.size // weight.shape[-1] // math.prod(spatial))
        groups = node.attributes.get("group")
        plain = all(size == 1 for size in spatial) and (groups is None or groups.as_int() == 1)
        rows = math.prod(sizes) // outputs if plain else None
        found.append(PatternLayer(str(value.name), node.op_type, rows, int(weight.shape[-1]), outputs))
    return found


def runtime_instructions(target: Target, pattern: Pattern, artifact: str) -> RuntimeInstructions:
    """Return what the target's runtimes need to use `pattern` in the file `artifact`.

    Raises:
        UsageError: the target has no kernels for it.
    """
    require_support(target, pattern)
    engine = str(Path(artifact).with_suffix(".engine"))
    return RuntimeInstructions(
        trtexec=("trtexec", f"--onnx={artifact}", f"--saveEngine={engine}", "--fp16", "--sparsity=enable"),
        provider_options=pattern_options(target),
        pytorch=(
            "module = module.half()",
            "for layer in module.modules():",
            "    if not isinstance(layer, torch.nn.Linear) or layer.in_features % 64 or layer.out_features % 32:",
            "        continue",
            f"    if (layer.weight.unflatten(1, (-1, {pattern.m})) != 0).sum(-1).max() <= {pattern.n}:",
            "        sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())",
            "        layer.weight = torch.nn.Parameter(sparse, requires_grad=False)",
        ),
    )


def _why_dense(
    layer: Layer, rho: float, axes: Mapping[str, int], pattern: Pattern, least_rho: float, least_channels: int
) -> str | None:
    if rho < least_rho:
        return (
            f"its sparsity {rho:.0%} is below {least_rho:.0%}, the pattern would take {1 - pattern.n / pattern.m:.0%}"
        )
    if layer.kind == "depthwise":
        return "depthwise: every output reads one channel, there is no group to choose from"
    if layer.fqn not in axes:
        return "its weight is reshaped before it is used, so consecutive weights are not consecutive inputs"
    axis = axes[layer.fqn]
    reads = layer.shape[axis]
    makes = layer.shape[0 if axis == 1 else 1]
    if min(reads, makes) < least_channels:
        return f"{reads} inputs and {makes} outputs: sparse kernels gain from {least_channels} of both on"
    if reads % pattern.m:
        return f"{reads} inputs are no multiple of {pattern.m}"
    return None


def _products(model: ir.Model) -> list[tuple[ir.Node, int, int]]:
    """Each product of the graph with the operand that may be a weight and the axis it is summed over."""
    found: list[tuple[ir.Node, int, int]] = []
    for node in model.graph:
        if node.op_type == "Conv":
            found.append((node, 1, 1))
        elif node.op_type == "ConvTranspose":
            found.append((node, 1, 0))
        elif node.op_type == "Gemm":
            transposed = node.attributes.get("transB")
            found.append((node, 1, 1 if transposed is not None and transposed.as_int() else 0))
        elif node.op_type == "MatMul":
            found.append((node, 1, -2))
            found.append((node, 0, -1))
    return found


def _untransposed(value: ir.Value | None, axis: int) -> tuple[str, int] | None:
    """Follow `value` back through transposes to its initialiser; return its name and the axis there."""
    perms: list[list[int]] = []
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type != "Transpose" or "perm" not in node.attributes:
            return None
        perms.append(list(node.attributes["perm"].as_ints()))
        value = node.inputs[0]
    if value is None or value.name is None or value.shape is None or len(value.shape) < 2:
        return None
    axis %= len(value.shape)
    for perm in perms:
        axis = perm[axis]
    return value.name, axis


def _stored_weights(model: ir.Model) -> Float32Arrays:
    """Return the constant weights of a deployed graph by name, the reduced axis moved to the end."""
    stored: Float32Arrays = {}
    for node, operand, axis in _products(model):
        value = node.inputs[operand]
        array = constant_array(value)
        if value is not None and value.name is not None and array is not None and array.ndim >= 2:
            stored[value.name] = np.moveaxis(array, axis, -1)
    return stored


def _own_tensor(fqn: str, mask: BoolArray, stored: Mapping[str, Float32Array]) -> str | None:
    """Return the stored weight that is the layer's own; `mask` has its reduced axis at the end."""
    if fqn in stored and stored[fqn].shape == mask.shape:
        return fqn
    pruned = ~mask
    shares = {
        name: float((array[pruned] == 0).mean())
        for name, array in stored.items()
        if array.shape == mask.shape and pruned.any()
    }
    best = max(shares, key=lambda name: shares[name], default=None)
    return best if best is not None and shares[best] >= SAME_TENSOR else None


def _count_broken(array: Float32Array, pattern: Pattern) -> int:
    """Return the groups of m along the last axis with more than n non-zeros."""
    padding = -array.shape[-1] % pattern.m
    padded = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, padding)])
    counts = np.count_nonzero(padded.reshape(-1, pattern.m), axis=1)
    return int((counts > pattern.n).sum())
