"""Boxes: overlaps and suppression counted by hand."""

from __future__ import annotations

import numpy as np

from mm_edge.quality.boxes import corners_of_centred, detections_of, overlaps, suppress


def test_overlaps_by_hand() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 0, 0]], np.float64)
    others = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [0, 0, 0, 0]], np.float64)
    np.testing.assert_allclose(overlaps(boxes, others), np.array([[1, 50 / 150, 0, 0], [0, 0, 0, 0]]))
    assert overlaps(boxes, others[:0]).shape == (2, 0)


def test_corners_of_centred_boxes() -> None:
    assert corners_of_centred(np.array([[5, 6, 4, 2]])).tolist() == [[3, 5, 7, 7]]


def test_what_is_no_box_is_left_out_and_the_rest_is_sorted() -> None:
    boxes = np.array([[0, 0, 1, 1], [0, 0, 2, 2], [3, 0, 3, 5], [0, 4, 9, 2], [0, 0, np.nan, 1], [0, 0, 5, 5]])
    scores = np.array([0.2, 0.9, 0.8, 0.8, 0.8, np.inf])
    found = detections_of(boxes, scores, np.array([4, 5, 6, 7, 8, 9]))
    assert found.boxes.tolist() == [[0, 0, 2, 2], [0, 0, 1, 1]]
    assert found.scores.tolist() == [0.9, 0.2] and found.classes.tolist() == [5, 4] and len(found) == 2


def test_suppression_is_by_class_from_the_highest_score_down() -> None:
    # The second overlaps the first by 80/120, the third overlaps the second by as much, but the first by 60/140 only.
    boxes = np.array([[0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10], [2, 0, 12, 10]], np.float64)
    found = detections_of(boxes, np.array([0.9, 0.8, 0.7, 0.6]), np.array([0, 0, 0, 1]))
    assert suppress(found, 0.65).scores.tolist() == [0.9, 0.7, 0.6]
    assert suppress(found, 0.4).scores.tolist() == [0.9, 0.6]
    assert suppress(found, 0.7).scores.tolist() == [0.9, 0.8, 0.7, 0.6]
    assert suppress(found, None).scores.tolist() == [0.9, 0.8, 0.7, 0.6]
    assert suppress(found, 0.65, most=2).scores.tolist() == [0.9, 0.7]
    assert suppress(found, None, most=2).scores.tolist() == [0.9, 0.8]


def test_nothing_stays_nothing() -> None:
    nothing = detections_of(np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    assert len(suppress(nothing, 0.5)) == len(suppress(nothing, None)) == 0
