"""Classes of pixels: outputs that hold them are recognised, and mIoU is what counting by hand says."""

from __future__ import annotations

import numpy as np
import pytest

from mm_edge.arrays import Array
from mm_edge.quality.segmentation import IGNORED, Segmenter, class_maps, find_segmenter, mean_iou, resize_nearest

SIZE = (32, 48)
# Two images with a square of class 1 and one of class 2.
CLASSES = np.zeros((2, *SIZE), np.int64)
CLASSES[:, 4:20, 4:20], CLASSES[1, 10:30, 24:44] = 1, 2
NOISE = np.random.default_rng(0)


def logits(count: int, classes: Array = CLASSES) -> Array:
    values = NOISE.normal(size=(len(classes), count, *SIZE))
    found = np.where(np.arange(count)[:, None, None] == classes[:, None], values + 9, values - 9)
    return np.asarray(found, np.float32)


def softmax(values: Array) -> Array:
    powers = np.exp(values)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


BINARY = np.asarray(CLASSES > 0, np.int64)
LIKELY = np.asarray(np.where(BINARY, 0.97, 0.02), np.float32)[:, None]

SEGMENTERS: dict[str, tuple[Array, Array, Segmenter]] = {
    "logits": (logits(5), CLASSES, Segmenter("out", 1, None, SIZE)),
    "three classes": (logits(3), CLASSES, Segmenter("out", 1, None, SIZE)),
    "two classes": (logits(2, BINARY), BINARY, Segmenter("out", 1, None, SIZE)),
    "probabilities": (softmax(logits(3)), CLASSES, Segmenter("out", 1, None, SIZE)),
    "channels last": (logits(5).transpose(0, 2, 3, 1), CLASSES, Segmenter("out", 3, None, SIZE)),
    "one probability": (LIKELY, BINARY, Segmenter("out", 1, 0.5, SIZE)),
    "one logit": (np.log(LIKELY / (1 - LIKELY)), BINARY, Segmenter("out", 1, 0.0, SIZE)),
    "one probability, channels last": (LIKELY[:, 0, :, :, None], BINARY, Segmenter("out", 3, 0.5, SIZE)),
    "classes": (CLASSES, CLASSES, Segmenter("out", None, None, SIZE)),
    "classes with a channel": (CLASSES[:, None].astype(np.float32), CLASSES, Segmenter("out", None, None, SIZE)),
}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_classes_are_read_from_every_kind_of_output(name: str) -> None:
    output, expected, segmenter = SEGMENTERS[name]
    found = find_segmenter({"aux": np.zeros((2, 3), np.float32), "out": output}, SIZE)
    assert found == segmenter
    maps = class_maps(found, [{"out": output}, {"out": output}])
    assert len(maps) == 2 and np.array_equal(maps[0], expected)
    assert mean_iou(maps, [expected, expected]) == 1


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_damaged_network_answers_some_class(name: str) -> None:
    output, expected, segmenter = SEGMENTERS[name]
    for damage in (np.nan, np.inf, -np.inf):
        found = mean_iou(class_maps(segmenter, [{"out": np.full(output.shape, damage)}]), [expected])
        assert found is not None and 0 <= found < 0.8


def test_a_coarser_output_is_read_too() -> None:
    coarse = np.kron(CLASSES[:, ::4, ::4], np.ones((1, 1, 1), np.int64))
    assert find_segmenter({"out": coarse}, SIZE) == Segmenter("out", None, None, (8, 12))
    assert find_segmenter({"out": CLASSES[:, ::16, ::16]}, SIZE) is None


OTHERS: dict[str, Array] = {
    "depth": np.linspace(0, 1, 2 * 32 * 48, dtype=np.float32).reshape(2, 1, *SIZE),
    "a picture": np.repeat(NOISE.random((2, 1, *SIZE)), 3, axis=1) + NOISE.random((2, 3, 1, 1)) / 9,
    "features": NOISE.normal(size=(2, 16, *SIZE)),
    "key points": NOISE.random((2, 17, 16, 24)),
    "one class everywhere": np.concatenate([np.ones((2, 1, *SIZE)), np.zeros((2, 3, *SIZE))], axis=1) * 5,
    "nothing found": np.full((2, 1, *SIZE), 0.01),
    "logits of a classifier": NOISE.normal(size=(2, 10)),
    "another shape": np.zeros((2, 32, 40), np.int64),
    "not a number": np.full((2, 1, *SIZE), np.nan),
    "boxes": NOISE.random((2, 100, 4)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_outputs_are_not_recognised(name: str) -> None:
    assert find_segmenter({"out": OTHERS[name]}, SIZE) is None


def test_mean_iou_by_hand() -> None:
    expected = np.array([[[0, 0, 1, 1], [2, 2, 2, IGNORED]]])
    found = np.array([[[0, 1, 1, 1], [2, 2, 3, 3]]])
    # Class 0: 1 of 2; class 1: 2 of 3; class 2: 2 of 3; class 3 is not expected; the last pixel is ignored.
    assert mean_iou([found], [expected]) == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3)
    # Counted over all images: the second has class 0 alone.
    assert mean_iou([found, found[:, :1]], [expected, np.zeros((1, 1, 4), int)]) == pytest.approx(
        (2 / 6 + 2 / 6 + 2 / 3) / 3
    )


def test_without_an_expected_class_there_is_no_figure() -> None:
    assert mean_iou([], []) is None
    assert mean_iou([np.zeros((1, 2, 2), int)], [np.full((1, 2, 2), IGNORED)]) is None


def test_masks_are_resized_to_the_nearest_pixel() -> None:
    mask = np.array([[[0, 1, 2, 3], [4, 5, 6, 7]]])
    assert resize_nearest(mask, (2, 4)).tolist() == mask.tolist()
    assert resize_nearest(mask, (1, 2)).tolist() == [[[5, 7]]]
    assert resize_nearest(mask, (4, 4)).tolist() == [[[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]]


def test_with_masks_beside_the_photos_the_shape_of_an_output_is_enough() -> None:
    noisy = NOISE.normal(size=(2, 3, *SIZE)).astype(np.float32)
    single = NOISE.normal(size=(2, 1, *SIZE)).astype(np.float32)
    outputs = {"aux": np.zeros((2, 3), np.float32), "out": noisy}
    assert find_segmenter(outputs, SIZE) is None
    assert find_segmenter(outputs, SIZE, is_told=True) == Segmenter("out", 1, None, SIZE)
    assert find_segmenter({"out": single}, SIZE, is_told=True) == Segmenter("out", 1, 0.0, SIZE)
    assert find_segmenter({"out": logits(5), "first": noisy}, SIZE, is_told=True) == Segmenter("out", 1, None, SIZE)
    assert find_segmenter({"aux": outputs["aux"]}, SIZE, is_told=True) is None
