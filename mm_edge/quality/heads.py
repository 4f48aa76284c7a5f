"""The layouts of the outputs of detectors, and how boxes are read from each.

A layout is recognised by the shapes of the outputs and by their values on some images. A layout whose values do not
fit, or that could be read in two ways, is not recognised: a wrong box is worse than none.

    yolo-anchors    (N, A, 5 + C)   cx, cy, w, h, objectness, classes; A = 3 cells     YOLOv5, YOLOv7
    yolo            (N, 4 + C, A)   cx, cy, w, h, classes; A = cells                   YOLOv8, YOLOv9, YOLO11
    yolox           (N, A, 5 + C)   as yolo-anchors with A = cells, or before decoding:
                                    cx = (x + column) s,  cy = (y + row) s,  w = s exp(w),  h = s exp(h)
    ssd             (N, A, 4) and (N, A, C)   decoded boxes, probabilities
    detr            (N, Q, 4) and (N, Q, C)   cx, cy, w, h as shares of the image, logits
    heat-map        (N, K, h, w), (N, 2, h, w) and (N, 2, h, w)   centres, sizes, offsets    CenterNet, CenterFace
    rows            (N, M, 6)       left, top, right, bottom, score, class
    post-processed  (N, M, 4), (N, M) and (N, M)   boxes, scores, classes, perhaps with their number (N,)

`cells` is the number of cells of grids with the strides s = 8, 16, 32 (or those of STRIDES) over the input. Columns
after the classes (mask coefficients, key points) are left out: they are the first that leave [0, 1].

A heat map's box at a peak in row i and column j of a map with stride s = H / h is, with size a, b and offset p, q:

    centre x = (j + p) s,       centre y = (i + q) s,       w = a s,       h = b s          (Zhou et al., 2019)
    centre x = (j + q + 0.5) s, centre y = (i + p + 0.5) s, w = s exp(b),  h = s exp(a)     (CenterFace: logarithms)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from mm_edge.arrays import Array, BoolArray, Float64Array, IntArray
from mm_edge.quality.boxes import corners_of_centred

Outputs = Mapping[str, Array]
Size = tuple[int, int]  # height and width of the network's input in pixels
# Boxes (N, A, 4) as left, top, right and bottom in pixels, scores (N, A) and classes (N, A).
Decoded = tuple[Float64Array, Float64Array, IntArray]

STRIDES = ((8, 16, 32), (4, 8, 16, 32), (8, 16, 32, 64), (16, 32))
ROUNDING = 1e-3  # of probabilities in half precision
PEAK = 0.3  # the least height of a peak by which a heat map is recognised
MOST_ROWS = 1000  # of what a network that suppresses boxes itself gives out


@dataclass(frozen=True)
class Head:
    """A recognised layout.

    Attributes:
        layout: its name in HEADS.
        outputs: the names of the outputs that boxes are read from, in the order `decode` takes them.
        size: height and width of the input.
        overlap: the largest IoU of two boxes of a class; None where the network suppresses boxes itself.
        decode: returns the boxes of a batch from the outputs.
    """

    layout: str
    outputs: tuple[str, ...]
    size: Size
    overlap: float | None
    decode: Callable[..., Decoded]

    def read(self, outputs: Outputs) -> Decoded:
        """Return every box of a batch, before any is left out."""
        return self.decode(*(np.asarray(outputs[name]) for name in self.outputs))


@dataclass(frozen=True)
class Layout:
    """One layout; the names and the decoder are None where the outputs do not have it.

    Attributes:
        help: which detectors have it.
        overlap: the largest IoU of two boxes of a class; None where the network suppresses boxes itself.
        recognise: takes the outputs for some images and the size of the input.
    """

    help: str
    overlap: float | None
    recognise: Callable[[Outputs, Size], tuple[tuple[str, ...], Callable[..., Decoded]] | None]


Found = tuple[tuple[str, ...], Callable[..., Decoded]] | None


def find_head(outputs: Outputs, size: Size) -> Head | None:
    """Return the layout of a detector's `outputs` for some images of `size`; None for other networks' outputs."""
    finite = {name: np.asarray(array) for name, array in outputs.items() if _is_finite(array)}
    for name, layout in HEADS.items():
        found = layout.recognise(finite, size)
        if found is not None:
            return Head(name, found[0], size, layout.overlap, found[1])
    return None


# ---- YOLO


def _yolo_anchors(outputs: Outputs, size: Size) -> Found:
    for name, array in _single(outputs):
        if array.shape[1] in {3 * _cells(size, strides) for strides in STRIDES}:
            count = _leading_scores(array, 5)
            scale = _scale_of_centred(array[..., :4], size)
            if scale is not None and _is_score(array[..., 4]) and (count or array.shape[2] == 5):
                return (name,), partial(_decode_with_objectness, classes=count, scale=scale, size=size)
    return None


def _yolo(outputs: Outputs, size: Size) -> Found:
    for name, array in _single(outputs):
        if array.shape[2] in {_cells(size, strides) for strides in STRIDES}:
            rows = array.transpose(0, 2, 1)
            count, scale = _leading_scores(rows, 4), _scale_of_centred(rows[..., :4], size)
            if scale is not None and count:
                return (name,), partial(_decode_yolo, classes=count, scale=scale, size=size)
    return None


def _yolox(outputs: Outputs, size: Size) -> Found:
    for name, array in _single(outputs):
        for strides in STRIDES:
            if array.shape[1] != _cells(size, strides) or array.shape[2] < 6 or not _is_score(array[..., 4]):
                continue
            count = _leading_scores(array, 5)
            if not count:
                continue
            centres, steps = _grid(size, strides)
            if _is_near(array[..., :2] / steps, centres / steps - 0.5):
                return (name,), partial(_decode_with_objectness, classes=count, scale=np.ones(4), size=size)
            if _is_near(array[..., :2], np.zeros(2)) and array[..., 2:4].max() < np.log(max(size)):
                return (name,), partial(_decode_yolox, classes=count, strides=strides, size=size)
    return None


def _decode_yolo(array: Array, classes: int, scale: Float64Array, size: Size) -> Decoded:
    rows = array.transpose(0, 2, 1)
    scores, labels = _best(rows[..., 4 : 4 + classes])
    return _clip(corners_of_centred(rows[..., :4] * scale), size), scores, labels


def _decode_with_objectness(array: Array, classes: int, scale: Float64Array, size: Size) -> Decoded:
    scores, labels = _best(array[..., 5 : 5 + classes] if classes else np.ones_like(array[..., 4:5]))
    return _clip(corners_of_centred(array[..., :4] * scale), size), scores * array[..., 4], labels


def _decode_yolox(array: Array, classes: int, strides: tuple[int, ...], size: Size) -> Decoded:
    centres, steps = _grid(size, strides)
    # Sizes of a damaged network may be beyond what exp can give; no box is larger than the image.
    sides = steps * np.exp(np.minimum(array[..., 2:4].astype(np.float64), np.log(max(size))))
    boxes = np.concatenate([array[..., :2] * steps + centres - steps / 2, sides, array[..., 4:]], axis=-1)
    return _decode_with_objectness(boxes, classes, np.ones(4), size)


def _leading_scores(rows: Array, start: int) -> int:
    """Return how many columns from `start` on lie in [0, 1], up to the first that does not."""
    inside = [_is_score(rows[..., column]) for column in range(start, rows.shape[-1])]
    return inside.index(False) if False in inside else len(inside)


def _cells(size: Size, strides: tuple[int, ...]) -> int:
    return sum(-(-size[0] // stride) * -(-size[1] // stride) for stride in strides)


def _grid(size: Size, strides: tuple[int, ...]) -> tuple[Float64Array, Float64Array]:
    """Return the centres (A, 2) of all cells in pixels, and the strides (A, 1) of their grids."""
    centres, steps = [], []
    for stride in strides:
        rows, columns = (np.arange(-(-side // stride)) for side in size)
        x, y = np.meshgrid(columns, rows)
        centres.append((np.stack([x.ravel(), y.ravel()], axis=1) + 0.5) * stride)
        steps.append(np.full((x.size, 1), float(stride)))
    return np.concatenate(centres), np.concatenate(steps)


def _is_near(positions: Array, expected: Float64Array) -> bool:
    """Return whether nearly all positions, in cells, are within three cells of where they are expected."""
    return bool((np.abs(positions - expected).max(axis=-1) < 3).mean() > 0.95)


def _single(outputs: Outputs) -> Iterator[tuple[str, Array]]:
    """Yield the outputs (N, A, B) that may hold boxes and scores together; probabilities of classes hold none."""
    for name, array in outputs.items():
        if array.ndim == 3 and array.size and not any(_sums_to_one(array, axis) for axis in (1, 2)):
            yield name, array


# ---- boxes beside scores


def _ssd(outputs: Outputs, size: Size) -> Found:
    matches = [match for pair in _pairs(outputs) if (match := _match_ssd(*pair, size)) is not None]
    return matches[0] if len(matches) == 1 else None


def _match_ssd(box_name: str, score_name: str, boxes: Array, scores: Array, size: Size) -> Found:
    if not _is_score(scores):
        return None
    sums_to_one = scores.shape[2] > 1 and _sums_to_one(scores, 2)
    background = _background(scores) if sums_to_one else None
    if background is None and (sums_to_one or scores.max(axis=2).mean() > 0.5):
        return None
    decode = _box_decoder(boxes, size)
    if decode is None:
        return None
    return (box_name, score_name), partial(_decode_pair, decode=decode, activate=None, background=background)


def _detr(outputs: Outputs, size: Size) -> Found:
    matches = [match for pair in _pairs(outputs) if (match := _match_detr(*pair, size)) is not None]
    return matches[0] if len(matches) == 1 else None


def _match_detr(box_name: str, score_name: str, boxes: Array, logits: Array, size: Size) -> Found:
    if _is_score(logits) or logits.min() >= 0 or not _is_score(boxes) or _sums_to_one(boxes, 2):
        return None
    if _scale_of_centred(boxes, size) is None:
        return None
    decode = partial(_decode_boxes, scale=_shares(size), centred=True, size=size)
    last = logits.shape[2] - 1
    if last > 0 and _softmax(logits)[..., last].mean() > 0.5:
        options = {"activate": _softmax, "background": last}
    elif _sigmoid(logits).max(axis=2).mean() < 0.5:
        options = {"activate": _sigmoid, "background": None}
    else:
        return None
    return (box_name, score_name), partial(_decode_pair, decode=decode, **options)


def _decode_pair(
    boxes: Array,
    scores: Array,
    decode: Callable[[Array], Float64Array],
    activate: Callable[[Array], Float64Array] | None,
    background: int | None,
) -> Decoded:
    scores = _as_rows(scores) if activate is None else activate(_as_rows(scores))
    if background is not None:
        scores = np.delete(scores, background, axis=2)
    best, labels = _best(scores)
    return decode(_as_rows(boxes)), best, labels


def _pairs(outputs: Outputs) -> Iterator[tuple[str, str, Array, Array]]:
    """Yield the names and the arrays of every pair (N, A, 4) and (N, A, C) of outputs."""
    rows = {name: _as_rows(array) for name, array in outputs.items() if array.ndim in (3, 4)}
    for box_name, boxes in rows.items():
        for score_name, scores in rows.items():
            fits = boxes.ndim == scores.ndim == 3 and boxes.shape[:2] == scores.shape[:2] and boxes.size and scores.size
            if box_name != score_name and fits and boxes.shape[2] == 4:
                yield box_name, score_name, boxes, scores


def _as_rows(array: Array) -> Array:
    """Return (N, A, 1, 4), as some exporters write it, without the axis of one."""
    return array[:, :, 0] if array.ndim == 4 and array.shape[2] == 1 else array


def _background(probabilities: Array) -> int | None:
    """Return the class without an object, which is the most likely on average, and the first or the last."""
    best = int(probabilities.mean(axis=(0, 1)).argmax())
    return best if best in (0, probabilities.shape[2] - 1) else None


# ---- heat maps of centres


def _heat_map(outputs: Outputs, size: Size) -> Found:
    maps = {name: array for name, array in outputs.items() if array.ndim == 4 and array.size}
    matches = [match for name in maps if (match := _match_heat_map(name, maps, size)) is not None]
    return matches[0] if len(matches) == 1 else None


def _match_heat_map(name: str, maps: Outputs, size: Size) -> Found:
    heat = maps[name]
    if not _is_score(heat) or _stride(heat, size) is None:
        return None
    pairs = [other for other in maps if other != name and maps[other].shape == (len(heat), 2, *heat.shape[2:])]
    peaks = _peaks(heat).max(axis=1) > PEAK
    if len(pairs) != 2 or not peaks.any():
        return None
    # Offsets stay within a cell; objects are larger.
    spread = {pair: float(np.abs(_at(maps[pair], peaks)).mean()) for pair in pairs}
    offset, sides = sorted(pairs, key=lambda pair: spread[pair])
    if np.abs(_at(maps[offset], peaks)).max() > 1 + ROUNDING or spread[sides] < 2 * spread[offset]:
        return None
    # Sizes in cells reach beyond this somewhere: the logarithm of twice the map's side is about 5.
    logarithms = bool(maps[sides].max() <= np.log(2 * max(heat.shape[2:])))
    return (name, sides, offset), partial(_decode_heat_map, logarithms=logarithms, size=size)


def _decode_heat_map(heat: Array, sides: Array, offset: Array, logarithms: bool, size: Size) -> Decoded:
    stride = _stride(heat, size)
    assert stride is not None  # recognised by it
    rows, columns = np.indices(heat.shape[2:])
    sides, offset = sides.astype(np.float64), offset.astype(np.float64)
    if logarithms:
        # No box is larger than the image, and exp of a damaged network's sizes may be too large for a number.
        height, width = (np.exp(np.minimum(sides[:, axis], np.log(max(size)))) for axis in (0, 1))
        y, x = rows + offset[:, 0] + 0.5, columns + offset[:, 1] + 0.5
    else:
        width, height = sides[:, 0], sides[:, 1]
        x, y = columns + offset[:, 0], rows + offset[:, 1]
    boxes = corners_of_centred(np.stack([x, y, width, height], axis=-1) * stride)
    count, kinds = heat.shape[:2]
    scores = _peaks(heat).reshape(count, kinds, -1)
    best, labels = _best(scores.transpose(0, 2, 1))
    return _clip(boxes.reshape(count, -1, 4), size), best, labels


def _peaks(heat: Array) -> Float64Array:
    """Return the map with 0 everywhere but where a value is the largest of its 3 x 3 neighbours."""
    padded = np.pad(heat.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    height, width = heat.shape[2:]
    around = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.where(heat >= np.maximum.reduce(around), heat, 0).astype(np.float64)


def _at(pair: Array, peaks: BoolArray) -> Array:
    return pair.transpose(0, 2, 3, 1)[peaks]


def _stride(heat: Array, size: Size) -> int | None:
    """Return how many pixels of the input a cell of the map stands for; None where it is no whole number up to 16."""
    strides = {side / cells for side, cells in zip(size, heat.shape[2:], strict=True)}
    stride = strides.pop()
    return int(stride) if not strides and stride in (1, 2, 4, 8, 16) else None


# ---- boxes that the network has suppressed itself


def _rows(outputs: Outputs, size: Size) -> Found:
    for name, array in _single(outputs):
        if array.shape[2] != 6 or array.shape[1] > MOST_ROWS or not _is_score(array[..., 4]):
            continue
        decode = _corner_decoder(array[..., :4], array[..., 4], size)
        if decode is not None and _are_classes(array[..., 5]) and not _are_classes(array[..., 4]):
            return (name,), partial(_decode_rows, decode=decode)
    return None


def _decode_rows(array: Array, decode: Callable[[Array], Float64Array]) -> Decoded:
    return decode(array[..., :4]), array[..., 4].astype(np.float64), _to_classes(array[..., 5])


def _post_processed(outputs: Outputs, size: Size) -> Found:
    matches = []
    for box_name, boxes in outputs.items():
        if boxes.ndim not in (2, 3) or boxes.shape[-1] != 4 or not 0 < boxes.shape[-2] <= MOST_ROWS:
            continue
        beside = {name: array for name, array in outputs.items() if array.shape == boxes.shape[:-1]}
        scores = [name for name, array in beside.items() if _is_score(array) and not _are_classes(array)]
        classes = [name for name, array in beside.items() if _are_classes(array)]
        classes = _prefer(classes, ("class", "label"))
        if len(scores) != 1 or len(classes) != 1:
            continue
        decode = _corner_decoder(boxes, outputs[scores[0]], size, rows_first="detection_boxes" in box_name)
        if decode is not None:
            counts = [name for name, array in outputs.items() if _are_counts(array, boxes)]
            matches.append(((box_name, scores[0], classes[0], *counts[:1]), decode))
    if len(matches) != 1:
        return None
    return matches[0][0], partial(_decode_post_processed, decode=matches[0][1])


def _decode_post_processed(
    boxes: Array, scores: Array, classes: Array, counts: Array | None = None, *, decode: Callable[[Array], Float64Array]
) -> Decoded:
    if boxes.ndim == 2:  # a network that takes one image
        boxes, scores, classes = boxes[None], scores[None], classes[None]
    scores = scores.astype(np.float64)
    if counts is not None:
        beyond = np.arange(scores.shape[1])[None] >= counts.reshape(-1, 1)
        scores = np.where(beyond, 0, scores)
    return decode(boxes), scores, _to_classes(classes)


def _prefer(names: list[str], words: tuple[str, ...]) -> list[str]:
    """Return the names that hold one of the words, if there are any; otherwise all names."""
    return [name for name in names if any(word in name.lower() for word in words)] or names


def _are_classes(array: Array) -> bool:
    """Return whether all values are class indices; entries that stand for nothing may be -1."""
    return bool(array.size and array.min() >= -1 and array.max() < 1e5 and np.array_equal(array, np.rint(array)))


def _are_counts(array: Array, boxes: Array) -> bool:
    """Return whether an output (N,) or (N, 1) says how many of the boxes (N, M, 4) stand for something."""
    fits = boxes.ndim == 3 and array.shape in ((len(boxes),), (len(boxes), 1)) and array.shape != boxes.shape[:-1]
    return fits and _are_classes(array) and bool((array >= 0).all() and array.max() <= boxes.shape[1])


def _to_classes(array: Array) -> IntArray:
    return np.nan_to_num(array, nan=-1, posinf=-1, neginf=-1).astype(np.int64)


# ---- values


def _corner_decoder(
    boxes: Array, scores: Array, size: Size, rows_first: bool = False
) -> Callable[[Array], Float64Array] | None:
    """Return how boxes given as corners become pixels, judged by those that have a score; None where they are none."""
    real = boxes[scores > ROUNDING]
    if not len(real) or not _are_corners(real):
        return None
    scale = _scale(real, size)
    return None if scale is None else partial(_decode_boxes, scale=scale, size=size, rows_first=rows_first)


def _box_decoder(boxes: Array, size: Size) -> Callable[[Array], Float64Array] | None:
    """Return how boxes given as corners, or as centres and sizes, become pixels; None where they are neither."""
    if _are_corners(boxes):
        scale = _scale(boxes, size)
        return None if scale is None else partial(_decode_boxes, scale=scale, size=size)
    scale = _scale_of_centred(boxes, size)
    return None if scale is None else partial(_decode_boxes, scale=scale, centred=True, size=size)


def _decode_boxes(
    boxes: Array, scale: Float64Array, size: Size, centred: bool = False, rows_first: bool = False
) -> Float64Array:
    boxes = boxes[..., [1, 0, 3, 2]] if rows_first else boxes
    found = boxes.astype(np.float64) * scale
    return _clip(corners_of_centred(found) if centred else found, size)


def _are_corners(boxes: Array) -> bool:
    return bool((boxes[..., 2:] >= boxes[..., :2]).all(axis=-1).mean() > 0.999)


def _scale_of_centred(boxes: Array, size: Size) -> Float64Array | None:
    """Return what turns (..., 4) centres and sizes into pixels; None where they are no such boxes."""
    return _scale(boxes, size) if (boxes[..., 2:4] >= 0).mean() > 0.999 and boxes[..., 2:4].max() > 0 else None


def _scale(boxes: Array, size: Size) -> Float64Array | None:
    """Return 1 for coordinates in pixels, the sides of the image for shares of it, None where they are neither.

    Nearly all coordinates must lie within the image and a quarter of it around.
    """
    pixels = _shares(size)
    if np.quantile(np.abs(boxes), 0.99) <= 2:
        return pixels if ((boxes > -0.25) & (boxes < 1.5)).mean() > 0.95 else None
    inside = (boxes[..., :2] > -0.25 * pixels[:2]) & (boxes[..., :2] < 1.25 * pixels[:2])
    return np.ones(4) if inside.mean() > 0.95 and (boxes[..., 2:4] < 2 * pixels[:2]).mean() > 0.95 else None


def _shares(size: Size) -> Float64Array:
    return np.array([size[1], size[0], size[1], size[0]], np.float64)


def _clip(boxes: Float64Array, size: Size) -> Float64Array:
    return np.clip(boxes, 0, _shares(size))


def _is_score(array: Array) -> bool:
    return bool(array.size and array.min() >= -ROUNDING and array.max() <= 1 + ROUNDING)


def _sums_to_one(array: Array, axis: int) -> bool:
    return _is_score(array) and bool(np.allclose(array.sum(axis=axis, dtype=np.float64), 1, atol=1e-2))


def _is_finite(array: Array) -> bool:
    values = np.asarray(array)
    return values.dtype.kind in "fiu" and bool(np.isfinite(values).all())


def _best(scores: Array) -> tuple[Float64Array, IntArray]:
    """Return the highest score (N, A) of every row of (N, A, C), and its class."""
    labels = np.asarray(scores).argmax(axis=-1)
    best = np.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
    return best.astype(np.float64), labels.astype(np.int64)


def _softmax(logits: Array) -> Float64Array:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def _sigmoid(logits: Array) -> Float64Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -500, 500))))


# In the order in which they are tried: what is most particular in its shapes comes first.
HEADS: dict[str, Layout] = {
    "yolo-anchors": Layout("YOLOv5 and YOLOv7, decoded, with objectness", 0.65, _yolo_anchors),
    "yolo": Layout("YOLOv8, YOLOv9 and YOLO11, decoded, without objectness", 0.65, _yolo),
    "yolox": Layout("YOLOX, decoded or not", 0.65, _yolox),
    "rows": Layout("boxes, scores and classes in one output, suppressed by the network", None, _rows),
    "post-processed": Layout("boxes, scores and classes, suppressed by the network", None, _post_processed),
    "heat-map": Layout("centre heat maps with sizes and offsets", 0.45, _heat_map),
    "ssd": Layout("decoded boxes beside probabilities", 0.45, _ssd),
    "detr": Layout("boxes of queries beside logits", None, _detr),
}
