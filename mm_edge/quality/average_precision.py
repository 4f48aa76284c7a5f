"""Mean average precision of detected boxes, as the COCO benchmark defines it.

A detected box counts as right where it overlaps an expected box of its class, which no box of a higher score has
taken, by an IoU of at least t. Precision is the share of right boxes among those above a score, recall the share of
expected boxes that were found; average precision is the precision, made non-increasing in recall and averaged over the
recalls 0, 0.01, ..., 1. Its mean over the classes that are expected at all is mAP: mAP50 at t = 0.5, and mAP over the
t = 0.5, 0.55, ..., 0.95.

The computation is that of pycocotools (Lin et al., Microsoft COCO, ECCV 2014).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_edge.quality.boxes import MOST, Detections


@dataclass(frozen=True)
class AveragePrecision:
    """mAP at an IoU of 0.5 and over 0.5 to 0.95, fractions; `boxes` is the number of expected boxes."""

    map50: float
    map: float
    boxes: int


def average_precision(found: Sequence[Detections], expected: Sequence[Detections]) -> AveragePrecision | None:
    """Return the mean average precision of the boxes found in some images; None where none are expected.

    Args:
        found: what was detected, one entry per image, down to low scores: the curve needs them.
        expected: what should have been, one entry per image in the same order. Scores are not used.
    """
    assert len(found) == len(expected)
    count = sum(len(item) for item in expected)
    if count == 0:
        return None
    classes = sorted({int(label) for item in expected for label in item.classes})
    precision = _precisions(_annotations(found), _annotations(expected), len(expected), classes)
    # pycocotools divides by slightly more than the number of boxes: equal boxes come to 1 - 2e-16.
    return AveragePrecision(round(float(precision[0].mean()), 9), round(float(precision.mean()), 9), count)


def _precisions(found: list[Any], expected: list[Any], images: int, classes: list[int]) -> Any:
    """Return the precision at every IoU, recall and class, (10, 101, classes)."""
    # Imported here: the module takes a third of a second, and only detectors need it.
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        sides = []
        for annotations in (expected, found):
            side = COCO()
            side.dataset = {
                "images": [{"id": image} for image in range(images)],
                "categories": [{"id": label} for label in classes],
                "annotations": annotations,
            }
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, iouType="bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, np.inf]], ["all"]
        evaluation.params.maxDets = [MOST]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, 0]


def _annotations(items: Sequence[Detections]) -> list[dict[str, Any]]:
    """Return boxes as pycocotools wants them; an id of 0 would count as no match."""
    found: list[dict[str, Any]] = []
    for image, item in enumerate(items):
        for box, score, label in zip(item.boxes, item.scores, item.classes, strict=True):
            left, top, width, height = box[0], box[1], box[2] - box[0], box[3] - box[1]
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [float(left), float(top), float(width), float(height)],
                    "area": float(width * height),
                    "score": float(score),
                    "iscrowd": 0,
                }
            )
    return found
