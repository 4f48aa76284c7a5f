"""Boxes of objects: how they overlap, and which of those that show the same object stay.

    IoU(a, b) = area(a and b) / area(a or b)

Non-maximum suppression goes through the boxes of one class from the highest score down and leaves out each that
overlaps a box that stays by more than a limit. This module imports NumPy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Array, Float64Array, IntArray

# Boxes per image that go into suppression, and that come out of it. Detectors are evaluated with 100 to 300.
MOST_BEFORE, MOST = 3000, 300


@dataclass(frozen=True)
class Detections:
    """The objects in one image, from the highest score down.

    Attributes:
        boxes: left, top, right and bottom in pixels of the network's input, (n, 4).
        scores: how sure the network is, 0 to 1, (n,).
        classes: index of the class, (n,).
    """

    boxes: Float64Array
    scores: Float64Array
    classes: IntArray

    def __len__(self) -> int:
        """Return how many objects there are."""
        return len(self.scores)


def detections_of(boxes: Array, scores: Array, classes: Array) -> Detections:
    """Return the finite boxes that have an area, from the highest score down; equal scores stay in their order."""
    boxes, scores = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(scores, np.float64).reshape(-1)
    usable = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
    usable &= (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    chosen = np.flatnonzero(usable)
    chosen = chosen[np.argsort(-scores[chosen], kind="stable")]
    return Detections(boxes[chosen], scores[chosen], np.asarray(classes, np.int64).reshape(-1)[chosen])


def corners_of_centred(boxes: Array) -> Float64Array:
    """Return (..., 4) boxes of centre x, centre y, width and height as left, top, right and bottom."""
    boxes = np.asarray(boxes, np.float64)
    centre, half = boxes[..., :2], boxes[..., 2:4] / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def overlaps(boxes: Float64Array, others: Float64Array) -> Float64Array:
    """Return the IoU of every box (n, 4) with every other (m, 4), (n, m); 0 where neither has an area."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = np.prod(np.clip(high - low, 0, None), axis=2)
    either = _areas(boxes)[:, None] + _areas(others)[None] - both
    return np.asarray(np.divide(both, either, out=np.zeros_like(both), where=either > 0))


def suppress(found: Detections, limit: float | None, most: int = MOST) -> Detections:
    """Return what non-maximum suppression leaves of each class, `most` boxes at the most.

    Args:
        found: boxes of one image, from the highest score down.
        limit: the largest IoU that two boxes of a class may have; None leaves out none for its overlap.
        most: how many boxes stay, those of the highest scores.
    """
    if limit is None:
        return _take(found, np.arange(min(len(found), most)))
    found = _take(found, np.arange(min(len(found), MOST_BEFORE)))
    stays: list[int] = []
    for label in np.unique(found.classes):
        stays += _suppress_class(found, np.flatnonzero(found.classes == label), limit, most)
    return _take(found, np.sort(np.asarray(stays, np.int64))[:most])


def _suppress_class(found: Detections, members: IntArray, limit: float, most: int) -> list[int]:
    """Return the indices of the boxes of one class that stay; `members` go from the highest score down."""
    stays: list[int] = []
    while len(members) and len(stays) < most:
        first, members = members[0], members[1:]
        stays.append(int(first))
        members = members[overlaps(found.boxes[first : first + 1], found.boxes[members])[0] <= limit]
    return stays


def _take(found: Detections, indices: IntArray) -> Detections:
    return Detections(found.boxes[indices], found.scores[indices], found.classes[indices])


def _areas(boxes: Float64Array) -> Float64Array:
    return np.asarray(np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1))
