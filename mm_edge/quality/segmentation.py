"""The class of every pixel that a segmenter answers, and how like other classes they are.

    IoU of a class = pixels that both give the class / pixels that either gives it        over all images
    mIoU           = mean of IoU over the classes that are expected in some pixel

A segmenter's output is recognised by its shape and by its values on some images:

    argmax      (N, C, h, w) or (N, h, w, C)   the class of the highest value; probabilities that sum to 1, or values
                                               whose highest class is the same in neighbouring pixels
    threshold   (N, 1, h, w)                   class 1 from 0.5 on where all values lie in [0, 1], from 0 on otherwise;
                                               most values are far from the threshold, on both sides of it
    classes     (N, h, w) or (N, 1, h, w)      whole numbers: the classes themselves
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Array, Float64Array, IntArray

# Marks pixels without a class in masks.
IGNORED = -1
MOST_CLASSES = 1000
COARSEST = 8  # pixels of the input, along each side, that a pixel of the output may stand for
SMOOTH = 0.85  # share of neighbouring pixels with the same class
CERTAIN = 0.8  # share of values far from the threshold: probabilities outside [0.1, 0.9]
SEEN = 0.001  # least share of the pixels on either side of a threshold


@dataclass(frozen=True)
class Segmenter:
    """How classes are read from an output.

    Attributes:
        output: its name.
        axis: the axis of the classes; None where the values are classes.
        threshold: the least value of class 1, for outputs with one channel.
        size: height and width of the output in pixels.
    """

    output: str
    axis: int | None
    threshold: float | None
    size: tuple[int, int]

    def read(self, outputs: Mapping[str, Array]) -> IntArray:
        """Return the class of every pixel, (N, h, w); NaN counts as class 0."""
        values = np.nan_to_num(np.asarray(outputs[self.output]), nan=-np.inf)
        if self.axis is None:
            return _to_classes(values.reshape(len(values), *values.shape[-2:]))
        if self.threshold is None:
            return np.asarray(values.argmax(axis=self.axis), np.int64)
        return np.asarray(values.take(0, axis=self.axis) >= self.threshold, np.int64)


def find_segmenter(outputs: Mapping[str, Array], size: tuple[int, int], is_told: bool = False) -> Segmenter | None:
    """Return how to read the first of the outputs for some images of `size` that holds a class per pixel, or None.

    Where the user's labels are masks, the network `is_told` to be a segmenter, and the shape of an output is enough.
    """
    for name, output in outputs.items():
        array = np.asarray(output)
        if array.dtype.kind not in "fiu" or not array.size or not np.isfinite(array).all():
            continue
        found = (
            _find_classes(name, array, size) or _find_threshold(name, array, size) or _find_argmax(name, array, size)
        )
        if found is not None:
            return found
    shaped = (_find_by_shape(name, np.asarray(output), size) for name, output in outputs.items() if is_told)
    return next((found for found in shaped if found is not None), None)


def class_maps(segmenter: Segmenter, batches: Iterable[Mapping[str, Array]]) -> list[IntArray]:
    """Return the class of every pixel for batches of outputs, (n, h, w) each."""
    return [segmenter.read(outputs).astype(np.int16) for outputs in batches]


def mean_iou(found: Iterable[Array], expected: Iterable[Array]) -> float | None:
    """Return the mIoU of classes (n, h, w), batch by batch; None where no class is expected.

    Pixels that are IGNORED in `expected` count for nothing.
    """
    both, either, wanted = (np.zeros(0, np.int64) for _ in range(3))
    for ours, right in zip(found, expected, strict=True):
        assert ours.shape == right.shape
        counted = right != IGNORED
        ours, right = ours[counted].astype(np.int64), right[counted].astype(np.int64)
        count = int(max(ours.max(initial=-1), right.max(initial=-1), len(both) - 1)) + 1
        both, either, wanted = (np.pad(item, (0, count - len(item))) for item in (both, either, wanted))
        shared = np.bincount(right[ours == right], minlength=count)
        right_counts = np.bincount(right, minlength=count)
        both, wanted = both + shared, wanted + right_counts
        either = either + right_counts + np.bincount(ours, minlength=count) - shared
    seen = wanted > 0
    return float((both[seen] / either[seen]).mean()) if seen.any() else None


def resize_nearest(classes: Array, size: tuple[int, int]) -> Array:
    """Return classes (..., H, W) at another size (..., h, w): every pixel is the nearest one."""
    for axis, side in zip((-2, -1), size, strict=True):
        length = classes.shape[axis]
        classes = classes.take(np.minimum(((np.arange(side) + 0.5) * length / side).astype(int), length - 1), axis=axis)
    return classes


def _find_classes(name: str, array: Array, size: tuple[int, int]) -> Segmenter | None:
    fits = array.ndim == 3 or (array.ndim == 4 and array.shape[1] == 1)
    if not fits or not _fits(array.shape[-2:], size):
        return None
    whole = array.dtype.kind in "iu" or np.array_equal(array, np.rint(array))
    if not whole or array.min() < 0 or not 0 < array.max() < MOST_CLASSES:
        return None
    height, width = array.shape[-2:]
    return Segmenter(name, None, None, (height, width))


def _find_threshold(name: str, array: Array, size: tuple[int, int]) -> Segmenter | None:
    for axis in (1, 3):
        if array.ndim != 4 or array.shape[axis] != 1 or not _fits(_without(array, axis), size):
            continue
        values = array.astype(np.float64)
        shares = values.min() >= 0 and values.max() <= 1
        threshold, far = (0.5, np.abs(values - 0.5) > 0.4) if shares else (0.0, np.abs(values) > np.log(9))
        share = float((values >= threshold).mean())
        if far.mean() >= CERTAIN and SEEN <= share <= 1 - SEEN:
            return Segmenter(name, axis, threshold, _without(array, axis))
    return None


def _find_argmax(name: str, array: Array, size: tuple[int, int]) -> Segmenter | None:
    for axis in (1, 3):
        if array.ndim != 4 or not 2 <= array.shape[axis] <= MOST_CLASSES or not _fits(_without(array, axis), size):
            continue
        classes = array.argmax(axis=axis)
        if classes.min() == classes.max():
            continue
        if _are_shares(array):
            usable = bool(np.allclose(array.sum(axis=axis, dtype=np.float64), 1, atol=1e-2))
        else:
            usable = _is_smooth(classes) and (array.shape[axis] > 3 or _oppose(array, axis))
        if usable:
            return Segmenter(name, axis, None, _without(array, axis))
    return None


def _find_by_shape(name: str, array: Array, size: tuple[int, int]) -> Segmenter | None:
    for axis in (1, 3):
        if array.ndim == 4 and 1 <= array.shape[axis] <= MOST_CLASSES and _fits(_without(array, axis), size):
            threshold = 0.5 if _are_shares(array) else 0.0
            return Segmenter(name, axis, threshold if array.shape[axis] == 1 else None, _without(array, axis))
    return None


def _without(array: Array, axis: int) -> tuple[int, int]:
    """Return height and width of images whose channels are on `axis`."""
    height, width = (array.shape[2], array.shape[3]) if axis == 1 else (array.shape[1], array.shape[2])
    return height, width


def _fits(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Return whether an output of this height and width covers the input evenly and finely enough."""
    steps = {side / cells for side, cells in zip(size, shape, strict=True)}
    return len(steps) == 1 and 0 < steps.pop() <= COARSEST and min(shape) > 1


def _are_shares(array: Array) -> bool:
    return bool(array.min() >= -1e-3 and array.max() <= 1 + 1e-3)


def _is_smooth(classes: Array) -> bool:
    across, down = classes[:, :, 1:] == classes[:, :, :-1], classes[:, 1:] == classes[:, :-1]
    return bool(across.mean() >= SMOOTH and down.mean() >= SMOOTH)


def _oppose(array: Array, axis: int) -> bool:
    """Return whether channels speak against each other, as classes do and the channels of a picture do not."""
    channels: Float64Array = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)
    return all(float(np.corrcoef(channels[i], channels[j])[0, 1]) < 0 for i in range(len(channels)) for j in range(i))


def _to_classes(values: Array) -> IntArray:
    return np.clip(values, 0, MOST_CLASSES).astype(np.int64)
