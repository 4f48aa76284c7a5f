"""Answers compared up to their scale: the best scale is found, and the right layer takes it.

`found` answers are multiplied by s; the last layer's weight and bias take s.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from recovery_cases import Case, kl_as_it_is
from residual_net import Residual, randomise_
from tiny_graphs import noise, random_keep, tiny

from mm_edge.arrays import Array, Arrays, Float32Array
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import compact_arrays, mask_tensors, materialise
from mm_edge.graph.depth import find_branches
from mm_edge.graph.export import RawGraph, export_raw
from mm_edge.graph.groups import read_structure
from mm_edge.graph.partial import Frontier, RunnableGraph
from mm_edge.quality.divergences import kl_per_image, kl_per_row
from mm_edge.recover.closed_form import judging, structured
from mm_edge.recover.closed_form.branches import empty
from mm_edge.recover.closed_form.consumers import read_consumers
from mm_edge.recover.closed_form.context import RecoveryContext, _answering, build_context, pruned_graph
from mm_edge.recover.closed_form.judging import (
    SCALES,
    Judged,
    best_scale,
    judge,
    judge_answers,
    rescale,
)
from mm_edge.recover.closed_form.pattern import recover_pattern
from mm_edge.recover.closed_form.structured import recover_closed_form


@pytest.fixture(scope="module")
def plain() -> Case:
    return Case("plain")


@pytest.fixture(scope="module")
def less_sure(plain: Case) -> RecoveryContext:
    """A context in which the network's answers should be half as large as they are."""
    return replace(plain.context, answers=(halved(plain.context.answers[0]),))


def halved(logits: Float32Array) -> Float32Array:
    return np.divide(logits, np.float32(2))


# ---- the scale


def test_of_many_class_scores_some_rows_give_the_scale(
    less_sure: RecoveryContext, plain: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plain.context.answers
    monkeypatch.setattr(judging, "SCALED_MOST", 1)
    monkeypatch.setattr(judging, "SCALED_SAMPLE", found[0].size // 2)
    searched: list[int] = []

    def search(wanted: Any, own: Any) -> Any:
        searched.append(len(wanted))
        return best_scale(wanted, own)

    monkeypatch.setattr(judging, "best_scale", search)
    assert judge_answers(less_sure, found).scale == pytest.approx(0.5, rel=1e-3)
    assert searched == [math.ceil(len(found[0]) / 2)]


def answers(rows: int = 40, classes: int = 12, seed: int = 0) -> Float32Array:
    drawn = np.random.default_rng(seed).standard_normal((rows, classes)).astype(np.float32)
    return np.multiply(drawn, np.float32(3))


def kl(wanted: Float32Array, found: Float32Array, scale: float) -> float:
    scaled: Array = scale * found.astype(np.float64)
    return float(kl_per_row(wanted, np.asarray(scaled, np.float32)).mean())


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.9, 1.7, 4.0])
def test_a_known_scale_is_found(scale: float) -> None:
    wanted = answers()
    assert best_scale(wanted, wanted / np.float32(scale)) == pytest.approx(scale, rel=1e-3)


def test_the_same_answers_are_not_scaled() -> None:
    wanted = answers()
    assert best_scale(wanted, wanted.copy()) == 1.0
    assert best_scale(wanted, np.ones_like(wanted)) == 1.0  # no scale changes these


@pytest.mark.parametrize("seed", range(20))
def test_no_other_scale_diverges_less(seed: int) -> None:
    generator = np.random.default_rng(seed)
    wanted = answers(seed=seed)
    found = np.float32(4 ** generator.uniform(-1, 1)) * (
        wanted + np.float32(generator.uniform(0, 4)) * answers(seed=99)
    )
    scale = best_scale(wanted, found)
    least = kl(wanted, found, scale)
    others = [kl(wanted, found, other) for other in np.linspace(*SCALES, 500)]
    assert least <= min(others) + 1e-6
    assert least <= kl(wanted, found, 1.0)


