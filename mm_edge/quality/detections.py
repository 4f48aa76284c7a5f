"""What a detector detects, and how like that of the dense network it is, without labels.

    outputs -> boxes with scores (heads.py) -> those above a score -> non-maximum suppression (boxes.py)

The dense network's own boxes with a score of at least REFERENCE_SCORE are taken for right; a candidate's count from
CURVE_SCORE on, because average precision needs the boxes of low scores too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mm_edge.quality.average_precision import AveragePrecision, average_precision
from mm_edge.quality.boxes import Detections, detections_of, suppress
from mm_edge.quality.heads import HEADS, Head, Layout, Outputs, find_head

__all__ = [
    "CURVE_SCORE",
    "HEADS",
    "REFERENCE_SCORE",
    "AveragePrecision",
    "Detections",
    "Head",
    "Layout",
    "Outputs",
    "above",
    "average_precision",
    "detect",
    "find_head",
]

REFERENCE_SCORE, CURVE_SCORE = 0.25, 0.01


def detect(head: Head, batches: Iterable[Outputs], least: float = CURVE_SCORE) -> list[Detections]:
    """Return what is detected in every image of some batches.

    Args:
        head: the layout of the outputs.
        batches: the outputs by name, (n, ...) each, for one batch of images after the other.
        least: the lowest score of a box.
    """
    found = []
    for outputs in batches:
        with np.errstate(all="ignore"):  # a damaged network may answer NaN or infinity; such boxes are left out
            boxes, scores, classes = head.read(outputs)
        for image_boxes, image_scores, image_classes in zip(boxes, scores, classes, strict=True):
            high = image_scores >= least
            image = detections_of(image_boxes[high], image_scores[high], image_classes[high])
            found.append(suppress(image, head.overlap))
    return found


def above(found: Sequence[Detections], least: float = REFERENCE_SCORE) -> list[Detections]:
    """Return the boxes with a score of at least `least`, image by image."""
    kept = []
    for item in found:
        count = int((item.scores >= least).sum())  # they go from the highest score down
        kept.append(Detections(item.boxes[:count], item.scores[:count], item.classes[:count]))
    return kept
