"""What the user's labels (--labels) say about a detector or a segmenter on the validation photos.

mAP, with mAP50 beside     of the boxes of a detector      (quality.average_precision)
mIoU                       of the classes of a segmenter   (quality.segmentation)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mm_edge.arrays import Array, IntArray
from mm_edge.errors import UsageError
from mm_edge.load.annotations import BoxLabels, Labels
from mm_edge.quality.answers import AnswerReader, Answers, score_boxes, score_classes
from mm_edge.quality.boxes import Detections, detections_of
from mm_edge.records import InputSpec, MetricValue


@dataclass(frozen=True)
class Expected:
    """What labels say about some images, in the network's input.

    Attributes:
        boxes: boxes image by image, None for an image without labels; None where the labels are masks.
        masks: classes (H, W) image by image, likewise.
    """

    boxes: list[Detections | None] | None = None
    masks: list[IntArray | None] | None = field(default=None, repr=False)


def expect(
    labels: Labels, reader: AnswerReader | None, photos: Sequence[str], spec: InputSpec, dense: Answers
) -> Expected:
    """Return what the labels of photos say the network should answer.

    Networks number classes in three ways: in the order of the categories' numbers in the file, by these numbers, or by
    these less one. The first by which the dense network reaches the highest mAP is taken.

    Args:
        labels: the labels.
        reader: how the network's outputs are read; None where they are not recognised.
        photos: the names of the photos in their order.
        spec: the network's input.
        dense: what the dense network answers for the photos.

    Raises:
        UsageError: the labels are boxes and the network is no detector, or masks and it is no segmenter.
    """
    if isinstance(labels, BoxLabels):
        if reader is None or reader.head is None or dense.boxes is None:
            raise UsageError(
                "--labels are boxes, and no layout of a detector is recognised; give --metric FILE.py:CALLABLE"
            )
        found = [labels.in_input(photo, spec) for photo in photos]
        return Expected(boxes=_number_as(labels, found, dense.boxes))
    if reader is None or reader.segmenter is None:
        raise UsageError(
            "--labels are masks, and no output is known to hold classes of pixels; give --metric FILE.py:CALLABLE"
        )
    return Expected(masks=[labels.in_input(photo, spec) for photo in photos])


def score(found: Answers, expected: Expected, reader: AnswerReader) -> MetricValue | None:
    """Return mAP or mIoU of answers against labels; None where no image has a labelled object or pixel."""
    if expected.boxes is not None:
        return None if found.boxes is None else score_boxes(found.boxes, expected.boxes)
    if expected.masks is None or found.classes is None:
        return None
    binary = reader.segmenter is not None and reader.segmenter.threshold is not None
    return score_classes(found.classes, expected.masks, binary)


def _number_as(
    labels: BoxLabels, found: Sequence[tuple[Array, IntArray] | None], dense: Sequence[Detections]
) -> list[Detections | None]:
    """Return the boxes with their categories numbered as the dense network numbers its classes."""
    ranks = {number: rank for rank, number in enumerate(labels.categories)}
    best, best_value = None, -1.0
    for number_of in (ranks.__getitem__, int, lambda number: number - 1):
        numbered = [None if item is None else _numbered(*item, number_of) for item in found]
        value = score_boxes(dense, numbered)
        if best is None or (value is not None and value.value > best_value):
            best, best_value = numbered, -1.0 if value is None else value.value
    assert best is not None
    return best


def _numbered(boxes: Array, categories: IntArray, number_of: Callable[[int], int]) -> Detections:
    numbers = np.asarray([number_of(int(item)) for item in categories], np.int64)
    return detections_of(boxes, np.ones(len(boxes)), numbers)