def test_it_stays_within_its_bounds() -> None:
    wanted = answers()
    assert best_scale(wanted, np.multiply(wanted, np.float32(100))) == SCALES[0]
    assert best_scale(wanted, np.divide(wanted, np.float32(100))) == SCALES[1]
    assert best_scale(wanted, -wanted) == SCALES[0]


@pytest.mark.parametrize("gap", [15.0, 23.0, 25.0, 80.0])
@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("sure", [0.02, 0.5, 0.7, 0.98])
def test_answers_that_all_turn_sure_at_one_scale(gap: float, classes: int, sure: float) -> None:
    """The slope is a steep step here, so that Newton's method alone jumps between two points."""
    found = np.zeros((4, classes), np.float32)
    found[:, 0] = gap
    wanted = np.zeros((4, classes), np.float32)
    wanted[:, 0] = np.log(sure / (1 - sure) * (classes - 1))
    exact = float(np.clip(wanted[0, 0] / gap, *SCALES))
    assert best_scale(wanted, found) == pytest.approx(exact, abs=2e-3)
    assert kl(wanted, found, best_scale(wanted, found)) <= kl(wanted, found, 1.0) + 1e-9


def test_answers_that_are_not_finite_are_infinitely_far(plain: Case) -> None:
    found = plain.context.answers[0].copy()
    found[3, 0, 2] = np.nan
    assert np.isinf(judge_answers(plain.context, (found,)).divergences).all()
    assert judge_answers(plain.context, (found,)).scale == 1.0


def test_an_images_divergence_is_the_mean_over_its_positions() -> None:
    dense, found = answers(12).reshape(3, 4, 12), answers(12, seed=1).reshape(3, 4, 12)
    expected = [kl(image, other, 1.0) for image, other in zip(dense, found, strict=True)]
    np.testing.assert_allclose(kl_per_image(dense, found), expected)


def test_without_a_layer_to_take_it_nothing_is_scaled(plain: Case) -> None:
    dense = plain.context.answers[0]
    twice = np.multiply(dense, np.float32(2))
    unable = replace(plain.context, answering=())
    assert judge_answers(plain.context, (twice,)).mean == pytest.approx(0, abs=1e-6)
    assert judge_answers(plain.context, (twice,)).scale == pytest.approx(0.5, rel=1e-3)
    assert judge_answers(unable, (twice,)).scale == 1.0
    assert judge_answers(unable, (twice,)).mean == pytest.approx(kl(dense[:, 0], twice[:, 0], 1.0))
    assert Judged(np.array([-1e-17]), 1.0).mean == 0.0


# ---- the layer that makes the answers

Sketch = tuple[str, dict[str, tuple[int, ...]], Arrays]  # a graph's body, the shapes of its weights, its constants
LAST: dict[str, Sketch] = {
    "bias in the product": ("y = Gemm<transB=1>(f, w, b)", {"w": (5, 12), "b": (5,)}, {}),
    "no bias": ("y = MatMul(f, w)", {"w": (12, 5)}, {}),
    "bias added": ("m = MatMul(f, w) y = Add(m, b)", {"w": (12, 5), "b": (5,)}, {}),
    "bias first": ("m = MatMul(f, w) y = Add(b, m)", {"w": (12, 5), "b": (5,)}, {}),
    "transposed weight": ("t = Transpose<perm=[1,0]>(w) m = MatMul(f, t) y = Add(m, b)", {"w": (5, 12), "b": (5,)}, {}),
    "convolution": ("p = GlobalAveragePool(x) c = Conv(p, w, b) y = Flatten(c)", {"w": (5, 3, 1, 1), "b": (5,)}, {}),
    "a second output": ("y = Gemm(f, w, b) z = Softmax(y)", {"w": (12, 5), "b": (5,)}, {}),
}
NONE: dict[str, Sketch] = {
    "softmax": ("m = Gemm(f, w, b) y = Softmax(m)", {"w": (12, 5), "b": (5,)}, {}),
    "answers second": ("y = Relu(f) z = Gemm(y, w, b)", {"w": (12, 5), "b": (5,)}, {}),
    "scaled": ("m = Gemm(f, w, b) y = Mul(m, c)", {"w": (12, 5), "b": (5,)}, {"c": np.full(5, 2, np.float32)}),
    "constant added": ("m = MatMul(f, w) y = Add(m, c)", {"w": (12, 5)}, {"c": np.full(5, 2, np.float32)}),
    "two heads": ("m = Gemm(f, w, b) n = Gemm(f, v) y = Add(m, n)", {"w": (12, 5), "b": (5,), "v": (12, 5)}, {}),
    "shared weight": ("m = MatMul(f, w) r = Relu(m) y = MatMul(r, w)", {"w": (12, 12)}, {}),
    "shared bias": ("m = Gemm(f, w, b) r = Relu(m) y = Gemm(r, v, b)", {"w": (12, 5), "v": (5, 5), "b": (5,)}, {}),
}


