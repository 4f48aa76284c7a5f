"""What is compared with the dense network: found by hand on small heads of every family."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from tiny_graphs import tiny

from mm_edge.errors import UsageError
from mm_edge.graph.answers import POSITIONS_MOST, AnswerKind, AnswerPart, AnswerViews, find_answers, outputs_of
from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import read_structure

Shapes = Mapping[str, tuple[int, ...]]


def found(raw: RawGraph, judge: tuple[str, ...] = ()) -> AnswerViews:
    return find_answers(raw, read_structure(raw), judge)


def described(answers: AnswerViews) -> list[list[list[tuple[str, int, int]]]]:
    """Return per view and kind the name of each part's value, its first channel and the one after its last."""
    return [[[(p.value, p.start, p.stop) for p in kind.parts] for kind in view] for view in answers.views]


def test_class_scores_are_one_kind() -> None:
    raw = tiny("float[1,3,2,2] x", "f = Flatten(x) y = Gemm(f, w, b)", {"w": (12, 5), "b": (5,)})
    assert described(found(raw)) == [[[("y", 0, 5)]]]
    assert found(raw).class_scores == "y" and found(raw).kinds[0].divergence == ""


def test_a_last_softmax_is_judged_by_what_it_reads() -> None:
    raw = tiny("float[1,3,2,2] x", "f = Flatten(x) m = Gemm(f, w, b) y = Softmax(m)", {"w": (12, 5), "b": (5,)})
    assert found(raw).class_scores == "m" and found(raw).kinds[0].divergence == "kl"
    text = "r = Reshape(x, s) m = MatMul(r, w) y = Softmax<axis=2>(m)"
    rows = tiny("float[1,3,2,2] x", text, {"w": (3, 7)}, {"s": np.array([1, 4, 3])})
    (kind,) = found(rows).kinds
    assert (kind.parts, kind.divergence, kind.shape) == ((AnswerPart("m", 2, 0, 7),), "kl", (1, 4, 7))


@pytest.mark.parametrize(
    "end", ["n = ReduceL2<keepdims=1>(m, a) y = Div(m, n)", "y = Tanh(m)", "y = LpNormalization<axis=1>(m)"]
)
def test_an_embedding_holds_no_class_scores(end: str) -> None:
    text = f"f = Flatten(x) m = Gemm(f, w, b) {end}"
    constants = {"a": np.array([1])} if "a)" in end else {}
    raw = tiny("float[1,3,2,2] x", text, {"w": (12, 5), "b": (5,)}, constants)
    assert found(raw).class_scores is None
    assert described(found(raw))[0] == [[("y", 0, 5)]]


# A head of two scales with boxes (2 distances of 4 bins each) and 3 classes, decoded as in the YOLO family.
YOLO = """
    b1 = Conv(x, wb1) c1 = Conv(x, wc1) h1 = Concat<axis=1>(b1, c1) r1 = Reshape(h1, s1)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
    b2 = Conv(p, wb2) c2 = Conv(p, wc2) h2 = Concat<axis=1>(b2, c2) r2 = Reshape(h2, s2)
    all = Concat<axis=2>(r1, r2)
    box, cls = Split<axis=1>(all, parts)
    bins = Reshape(box, s3) tb = Transpose<perm=[0,2,1,3]>(bins) soft = Softmax<axis=1>(tb) d = Conv(soft, dfl)
    dist = Reshape(d, s4) scaled = Mul(dist, strides) probability = Sigmoid(cls)
    y = Concat<axis=1>(scaled, probability)
"""
YOLO_WEIGHTS: Shapes = {"wb1": (8, 2, 1, 1), "wc1": (3, 2, 1, 1), "wb2": (8, 2, 1, 1), "wc2": (3, 2, 1, 1)}
YOLO_CONSTANTS = {
    "s1": np.array([1, 11, 16]),
    "s2": np.array([1, 11, 4]),
    "s3": np.array([1, 2, 4, 20]),
    "s4": np.array([1, 2, 20]),
    "parts": np.array([8, 3]),
    "dfl": np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1),
    "strides": np.full((1, 1, 20), 8, np.float32),
}


def test_a_detector_is_judged_decoded_and_raw_boxes_and_classes_alike() -> None:
    raw = tiny("float[1,2,4,4] x", YOLO, YOLO_WEIGHTS, YOLO_CONSTANTS)
    assert described(found(raw)) == [
        [[("y", 0, 2)], [("y", 2, 5)]],
        [[("b1", 0, 8), ("b2", 0, 8)], [("c1", 0, 3), ("c2", 0, 3)]],
    ]
    assert found(raw).class_scores is None
    assert found(raw).values == ("y", "b1", "b2", "c1", "c2")


