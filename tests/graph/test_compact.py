"""Masks and compact graphs of one keep: what loses what, and that the raw graph stays as it was."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from tiny_graphs import leaf_of, noise, random_keep, structure_of, tiny

from mm_edge.errors import JobError
from mm_edge.graph.compact import AxisMask, apply_mask, mask_tensors, masked_model, materialise
from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import Structure
from mm_edge.quality.parity import compare, onnx_runner

BODY = """a = Conv(x, w, b) n = BatchNormalization(a, s, t, m, q) d = Conv<group=6>(n, dw) r = Relu(d)
          f = Reshape(r, flat) y = Gemm(f, v)"""
WEIGHTS = {"w": (6, 3, 1, 1), "b": (6,), "s": (6,), "t": (6,), "dw": (6, 1, 1, 1), "v": (24, 4)}


@pytest.fixture
def raw() -> RawGraph:
    buffers = {"m": np.arange(6, dtype=np.float32), "q": np.arange(1, 7, dtype=np.float32)}
    return tiny("float[1,3,2,2] x", BODY, WEIGHTS, {"flat": np.array([1, 24])}, buffers)


@pytest.fixture
def structure(raw: RawGraph) -> Structure:
    return structure_of(raw)


def first_two(structure: Structure) -> dict[int, np.ndarray]:
    return {leaf_of(structure, "w:0"): np.arange(6) < 2}


def array_of(model: ir.Model, name: str) -> np.ndarray:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def operand_of(node: ir.Node) -> np.ndarray:
    """Return the array of the second operand."""
    value = node.inputs[1]
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def test_a_mask_is_the_outer_product_of_its_axes() -> None:
    mask = AxisMask((np.array([True, False]), np.array([True, False, True])))
    assert mask.dense().tolist() == [[True, False, True], [False, False, False]]
    assert mask.kept == 2


def test_masks_reach_kernels_biases_and_norms_but_no_statistics(raw: RawGraph, structure: Structure) -> None:
    masks = mask_tensors(structure, first_two(structure))
    assert {name: mask.kept for name, mask in masks.items()} == {"w": 6, "b": 2, "s": 2, "t": 2, "dw": 2, "v": 32}
    assert masks["v"].axes[0].tolist() == [True] * 8 + [False] * 16
    assert masks["v"].axes[1].all()


def test_nothing_is_masked_where_everything_stays(structure: Structure) -> None:
    assert mask_tensors(structure, {}) == {}
    assert mask_tensors(structure, {leaf_of(structure, "w:0"): np.ones(6, dtype=np.bool_)}) == {}


def test_a_masked_weight_that_is_not_a_number_becomes_zero() -> None:
    mask = AxisMask((np.array([True, False]),))
    assert apply_mask(np.array([1, np.nan], np.float32), mask).tolist() == [1, 0]
    assert apply_mask(np.array([1, 2], np.float32), None).tolist() == [1, 2]


def test_materialise_slices_every_tensor_the_group_owns_and_rewrites_constants(
    raw: RawGraph, structure: Structure
) -> None:
    model = materialise(raw, structure, first_two(structure))
    shapes = {name: array_of(model, name).shape for name in (*WEIGHTS, "m", "q")}
    assert shapes == {
        "w": (2, 3, 1, 1), "b": (2,), "s": (2,), "t": (2,), "dw": (2, 1, 1, 1), "v": (8, 4), "m": (2,), "q": (2,),
    }  # fmt: skip
    nodes = {node.op_type: node for node in model.graph}
    assert [
        node.attributes["group"].as_int()
        for node in model.graph
        if node.op_type == "Conv" and node.attributes.get("group")
    ] == [2]
    assert operand_of(nodes["Reshape"]).tolist() == [1, 8]
    assert array_of(model, "w").tolist() == array_of(raw.model, "w")[:2].tolist()


def test_the_raw_graph_stays_as_it_was(raw: RawGraph, structure: Structure) -> None:
    before = ir.to_proto(raw.model).SerializeToString(deterministic=True)
    keep = random_keep(structure)
    materialise(raw, structure, keep)
    masked_model(raw, mask_tensors(structure, keep))
    assert ir.to_proto(raw.model).SerializeToString(deterministic=True) == before


def test_tensors_are_swapped_in_by_name_on_both_sides(raw: RawGraph, structure: Structure) -> None:
    keep = first_two(structure)
    tensors = {"w": np.full((6, 3, 1, 1), 0.5, np.float32), "m": np.zeros(6, np.float32)}
    masked = masked_model(raw, mask_tensors(structure, keep), tensors)
    compact = materialise(raw, structure, keep, tensors)
    assert array_of(masked, "w")[:, 0, 0, 0].tolist() == [0.5, 0.5, 0, 0, 0, 0]
    assert array_of(masked, "m").tolist() == [0] * 6
    assert array_of(compact, "w").tolist() == np.full((2, 3, 1, 1), 0.5).tolist()
    assert compare(onnx_runner(compact), onnx_runner(masked), noise(raw), "noise").max_rel_err < 1e-6
    plain = onnx_runner(materialise(raw, structure, keep))
    assert compare(plain, onnx_runner(masked), noise(raw), "noise").max_rel_err > 1e-3


def test_an_empty_group_is_refused_by_name(raw: RawGraph, structure: Structure) -> None:
    with pytest.raises(JobError) as caught:
        materialise(raw, structure, {leaf_of(structure, "w:0"): np.zeros(6, dtype=np.bool_)})
    assert str(caught.value) == (
        "group w:0 would lose all of its 6 indices, and it is not the inside of a residual branch"
    )


def test_a_mean_that_feeds_several_readers_is_rescaled_once() -> None:
    """Found here: the rescaling node once read its own result."""
    body = "a = Conv(x, w) r = Relu(a) m = ReduceMean(r, one) e = Abs(m) f = Neg(m) y = Concat<axis=1>(e, f)"
    raw = tiny("float[1,3,2,2] x", body, {"w": (8, 3, 1, 1)}, {"one": np.array([1])})
    structure = structure_of(raw)
    keep = {structure.groups[0].leaf: np.arange(8) < 3}
    model = materialise(raw, structure, keep)
    (scale,) = [node for node in model.graph if node.op_type == "Mul"]
    assert operand_of(scale) == pytest.approx(3 / 8)
    assert {use.node.op_type for use in scale.outputs[0].uses()} == {"Abs", "Neg"}
