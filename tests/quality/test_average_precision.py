"""Average precision, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mm_edge.quality.average_precision import AveragePrecision, average_precision
from mm_edge.quality.boxes import Detections, detections_of

LEFT, RIGHT, FAR = [0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60]


def image(*found: tuple[list[int], float, int]) -> Detections:
    return detections_of(
        np.array([box for box, _, _ in found]), np.array([s for _, s, _ in found]), np.array([c for _, _, c in found])
    )


NOTHING = detections_of(np.zeros((0, 4)), np.zeros(0), np.zeros(0))


def test_equal_boxes_have_precision_one(capsys: pytest.CaptureFixture[str]) -> None:
    expected = [image((LEFT, 1, 0), (RIGHT, 1, 3)), NOTHING, image((FAR, 1, 0))]
    assert average_precision(expected, expected) == AveragePrecision(1, 1, 3)
    assert capsys.readouterr().out == ""


def test_half_of_the_boxes_found() -> None:
    # Precision is 1 up to a recall of 0.5: at 51 of the 101 recalls.
    expected = [image((LEFT, 1, 0)), image((LEFT, 1, 0))]
    found = average_precision([image((LEFT, 0.5, 0)), NOTHING], expected)
    assert found is not None and [found.map50, found.map] == pytest.approx([51 / 101] * 2)


def test_a_wrong_box_above_the_right_one_halves_the_precision() -> None:
    expected = [image((LEFT, 1, 0))]
    found = average_precision([image((FAR, 0.9, 0), (LEFT, 0.5, 0))], expected)
    assert found is not None and found.map50 == pytest.approx(0.5)
    below = average_precision([image((FAR, 0.4, 0), (LEFT, 0.5, 0))], expected)
    assert below is not None and below.map50 == pytest.approx(1)


def test_the_overlap_decides_at_which_thresholds_a_box_is_right() -> None:
    # IoU 80/120: right at 0.5, 0.55, 0.6 and 0.65, four of the ten.
    found = average_precision([image(([2, 0, 12, 10], 0.5, 0))], [image((LEFT, 1, 0))])
    assert found is not None and found.map50 == pytest.approx(1) and found.map == pytest.approx(0.4)


def test_classes_count_alike_and_those_not_expected_not_at_all() -> None:
    expected = [image((LEFT, 1, 0), (RIGHT, 1, 1))]
    found = average_precision([image((LEFT, 0.9, 0), (FAR, 0.9, 7))], expected)
    assert found is not None and found.map50 == pytest.approx(0.5) and found.boxes == 2
    wrong_class = average_precision([image((LEFT, 0.9, 1), (RIGHT, 0.9, 0))], expected)
    assert wrong_class == AveragePrecision(0, 0, 2)


def test_a_box_is_taken_once() -> None:
    expected = [image((LEFT, 1, 0), (RIGHT, 1, 0))]
    found = average_precision([image((LEFT, 0.9, 0), (LEFT, 0.8, 0), (RIGHT, 0.7, 0))], expected)
    # Recall 0.5 at precision 1, recall 1 at precision 2/3.
    assert found is not None and found.map50 == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_without_an_expected_box_there_is_no_figure() -> None:
    assert average_precision([image((LEFT, 1, 0))], [NOTHING]) is None
    assert average_precision([NOTHING], [image((LEFT, 1, 0))]) == AveragePrecision(0, 0, 1)