def test_raw_results_of_one_shape_are_kinds_of_their_own() -> None:
    text = "h = Conv(x, wh) s = Conv(x, ws) o = Conv(x, wo) y = Sigmoid(h) e = Exp(s) z = Concat<axis=1>(e, o)"
    raw = tiny("float[1,2,4,4] x", text, {"wh": (1, 2, 1, 1), "ws": (2, 2, 1, 1), "wo": (2, 2, 1, 1)})
    decoded, before = described(found(raw))
    assert decoded == [[("y", 0, 1)], [("z", 0, 2)], [("z", 2, 4)]]
    assert before == [[("h", 0, 1)], [("s", 0, 2)], [("o", 0, 2)]]


def test_maps_that_are_only_moved_are_one_view() -> None:
    text = "m = Conv(x, w, b) t = Transpose<perm=[0,2,3,1]>(m) y = Identity(t)"
    raw = tiny("float[1,2,4,4] x", text, {"w": (3, 2, 1, 1), "b": (3,)})
    (kind,) = found(raw).kinds
    assert kind.parts[0].axis == 3 and kind.shape == (1, 4, 4, 3)


def test_the_largest_index_is_judged_by_the_maps_it_is_taken_of() -> None:
    raw = tiny(
        "float[1,2,4,4] x", "m = Conv(x, w, b) i = ArgMax<axis=1>(m) y = Cast<to=1>(i)", {"w": (3, 2, 1, 1), "b": (3,)}
    )
    assert described(found(raw)) == [[[("m", 0, 3)]]]


def test_what_comes_after_top_k_is_judged_before_it() -> None:
    text = "m = Conv(x, w, b) f = Reshape(m, s) g = Sigmoid(f) y, z = TopK<axis=2>(g, k)"
    constants = {"s": np.array([1, 3, 16]), "k": np.array([4])}
    raw = tiny(
        "float[1,2,4,4] x",
        text.replace("y, z", "y, i") + " z = Cast<to=1>(i)",
        {"w": (3, 2, 1, 1), "b": (3,)},
        constants,
    )
    assert described(found(raw)) == [[[("g", 0, 3)]], [[("m", 0, 3)]]]


def test_values_that_lose_channels_are_not_judged() -> None:
    """The last weighted layer of this branch is inside the network: its channels may go."""
    text = "m = Conv(x, w) r = Relu(m) a = GlobalAveragePool(r) n = Conv(a, v) y = Sigmoid(n)"
    raw = tiny("float[1,2,4,4] x", text, {"w": (4, 2, 1, 1), "v": (3, 4, 1, 1)})
    assert described(found(raw)) == [[[("y", 0, 3)]], [[("n", 0, 3)]]]


def test_the_user_names_what_is_judged() -> None:
    raw = tiny("float[1,2,4,4] x", YOLO, YOLO_WEIGHTS, YOLO_CONSTANTS)
    assert described(found(raw, ("probability",))) == [[[("probability", 0, 3)]]]
    with pytest.raises(UsageError) as caught:
        found(raw, ("boxes",))
    assert str(caught.value) == (
        "--judge boxes is no floating-point value of the network with a known shape; "
        "'mm-edge inspect' shows those that are compared"
    )


def test_outputs_alone_are_one_view_each() -> None:
    raw = tiny("float[1,2,4,4] x", "y = Conv(x, w) z = Conv(x, v)", {"w": (3, 2, 1, 1), "v": (2, 2, 1, 1)})
    assert described(outputs_of(raw, read_structure(raw))) == [[[("y", 0, 3)]], [[("z", 0, 2)]]]


def test_a_kind_reads_positions_by_channels_and_samples_large_maps() -> None:
    kind = AnswerKind((AnswerPart("a", 1, 1, 3), AnswerPart("b", 0, 0, 2)), "channels", ())
    values = {"a": np.arange(12.0).reshape(1, 3, 2, 2), "b": np.array([[90.0], [91.0]])}
    assert kind.of(values).tolist() == [[4, 8], [5, 9], [6, 10], [7, 11], [90, 91]]
    large = AnswerKind((AnswerPart("m", 1, 0, 1),), "channels", ())
    picture = np.arange(100.0 * 100).reshape(1, 1, 100, 100)
    first, again = large.of({"m": picture}), large.of({"m": picture})
    assert len(first) == POSITIONS_MOST and len(set(first.ravel())) == POSITIONS_MOST
    np.testing.assert_array_equal(first, again)
