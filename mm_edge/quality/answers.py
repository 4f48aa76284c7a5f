"""The boxes or classes that a network's outputs stand for, and how like the dense network's or the labels they are.

What the outputs stand for is recognised on the dense network's outputs, and read in the same way from a candidate's.
Both networks must have seen the same images in the same order at the same size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Array, IntArray
from mm_edge.quality.boxes import Detections
from mm_edge.quality.detections import above, average_precision, detect
from mm_edge.quality.heads import Head, find_head
from mm_edge.quality.segmentation import IGNORED, Segmenter, class_maps, find_segmenter, mean_iou, resize_nearest
from mm_edge.records import MetricValue

# Images whose outputs are looked at together: boxes of a batch are held several times over while they are read.
IMAGES = 32


@dataclass(frozen=True)
class Answers:
    """What a network answers for some images: `boxes` image by image, or the class of every pixel (n, h, w)."""

    boxes: list[Detections] | None = None
    classes: IntArray | None = None


@dataclass(frozen=True)
class AnswerReader:
    """Reads answers from outputs: those of a detector by `head`, those of a segmenter by `segmenter`."""

    head: Head | None = None
    segmenter: Segmenter | None = None

    def read(self, outputs: Mapping[str, Array]) -> Answers:
        """Return what outputs (images first, by name) stand for."""
        if self.head is not None:
            return Answers(boxes=detect(self.head, _batches(outputs, self.head.outputs)))
        assert self.segmenter is not None
        maps = class_maps(self.segmenter, _batches(outputs, (self.segmenter.output,)))
        return Answers(classes=np.concatenate(maps))


def find_reader(outputs: Mapping[str, Array], size: tuple[int, int], is_segmenter: bool = False) -> AnswerReader | None:
    """Return how to read the dense network's outputs for images of `size`; None where they are neither.

    Args:
        outputs: the outputs for some images by name, images first.
        size: height and width of the input in pixels.
        is_segmenter: whether the user's labels are masks, so that it must be a segmenter.
    """
    for batch in _batches(outputs, tuple(outputs)):
        head = None if is_segmenter else find_head(batch, size)
        if head is not None:
            return AnswerReader(head=head)
        segmenter = find_segmenter(batch, size, is_segmenter)
        if segmenter is not None:
            return AnswerReader(segmenter=segmenter)
    return None


@dataclass(frozen=True)
class Likeness:
    """How like the dense network's the answers are, as in records.Fidelity; `boxes` is the number it detected."""

    map50_to_dense: float | None = None
    map_to_dense: float | None = None
    miou_to_dense: float | None = None
    boxes: int | None = None


def compare_answers(found: Answers, dense: Answers) -> Likeness:
    """Compare answers with the dense network's; figures are None where it detected nothing at all."""
    if found.boxes is not None and dense.boxes is not None:
        precision = average_precision(found.boxes, above(dense.boxes))
        return (
            Likeness(boxes=0) if precision is None else Likeness(precision.map50, precision.map, None, precision.boxes)
        )
    if found.classes is not None and dense.classes is not None:
        return Likeness(miou_to_dense=mean_iou([found.classes], [dense.classes]))
    return Likeness()


def score_boxes(found: Sequence[Detections], expected: Sequence[Detections | None]) -> MetricValue | None:
    """Return mAP against labelled boxes, with mAP50 beside; None without a labelled box.

    Args:
        found: what was detected, image by image.
        expected: the labels of the same images; None for one that has no labels, which is left out.
    """
    pairs = [(ours, right) for ours, right in zip(found, expected, strict=True) if right is not None]
    precision = average_precision([ours for ours, _ in pairs], [right for _, right in pairs])
    if precision is None:
        return None
    return MetricValue("mAP", precision.map, is_fraction=True, others={"mAP50": precision.map50})


def score_classes(found: Array, expected: Sequence[Array | None], binary: bool = False) -> MetricValue | None:
    """Return mIoU against labelled masks; None without a labelled pixel.

    Args:
        found: the class of every pixel, (n, h, w).
        expected: masks (H, W) of the same images, of any size; None for one without labels, which is left out.
        binary: whether there are two classes, of which every class of the masks but 0 is the second.
    """
    masks = [
        (ours, resize_nearest(mask, ours.shape)) for ours, mask in zip(found, expected, strict=True) if mask is not None
    ]
    if binary:
        masks = [(ours, np.where(mask == IGNORED, IGNORED, mask > 0)) for ours, mask in masks]
    value = mean_iou([ours for ours, _ in masks], [mask for _, mask in masks])
    return None if value is None else MetricValue("mIoU", value, is_fraction=True)


def _batches(outputs: Mapping[str, Array], names: Sequence[str]) -> Iterator[dict[str, Array]]:
    """Yield some of the outputs for a few images at a time."""
    count = max((len(outputs[name]) for name in names), default=0)
    for start in range(0, count, IMAGES):
        yield {name: outputs[name][start : start + IMAGES] for name in names}
