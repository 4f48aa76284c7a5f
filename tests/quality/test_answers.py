"""What outputs stand for is read in one way from both networks, and compared."""

from __future__ import annotations

import numpy as np
import pytest
from detector_outputs import IMAGES, SIZE, heat_map, yolo

from mm_edge.quality.answers import Answers, Likeness, compare_answers, find_reader, score_boxes, score_classes
from mm_edge.quality.boxes import Detections, detections_of
from mm_edge.records import MetricValue


def test_a_detector_compared_with_itself_and_with_a_weaker_one() -> None:
    outputs = {"more": np.zeros((60, 2), np.float32), "output0": np.tile(yolo()["output0"], (20, 1, 1))}
    reader = find_reader(outputs, SIZE)
    assert reader is not None and reader.head is not None and reader.head.layout == "yolo"
    dense = reader.read(outputs)
    assert dense.boxes is not None and len(dense.boxes) == 60
    assert compare_answers(dense, dense) == Likeness(1, 1, None, 20 * sum(map(len, IMAGES)))
    weaker = {"output0": outputs["output0"].copy()}
    weaker["output0"][:, 6] = 0  # class 2 is lost
    found = compare_answers(reader.read(weaker), dense)
    assert found.map50_to_dense == pytest.approx(2 / 3) and found.boxes == 120
    nothing = Answers([detections_of(np.zeros((0, 4)), np.zeros(0), np.zeros(0))] * 60)
    assert compare_answers(dense, nothing) == Likeness(boxes=0)


def test_what_the_first_images_do_not_show_is_recognised_on_later_ones() -> None:
    outputs = {name: np.concatenate([np.repeat(array[:1], 40, axis=0), array]) for name, array in heat_map().items()}
    outputs["heat"][:40] *= 0.1
    reader = find_reader(outputs, SIZE)
    assert reader is not None and reader.head is not None and reader.head.layout == "heat-map"
    assert len(reader.read(outputs).boxes or []) == 43


def test_a_segmenter_compared_with_itself_and_with_a_shifted_one() -> None:
    classes = np.zeros((40, 8, 8), np.int64)
    classes[:, :4] = 1
    outputs = {"out": classes}
    reader = find_reader(outputs, (16, 16))
    assert reader is not None and reader.segmenter is not None
    dense = reader.read(outputs)
    assert compare_answers(dense, dense) == Likeness(miou_to_dense=1)
    shifted = reader.read({"out": np.roll(classes, 1, axis=1)})
    # A row of each class is the other: 3 of 5 rows agree in both.
    assert compare_answers(shifted, dense).miou_to_dense == pytest.approx(3 / 5)
    assert compare_answers(shifted, Answers(boxes=[])) == Likeness()


def test_other_networks_have_no_reader() -> None:
    assert find_reader({"logits": np.random.default_rng(0).normal(size=(5, 10))}, SIZE) is None
    assert find_reader({}, SIZE) is None


def box(left: int, label: int) -> Detections:
    return detections_of(np.array([[left, 0, left + 10, 10]]), np.ones(1), np.array([label]))


def test_labels_of_boxes_leave_out_images_without_any() -> None:
    assert score_boxes([box(0, 1), box(5, 1)], [box(0, 1), None]) == MetricValue(
        "mAP", 1, is_fraction=True, others={"mAP50": 1}
    )
    assert score_boxes([box(0, 1)], [None]) is None


def test_labels_of_masks_come_in_any_size_and_binary_ones_have_two_classes() -> None:
    found = np.array([[[0, 1], [1, 1]], [[0, 0], [0, 0]]])
    mask = np.kron(np.array([[0, 7], [7, -1]]), np.ones((3, 3), np.int64))
    assert score_classes(found, [mask, None], binary=True) == MetricValue("mIoU", 1, is_fraction=True)
    assert score_classes(found, [mask, None]) == MetricValue("mIoU", 0.5, is_fraction=True)
    assert score_classes(found, [None, None]) is None
