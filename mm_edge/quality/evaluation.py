"""Runs deployed models on images and compares their answers with labels and with the dense network's answers.

Agreement is the fraction of images on which two models put the same class first. The divergence (divergences.py) is
the mean over images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from mm_edge.arrays import Float32Array, IntArray
from mm_edge.errors import JobError, first_line
from mm_edge.quality.divergences import divergence_per_row, log_softmax
from mm_edge.quality.intervals import accuracy_interval, compare_right, drop_interval
from mm_edge.runtime import in_order, model_name, open_session

__all__ = [
    "Evaluation",
    "Judgement",
    "Reference",
    "compare_logits",
    "divergence_per_row",
    "interval_of",
    "judge_logits",
    "log_softmax",
    "open_session",
    "run_onnx",
]


@dataclass(frozen=True)
class Evaluation:
    """How a model did on `count` images; None where there was nothing to compare with."""

    accuracy_top1: float | None
    agreement_top1: float | None
    kl_to_dense: float | None
    count: int


@dataclass(frozen=True)
class Reference:
    """What the dense network answers on the validation images.

    Attributes:
        labels: the labels of the images (n,); None without any.
        logits: its answers (n, classes); None where there are none to compare with.
        accuracy: its own top-1 accuracy.
    """

    labels: IntArray | None = None
    logits: Float32Array | None = None
    accuracy: float | None = None


class Judgement(TypedDict):
    """The fields of a candidate that validation images decide."""

    accuracy_top1: float | None
    accuracy_drop: float | None
    agreement_top1: float | None
    kl_to_dense: float | None
    accuracy_ci: NotRequired[tuple[float, float] | None]
    drop_ci: NotRequired[tuple[float, float] | None]


def judge_logits(logits: Float32Array, reference: Reference) -> Judgement:
    """Compare a candidate's answers (n, classes) on the validation images with the labels and the dense network's."""
    found = compare_logits(logits, reference.labels, reference.logits)
    return {
        "accuracy_top1": found.accuracy_top1,
        "accuracy_drop": _drop(reference.accuracy, found.accuracy_top1),
        "agreement_top1": found.agreement_top1,
        "kl_to_dense": found.kl_to_dense,
        "accuracy_ci": interval_of(found.accuracy_top1, found.count),
        "drop_ci": _drop_interval(logits, reference),
    }


def interval_of(accuracy: float | None, count: int) -> tuple[float, float] | None:
    """Return the 95 % interval of an accuracy measured on `count` images; None where there is no accuracy."""
    return None if accuracy is None else accuracy_interval(round(accuracy * count), count)


def _drop_interval(logits: Float32Array, reference: Reference) -> tuple[float, float] | None:
    """Return the 95 % interval of the loss in points; None without labels or answers of the dense network."""
    if reference.labels is None or reference.logits is None or not len(logits):
        return None
    return drop_interval(*compare_right(logits, reference.logits, reference.labels))


def _drop(dense: float | None, accuracy: float | None) -> float | None:
    """Return by how many points of 100 the accuracy is below the dense network's."""
    return None if dense is None or accuracy is None else 100 * (dense - accuracy)


def run_onnx(
    model: Path | bytes,
    batches: Iterable[tuple[Float32Array, IntArray]],
    threads: int,
    on_images: Callable[[int], None] | None = None,
) -> Float32Array:
    """Return the first output for every image, (images, classes), from ONNX Runtime on the CPU.

    A model made for a fixed batch is fed that many images at a time, to `threads` threads at once. `on_images` is told
    of each batch done.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
        JobError: it failed while running.
    """
    session = open_session(model)
    feed = session.get_inputs()[0]
    fixed = feed.shape[0] if isinstance(feed.shape[0], int) else None
    output = session.get_outputs()[0].name
    dtype = np.float16 if feed.type == "tensor(float16)" else np.float32

    def run_one(piece: tuple[Float32Array, int]) -> Float32Array:
        images, used = piece
        try:
            scores = session.run([output], {feed.name: images.astype(dtype, copy=False)})[0]
        except Exception as error:  # ONNX Runtime's own exception types have no common base
            raise JobError(f"ONNX Runtime failed on {model_name(model)}: {first_line(error)}") from error
        return np.asarray(scores, dtype=np.float32)[:used]

    found: list[Float32Array] = []
    for images, _ in batches:
        found += in_order(run_one, _pieces(images, fixed), threads)
        if on_images is not None:
            on_images(len(images))
    return np.concatenate(found) if found else np.zeros((0, 0), dtype=np.float32)


def compare_logits(logits: Float32Array, labels: IntArray | None, dense_logits: Float32Array | None) -> Evaluation:
    """Compare logits (n, classes) with labels (n,) and with the dense model's logits (n, classes).

    An image with a NaN or infinite logit counts as wrong and as disagreement, and leaves the divergence None.
    """
    finite = np.isfinite(logits).all(axis=1)
    predicted = np.where(finite, logits.argmax(axis=1) if logits.size else 0, -1)
    if len(logits) == 0:
        return Evaluation(None, None, None, 0)
    accuracy = None if labels is None else float((predicted == labels).mean())
    if dense_logits is None:
        return Evaluation(accuracy, None, None, len(logits))
    agreement = float((predicted == dense_logits.argmax(axis=1)).mean())
    usable = bool(finite.all() and np.isfinite(dense_logits).all())
    # Rounding can leave -1e-17 for equal logits.
    divergence = max(0.0, float(divergence_per_row(dense_logits, logits).mean())) if usable else None
    return Evaluation(accuracy, agreement, divergence, len(logits))


def _pieces(images: Float32Array, fixed: int | None) -> Iterator[tuple[Float32Array, int]]:
    """Cut a batch to the `fixed` size a model takes, the last piece filled up; with each, how many images count."""
    size = fixed or len(images)
    for start in range(0, len(images), size):
        piece = images[start : start + size]
        used = len(piece)
        if fixed and used < fixed:
            piece = np.concatenate([piece, np.repeat(piece[-1:], fixed - used, axis=0)])
        yield piece, used
