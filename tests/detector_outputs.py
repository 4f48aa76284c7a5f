"""Outputs of detectors in every layout, made from boxes: what a network that sees these boxes would answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mm_edge.arrays import Array

SIZE = (64, 96)
# Left, top, right, bottom, score and class of the boxes in three images.
Box = tuple[float, float, float, float, float, int]
IMAGES: list[list[Box]] = [
    [(8, 8, 24, 40, 0.9, 0), (48, 16, 88, 48, 0.6, 2)],
    [(30, 10, 60, 50, 0.8, 1)],
    [(4, 20, 44, 60, 0.7, 2), (50, 4, 90, 30, 0.5, 0), (60, 34, 84, 62, 0.4, 1)],
]
CLASSES = 3


def centred(box: Box) -> list[float]:
    left, top, right, bottom = box[:4]
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def grid(strides: tuple[int, ...] = (8, 16, 32)) -> tuple[Array, Array]:
    """Return column, row and stride of every cell (A, 3), counted on their own, and the cells' centres (A, 2)."""
    cells = [(x, y, s) for s in strides for y in range(SIZE[0] // s) for x in range(SIZE[1] // s)]
    found = np.array(cells, np.float64)
    return found, (found[:, :2] + 0.5) * found[:, 2:]


def _anchors(repeats: int = 1) -> tuple[Array, Array, list[list[int]]]:
    """Return background boxes (A, 4) and scores (A, C) of an image, and the anchor nearest to every box."""
    _, centres = grid()
    centres = np.tile(centres, (repeats, 1))
    boxes = np.concatenate([centres, np.full((len(centres), 2), 12.0)], axis=1)
    scores = np.full((len(centres), CLASSES), 0.001)
    chosen = [[int(np.abs(centres - centred(box)[:2]).sum(axis=1).argmin()) for box in image] for image in IMAGES]
    return boxes, scores, chosen


def _rows(objectness: bool, repeats: int = 1) -> Array:
    """Return (N, A, 4 + C) or (N, A, 5 + C)."""
    boxes, scores, chosen = _anchors(repeats)
    found = []
    for image, indices in zip(IMAGES, chosen, strict=True):
        own_boxes, own_scores, sure = boxes.copy(), scores.copy(), np.full((len(boxes), 1), 0.002)
        for box, index in zip(image, indices, strict=True):
            own_boxes[index] = centred(box)
            # Scores of 0.5 and more are the product of an objectness of 0.9 and a class's score.
            sure[index] = 0.9 if objectness else 1
            own_scores[index, box[5]] = box[4] / sure[index, 0]
        found.append(np.concatenate([own_boxes, *([sure] if objectness else []), own_scores], axis=1))
    return np.stack(found).astype(np.float32)


def yolo() -> dict[str, Array]:
    return {"output0": np.ascontiguousarray(_rows(False).transpose(0, 2, 1))}


def yolo_shares() -> dict[str, Array]:
    rows = _rows(False)
    rows[..., :4] /= np.array([SIZE[1], SIZE[0], SIZE[1], SIZE[0]], np.float32)
    return {"output0": np.ascontiguousarray(rows.transpose(0, 2, 1))}


def yolo_with_masks() -> dict[str, Array]:
    rows = _rows(False)
    more = np.random.default_rng(0).normal(size=(*rows.shape[:2], 8)).astype(np.float32)
    columns = np.concatenate([rows, more], axis=2).transpose(0, 2, 1)
    return {"output0": columns, "output1": np.ones((len(IMAGES), 8, 16, 24), np.float32)}


def yolo_anchors() -> dict[str, Array]:
    return {"output": _rows(True, repeats=3)}


def yolox_decoded() -> dict[str, Array]:
    return {"output": _rows(True)}


def yolox() -> dict[str, Array]:
    rows, (cells, _) = _rows(True), grid()
    rows[..., :2] = rows[..., :2] / cells[:, 2:] - cells[:, :2]
    rows[..., 2:4] = np.log(rows[..., 2:4] / cells[:, 2:])
    return {"output": rows}


def ssd() -> dict[str, Array]:
    """Corners as shares of the image, and a softmax with the background first."""
    rows = _rows(False)
    scores = np.concatenate([1 - rows[..., 4:].sum(axis=2, keepdims=True), rows[..., 4:]], axis=2)
    half = rows[..., 2:4] / 2
    corners = np.concatenate([rows[..., :2] - half, rows[..., :2] + half], axis=2)
    return {"scores": scores, "boxes": corners / np.array([SIZE[1], SIZE[0]] * 2, np.float32)}


def ssd_pixels() -> dict[str, Array]:
    """Corners in pixels, and independent probabilities without a background."""
    outputs = ssd()
    return {"b": outputs["boxes"] * np.array([SIZE[1], SIZE[0]] * 2, np.float32), "s": outputs["scores"][..., 1:]}


def _queries() -> tuple[Array, Array]:
    generator = np.random.default_rng(0)
    boxes = generator.uniform(0.3, 0.6, (len(IMAGES), 20, 4)).astype(np.float32)
    scores = np.full((len(IMAGES), 20, CLASSES), 0.001, np.float32)
    for image, entry in enumerate(IMAGES):
        for query, box in enumerate(entry):
            boxes[image, query] = np.array(centred(box)) / [SIZE[1], SIZE[0], SIZE[1], SIZE[0]]
            scores[image, query, box[5]] = box[4]
    return boxes, scores


def detr() -> dict[str, Array]:
    """Logits whose softmax has the class without an object last."""
    boxes, scores = _queries()
    probabilities = np.concatenate([scores, 1 - scores.sum(axis=2, keepdims=True)], axis=2)
    return {"pred_logits": np.log(probabilities) + 3, "pred_boxes": boxes}


def detr_sigmoid() -> dict[str, Array]:
    boxes, scores = _queries()
    return {"pred_logits": np.log(scores / (1 - scores)), "pred_boxes": boxes}


def _heat(stride: int, flip: bool, half: float, logarithm: bool) -> dict[str, Array]:
    shape = (len(IMAGES), CLASSES, SIZE[0] // stride, SIZE[1] // stride)
    heat = np.full(shape, 0.01, np.float32)
    sides = np.full((shape[0], 2, *shape[2:]), 1.0 if logarithm else 24.0, np.float32)
    offset = np.zeros_like(sides)
    for image, entry in enumerate(IMAGES):
        for box in entry:
            x, y, width, height = (value / stride for value in centred(box))
            i, j = int(y), int(x)
            heat[image, box[5], i, j] = box[4]
            pair = np.log([width, height]) if logarithm else np.array([width, height])
            sides[image, :, i, j] = pair[::-1] if flip else pair
            rest = np.array([x - j - half, y - i - half])
            offset[image, :, i, j] = rest[::-1] if flip else rest
            # A neighbour that is no peak.
            heat[image, box[5], i, j + 1] = box[4] - 0.1
    return {
        "heat": heat,
        "sides": sides,
        "offset": offset,
        "marks": np.ones((shape[0], 10, *shape[2:]), np.float32) * 2,
    }


def heat_map() -> dict[str, Array]:
    return _heat(4, flip=False, half=0, logarithm=False)


def face_heat_map() -> dict[str, Array]:
    return _heat(4, flip=True, half=0.5, logarithm=True)


def _padded() -> tuple[Array, Array, Array]:
    boxes, scores = np.zeros((len(IMAGES), 10, 4), np.float32), np.zeros((len(IMAGES), 10), np.float32)
    classes = np.zeros((len(IMAGES), 10), np.float32)
    for image, entry in enumerate(IMAGES):
        for place, box in enumerate(entry):
            boxes[image, place], scores[image, place], classes[image, place] = box[:4], box[4], box[5]
    return boxes, scores, classes


def rows() -> dict[str, Array]:
    boxes, scores, classes = _padded()
    return {"output0": np.concatenate([boxes, scores[..., None], classes[..., None]], axis=2)}


def post_processed() -> dict[str, Array]:
    boxes, scores, classes = _padded()
    for image, entry in enumerate(IMAGES):
        scores[image, len(entry) :] = 0.99  # beyond the number of boxes: it stands for nothing
        boxes[image, len(entry) :] = [1, 1, 5, 5]
    number = np.array([len(entry) for entry in IMAGES], np.int64)
    return {"boxes": boxes, "scores": scores, "labels": classes.astype(np.int64), "number": number}


def post_processed_rows_first() -> dict[str, Array]:
    boxes, scores, classes = _padded()
    shares = boxes / np.array([SIZE[1], SIZE[0]] * 2, np.float32)
    names = ("detection_boxes", "detection_scores", "detection_classes")
    made = dict(zip(names, (shares[..., [1, 0, 3, 2]], scores, classes), strict=True))
    return {**made, "detection_anchor_indices": np.tile(np.arange(10, dtype=np.float32), (len(IMAGES), 1))}


LAYOUTS: dict[str, list[Callable[[], dict[str, Array]]]] = {
    "yolo-anchors": [yolo_anchors],
    "yolo": [yolo, yolo_shares, yolo_with_masks],
    "yolox": [yolox, yolox_decoded],
    "rows": [rows],
    "post-processed": [post_processed, post_processed_rows_first],
    "heat-map": [heat_map, face_heat_map],
    "ssd": [ssd, ssd_pixels],
    "detr": [detr, detr_sigmoid],
}
