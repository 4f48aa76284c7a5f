"""Where moments are drawn from: maps of probabilities, their grids, and networks that have none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from tiny_graphs import structure_of, tiny

from mm_edge.arrays import Array
from mm_edge.graph.answers import find_answers
from mm_edge.graph.export import RawGraph
from mm_edge.graph.partial import RunnableGraph
from mm_edge.recover.closed_form.consumers import read_consumers
from mm_edge.recover.closed_form.emphasis import Emphasis, find_emphasis, resize
from mm_edge.recover.closed_form.moments import sample_positions

HEAD = "a = Conv(x, w1) r = Relu(a) h = Conv(r, w2) y = Sigmoid(h)"
WEIGHTS = {"w1": (8, 3, 1, 1), "w2": (2, 8, 1, 1)}
# Two heads of one detector: their positions follow each other in the output.
TWO_HEADS = (
    "a = Conv(x, w1) r = Relu(a) h1 = Conv(r, w2) d = Conv<strides=[2,2]>(r, w3) s = Relu(d) h2 = Conv(s, w4) "
    "f1 = Reshape(h1, s1) f2 = Reshape(h2, s2) f = Concat<axis=2>(f1, f2) y = Sigmoid(f)"
)
TWO_WEIGHTS = {**WEIGHTS, "w3": (8, 8, 1, 1), "w4": (2, 8, 1, 1)}
SHAPES = {"s1": np.array([1, 2, 16], np.int64), "s2": np.array([1, 2, 4], np.int64)}


def find(raw: RawGraph, *images: Mapping[str, Array]) -> Emphasis | None:
    judged = find_answers(raw, structure_of(raw))
    graph = RunnableGraph(raw.model.clone(), judged.values)
    return find_emphasis(graph, judged, enumerate(images))


def test_cells_cover_cells_or_lie_in_them() -> None:
    array = np.arange(16, dtype=np.float32).reshape(4, 4)
    np.testing.assert_array_equal(resize(array, (2, 2)), [[5, 7], [13, 15]])
    np.testing.assert_array_equal(resize(array[:2, :2], (4, 2)), [[0, 1], [0, 1], [4, 5], [4, 5]])
    np.testing.assert_array_equal(resize(array, (4, 4)), array)
    assert resize(array, (3, 5)).shape == (3, 5) and resize(array, (3, 5)).max() == 15


def test_half_of_the_draws_go_by_the_map() -> None:
    array = np.zeros((4, 4), np.float32)
    array[1, 2] = 0.6
    array[3, 3] = 0.2
    chances = Emphasis({0: array}).chances(0, (4, 4))
    assert chances.sum() == pytest.approx(1)
    assert chances[6] == pytest.approx(0.5 / 16 + 0.375) and chances[15] == pytest.approx(0.5 / 16 + 0.125)
    assert chances[0] == pytest.approx(0.5 / 16)
    np.testing.assert_allclose(Emphasis({0: 0 * array}).chances(0, (2, 4)), np.full(8, 1 / 8))


def test_a_map_of_probabilities_is_the_largest_of_its_channels() -> None:
    raw = tiny("float[1,3,4,4] x", HEAD, WEIGHTS)
    heat = np.zeros((1, 2, 4, 4), np.float32)
    heat[0, 1, 2, 3] = 0.9
    found = find(raw, {"y": heat, "h": heat}, {"y": 0.5 * heat, "h": heat})
    assert found is not None
    np.testing.assert_array_equal(found.maps[0], heat[0, 1])
    np.testing.assert_array_equal(found.maps[1], 0.5 * heat[0, 1])


def test_positions_in_a_list_lie_on_the_grids_of_the_heads() -> None:
    raw = tiny("float[1,3,4,4] x", TWO_HEADS, TWO_WEIGHTS, SHAPES)
    listed = np.zeros((1, 2, 20), np.float32)
    listed[0, 0, 5] = 0.1  # the first head, row 1, column 1
    listed[0, 1, 16 + 3] = 0.2  # the second, row 1, column 1 of two: the lower right quarter
    heads = {"h1": np.zeros((1, 2, 4, 4), np.float32), "h2": np.zeros((1, 2, 2, 2), np.float32)}
    found = find(raw, {"y": listed, **heads})
    assert found is not None
    expected = np.zeros((4, 4), np.float32)
    expected[1, 1], expected[2:, 2:] = 0.1, 0.2
    np.testing.assert_array_equal(found.maps[0], expected)


@pytest.mark.parametrize("value", [0.5, 1.5, -0.001, 0.0])
def test_what_is_not_small_almost_everywhere_has_no_map(value: float) -> None:
    raw = tiny("float[1,3,4,4] x", HEAD, WEIGHTS)
    assert find(raw, {"y": np.full((1, 2, 4, 4), value, np.float32)}) is None


def test_classifiers_are_not_even_run() -> None:
    raw = tiny("float[1,8] x", "y = Gemm(x, w)", {"w": (8, 5)})
    judged = find_answers(raw, structure_of(raw))

    def refuse() -> Iterator[tuple[int, Mapping[str, Array]]]:
        raise AssertionError("the network was run")
        yield

    graph = RunnableGraph(raw.model.clone(), judged.values)
    assert find_emphasis(graph, judged, refuse()) is None


def test_positions_are_drawn_where_the_map_says() -> None:
    raw = tiny("float[1,3,20,20] x", HEAD, WEIGHTS)
    graph = RunnableGraph(raw.model.clone())
    consumer = next(item for item in read_consumers(raw, graph) if item.weight == "w2")
    heat = np.zeros((20, 20), np.float32)
    heat[:3, :3] = 0.9
    emphasis = Emphasis({0: heat})
    drawn = sample_positions(graph, consumer, 0, emphasis)
    assert len(set(drawn.tolist())) == 49
    inside = sum(position // 20 < 3 and position % 20 < 3 for position in drawn.tolist())
    even = sum(position // 20 < 3 and position % 20 < 3 for position in sample_positions(graph, consumer, 0).tolist())
    assert inside >= 7 and even <= 5
    np.testing.assert_array_equal(drawn, sample_positions(graph, consumer, 0, emphasis))