def graph_of(body: str, weights: dict[str, tuple[int, ...]], constants: Arrays) -> RawGraph:
    return tiny("float[1,3,2,2] x", f"f = Flatten(x) {body}", weights, constants)


def outputs_of(network: RunnableGraph, image: Array) -> Arrays:
    return network.open(network.inputs, network.outputs).run({network.inputs[0]: image})


@pytest.mark.parametrize("name", LAST)
def test_the_last_layer_takes_the_scale(name: str) -> None:
    body, weights, constants = LAST[name]
    raw = graph_of(body, weights, constants)
    network = RunnableGraph(raw.model.clone())
    found = _answering(network, read_consumers(raw, network), network.outputs[0])
    assert found == tuple(weights)
    image = noise(raw, 1)
    scaled = network.holding({tensor: 3 * network.arrays[tensor] for tensor in found})
    np.testing.assert_allclose(outputs_of(scaled, image)["y"], 3 * outputs_of(network, image)["y"], rtol=1e-5)


@pytest.mark.parametrize("name", NONE)
def test_no_layer_takes_the_scale(name: str) -> None:
    raw = graph_of(*NONE[name])
    network = RunnableGraph(raw.model.clone())
    assert _answering(network, read_consumers(raw, network), network.outputs[0]) == ()


def test_rescaled_tensors_stay_masked_and_keep_their_type(plain: Case) -> None:
    context = plain.context
    assert context.answering == ("head.weight", "head.bias")
    tensors = {"head.bias": np.ones(10, np.float16)}
    found = rescale(context, plain.keep, tensors, 0.5)
    assert tensors["head.bias"].all() and set(tensors) == {"head.bias"}
    assert found["head.bias"].dtype == np.float16 and (found["head.bias"] == 0.5).all()
    mask = mask_tensors(plain.structure, plain.keep)["head.weight"].dense()
    np.testing.assert_array_equal(found["head.weight"], np.where(mask, 0.5 * context.graph.arrays["head.weight"], 0))
    assert rescale(context, plain.keep, tensors, 1.0001) is tensors


# ---- what recovery writes


def test_a_network_twice_too_sure_is_rescaled_and_nothing_else(plain: Case, less_sure: RecoveryContext) -> None:
    found = recover_closed_form(less_sure, {}, {})
    assert found.kl_held_back == pytest.approx(0, abs=1e-6)
    for tensors in (found.tensors, found.fitted):
        assert set(tensors) == {"head.weight", "head.bias"}
        for name, array in tensors.items():
            np.testing.assert_allclose(array, plain.context.graph.arrays[name] / 2, rtol=2e-3)


