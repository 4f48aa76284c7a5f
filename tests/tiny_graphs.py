"""Tiny ONNX graphs written as text, and the one check of exactness that every operator goes through."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir

from mm_edge.arrays import BoolArray, Float32Array
from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.compact import mask_tensors, masked_model, materialise
from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import RawGraph, fold_constants
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.quality.parity import compare, onnx_runner

OPSET = 20


def tiny(
    inputs: str,
    body: str,
    weights: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, npt.ArrayLike] | None = None,
    buffers: Mapping[str, npt.ArrayLike] | None = None,
    opset: int = OPSET,
) -> RawGraph:
    """Return the raw graph of `body`, whose last assignments give `y` (and `z` where it is named).

    `weights` are parameters of those shapes with random values; `constants` are anonymous, `buffers` named state.
    """
    outputs = "float[] y, float[] z" if "z =" in body else "float[] y"
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    tensors = {name: rng.uniform(0.2, 1.0, shape).astype(np.float32) for name, shape in weights.items()}
    signs = {name: rng.choice(np.array([-1, 1], np.float32), array.shape) for name, array in tensors.items()}
    named: dict[str, npt.ArrayLike] = {name: array * signs[name] for name, array in tensors.items()}
    named |= {**(constants or {}), **(buffers or {})}
    for name, array in named.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    model = ir.from_proto(proto)
    fold_constants(model, keep={*weights, *(buffers or {})})
    return RawGraph(model, frozenset(weights), frozenset(buffers or {}))


def structure_of(raw: RawGraph) -> Structure:
    return read_structure(raw)


def leaf_of(structure: Structure, place: str) -> Axis:
    """Return the one leaf of "tensor:axis", or the n-th of several with "tensor:axis/n"."""
    tensor, _, position = place.partition(":")
    axis, _, ordinal = position.partition("/")
    leaves = list(dict.fromkeys(structure.table.leaves(structure.tensor_axes[tensor][int(axis)])))
    if ordinal:
        return leaves[int(ordinal)]
    assert len(leaves) == 1, f"{place} is made of {len(leaves)} leaves"
    return leaves[0]


def coupled(structure: Structure, *places: str) -> bool:
    """Return whether all `places` are one group that may lose indices."""
    leaves = {leaf_of(structure, place) for place in places}
    return len(leaves) == 1 and structure.table.pin_reason(leaves.pop()) is None


def pin_of(structure: Structure, place: str) -> str | None:
    """Return why `place` may lose nothing, None when it may."""
    return structure.table.pin_reason(leaf_of(structure, place))


def random_keep(structure: Structure, fraction: float = 0.5, seed: int = 0) -> Keep:
    """Return a keep that drops a random share of every group, at least one index of each wider than one."""
    rng = np.random.default_rng(seed)
    keep: dict[Axis, BoolArray] = {}
    for group in structure.groups:
        count = min(max(1, round(group.size * fraction)), group.size - 1)
        mask = np.zeros(group.size, dtype=np.bool_)
        mask[rng.permutation(group.size)[:count]] = True
        keep[group.leaf] = mask
    return keep


def noise(raw: RawGraph, count: int = 2) -> Float32Array:
    rng = np.random.default_rng(1)
    sizes = raw.model.graph.inputs[0].shape
    assert sizes is not None
    shape = sizes.numpy()[1:]
    return rng.standard_normal((count, *shape)).astype(np.float32)


def assert_exact(raw: RawGraph, groups: int | None = None, tolerance: float = 1e-5) -> Structure:
    """Drop random indices of every group: the compact graph must equal the masked one, which must not equal the dense.

    `groups` is how many groups the graph must have.
    """
    structure = read_structure(raw)
    assert structure.groups, [(item.id, item.reason) for item in structure.pinned]
    if groups is not None:
        assert len(structure.groups) == groups, [group.id for group in structure.groups]
    inputs = noise(raw)
    dense = onnx_runner(raw.model.clone())
    for seed in range(3):
        keep = random_keep(structure, 0.5, seed)
        masked = onnx_runner(masked_model(raw, mask_tensors(structure, keep)))
        for model in (materialise(raw, structure, keep), deploy(materialise(raw, structure, keep))):
            parity = compare(onnx_runner(model), masked, inputs, "noise")
            assert parity.max_rel_err < tolerance, (seed, parity)
        assert compare(dense, masked, inputs, "noise").max_rel_err > 1e-3, "the masks change nothing: a void test"
    return structure
