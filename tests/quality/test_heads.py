"""Every layout of a detector's outputs is recognised and read; other outputs are not."""

from __future__ import annotations

import numpy as np
import pytest
from detector_outputs import (
    IMAGES,
    LAYOUTS,
    SIZE,
    detr,
    face_heat_map,
    heat_map,
    post_processed,
    ssd,
    yolo,
    yolo_anchors,
)

from mm_edge.arrays import Array
from mm_edge.quality.detections import above, average_precision, detect
from mm_edge.quality.heads import HEADS, find_head

CASES = [(layout, make) for layout, makers in LAYOUTS.items() for make in makers]


def test_every_layout_is_tested() -> None:
    assert set(LAYOUTS) == set(HEADS)


@pytest.mark.parametrize(("layout", "make"), CASES, ids=[make.__name__ for _, make in CASES])
def test_boxes_come_back_as_they_were_put_in(layout: str, make: object) -> None:
    assert callable(make)
    outputs = make()
    head = find_head(outputs, SIZE)
    assert head is not None and head.layout == layout
    found = above(detect(head, [outputs]), 0.3)
    for image, expected in zip(found, IMAGES, strict=True):
        np.testing.assert_allclose(image.boxes, [box[:4] for box in expected], atol=1e-3)
        np.testing.assert_allclose(image.scores, [box[4] for box in expected], atol=1e-5)
        assert image.classes.tolist() == [box[5] for box in expected]


@pytest.mark.parametrize(("layout", "make"), CASES, ids=[make.__name__ for _, make in CASES])
def test_a_damaged_network_gives_fewer_boxes_and_no_error(layout: str, make: object) -> None:
    assert callable(make)
    outputs = make()
    head = find_head(outputs, SIZE)
    assert head is not None
    for damage in (np.nan, np.inf, -np.inf):
        broken = {name: np.full(array.shape, damage, np.float32) for name, array in outputs.items()}
        assert [len(item) for item in detect(head, [broken])] == [0, 0, 0], damage


def test_one_image_without_a_batch_axis() -> None:
    outputs = {name: array[0] for name, array in post_processed().items() if name != "number"}
    outputs["scores"][2:] = 0
    head = find_head(outputs, SIZE)
    assert head is not None and head.layout == "post-processed"
    assert [len(item) for item in detect(head, [outputs])] == [2]


def test_a_box_that_leaves_the_image_ends_at_its_edge() -> None:
    outputs = yolo()
    head = find_head(outputs, SIZE)
    assert head is not None
    outputs["output0"][0, :4, 0], outputs["output0"][0, 4, 0] = [0, 60, 40, 40], 0.95
    assert detect(head, [outputs])[0].boxes[0].tolist() == [0, 40, 20, 64]


def softmaxed(shape: tuple[int, ...]) -> Array:
    values = np.exp(np.random.default_rng(0).normal(size=shape))
    return np.asarray(values / values.sum(axis=-1, keepdims=True), np.float32)


NOISE = np.random.default_rng(1)
OTHERS: dict[str, dict[str, Array]] = {
    "a classifier": {"logits": NOISE.normal(size=(3, 10)).astype(np.float32)},
    "one class": {"score": NOISE.random((3, 1), np.float32)},
    "a segmenter": {"out": NOISE.normal(size=(3, 5, 64, 96)).astype(np.float32)},
    "depth": {"depth": NOISE.random((3, 1, 64, 96), np.float32)},
    "text": {"probabilities": softmaxed((3, 12, 40))},
    "text of as many steps as a detector has cells": {"probabilities": softmaxed((3, 126, 7))},
    "embeddings": {"tokens": NOISE.normal(size=(3, 126, 8)).astype(np.float32)},
    "two embeddings": {name: NOISE.normal(size=(3, 20, 4 if name == "a" else 8)) for name in "ab"},
    "key points": {"heat": NOISE.random((3, 17, 16, 24), np.float32)},
    "nothing": {},
    "an empty output": {"output0": np.zeros((3, 7, 0), np.float32)},
    "no numbers": {"output0": np.full((3, 7, 126), np.nan, np.float32)},
    "texts": {"labels": np.array([["cat"], ["dog"], ["cat"]])},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_outputs_are_not_recognised(name: str) -> None:
    assert find_head(OTHERS[name], SIZE) is None


MISFITS: list[tuple[dict[str, Array], str, float, float]] = [
    (yolo(), "output0", 100, 0),  # scores above 1, centres far outside
    (yolo_anchors(), "output", -1, 0),
    (ssd(), "boxes", 200, 0),
    (ssd(), "scores", 1, 0.5),
    (detr(), "pred_boxes", 1, -0.5),
    (heat_map(), "offset", 1, 3),
    (heat_map(), "heat", 0.1, 0),  # no peak by which sizes differ from offsets
    (face_heat_map(), "heat", 2, 0),
    (post_processed(), "labels", 1, 0.5),
]


@pytest.mark.parametrize(("outputs", "name", "factor", "shift"), MISFITS)
def test_values_that_do_not_fit_a_layout_are_not_recognised(
    outputs: dict[str, Array], name: str, factor: float, shift: float
) -> None:
    assert find_head(outputs, SIZE) is not None
    assert find_head({**outputs, name: outputs[name] * factor + shift}, SIZE) is None


def test_two_layouts_at_once_are_not_recognised() -> None:
    twice = {**ssd(), **{f"second {name}": array for name, array in ssd().items()}}
    assert find_head(twice, SIZE) is None


def test_a_detector_is_like_itself() -> None:
    outputs = yolo()
    head = find_head(outputs, SIZE)
    assert head is not None
    curve = detect(head, [outputs, outputs])
    assert len(curve) == 6
    found = average_precision(curve, above(curve))
    assert found is not None and (found.map50, found.map, found.boxes) == (1, 1, 12)
    weaker = {"output0": outputs["output0"] * np.array([1, 1, 1, 1, 0, 1, 1], np.float32)[:, None]}
    without = average_precision(detect(head, [weaker, weaker]), above(curve))
    assert without is not None and without.map50 == pytest.approx(2 / 3)