@pytest.mark.parametrize("walked", [False, True])
def test_the_divergence_said_is_that_of_what_is_written(plain: Case, less_sure: RecoveryContext, walked: bool) -> None:
    found = recover_closed_form(less_sure, plain.keep, plain.counts, walked=walked)
    assert kl_as_it_is(less_sure, found.keep, found.fitted) == pytest.approx(found.kl_held_back, rel=1e-3)
    sure = recover_closed_form(replace(less_sure, answering=()), plain.keep, plain.counts, walked=walked)
    assert found.kl_held_back is not None and sure.kl_held_back is not None
    assert found.kl_held_back < 0.5 * sure.kl_held_back
    for name, mask in mask_tensors(plain.structure, found.keep).items():
        assert not found.tensors[name][~mask.dense()].any(), name


def test_a_pattern_is_rescaled_and_holds(plain: Case, less_sure: RecoveryContext) -> None:
    masks = {"conv2.weight": np.indices(plain.context.graph.arrays["conv2.weight"].shape).sum(axis=0) % 2 == 0}
    found = recover_pattern(less_sure, masks)
    assert found.layers == 1
    assert not found.tensors["conv2.weight"][~masks["conv2.weight"]].any()
    network = pruned_graph(less_sure, {}, found.tensors)
    judged = judge(less_sure, network, Frontier(network, plain.images, less_sure.held_back))
    assert judged.scale == pytest.approx(1, abs=2e-3)
    np.testing.assert_array_less(np.abs(found.tensors["head.bias"]), np.abs(plain.context.graph.arrays["head.bias"]))


# ---- one graph with other weights


def test_holding_changes_the_weights_of_the_copy_alone() -> None:
    raw = graph_of(*LAST["bias in the product"])
    network = RunnableGraph(raw.model.clone())
    image = noise(raw, 1)
    before = outputs_of(network, image)["y"]
    twin = network.holding({"b": network.arrays["b"] + 1})
    np.testing.assert_allclose(outputs_of(twin, image)["y"], before + 1, rtol=1e-5)
    twin.arrays["w"] = 0 * twin.arrays["w"]
    np.testing.assert_array_equal(outputs_of(network, image)["y"], before)


def test_a_graph_of_as_many_indices_is_made_of_another(plain: Case) -> None:
    raw, structure = plain.raw, plain.structure
    first, second = (random_keep(structure, 0.5, seed) for seed in (0, 1))
    network = RunnableGraph(materialise(raw, structure, first))
    held = network.holding(compact_arrays(raw, structure, second))
    made = RunnableGraph(materialise(raw, structure, second))
    assert held.arrays.keys() == made.arrays.keys()
    for name, array in made.arrays.items():
        np.testing.assert_array_equal(held.arrays[name], array)
    image = plain.images[:1]
    first_of_held, first_of_made = (next(iter(outputs_of(item, image).values())) for item in (held, made))
    np.testing.assert_array_equal(first_of_held, first_of_made)


def test_selections_are_judged_by_their_own_constants_where_a_block_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A removed block leaves a constant whose channels are those of the sum, so it differs between selections."""
    torch.manual_seed(0)
    module = Residual().eval()
    randomise_(module)
    raw = export_raw(module, torch.zeros(1, 3, 8, 8))
    structure = read_structure(raw)
    images = np.random.default_rng(0).standard_normal((40, 3, 8, 8), dtype=np.float32)
    context = build_context(raw, structure, images)
    keep = {**random_keep(structure, 0.6), **empty(structure, find_branches(raw.model, structure)[:1])}
    seen: list[tuple[RunnableGraph, Arrays]] = []

    def watched(
        context: RecoveryContext, chosen: Keep, tensors: Arrays, like: RunnableGraph | None = None
    ) -> RunnableGraph:
        network = pruned_graph(context, chosen, tensors, like)
        seen.append((network, RunnableGraph(materialise(raw, structure, chosen, tensors)).arrays))
        return network

    monkeypatch.setattr(structured, "pruned_graph", watched)
    counts = {leaf: int(kept.sum()) for leaf, kept in keep.items() if kept.any()}
    recover_closed_form(context, keep, counts)
    assert len(seen) > 4, "no selection was tried besides the first ones"
    for network, expected in seen:
        assert network.arrays.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(network.arrays[name], array, err_msg=name)
