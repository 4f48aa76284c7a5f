"""Runs deployed models on images and compares their answers with labels and with the dense network's answers.

Agreement is the fraction of images on which two models put the same class first. The divergence (divergences.py) is
the mean over images. The outputs of a network that is no classifier are compared one by one:

    nmse      mean over channels of mean squared error / variance of the dense network's channel (divergences.py)
    cosine    mean over images of  <dense, found> / (|dense| |found|)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from mm_edge.arrays import Float32Array, IntArray, by_input
from mm_edge.errors import JobError, first_line
from mm_edge.quality.answers import AnswerReader, Answers, compare_answers, find_reader
from mm_edge.quality.divergences import divergence_per_image, error_per_image
from mm_edge.quality.intervals import accuracy_interval, compare_right, drop_interval
from mm_edge.records import Fidelity, MetricValue, OutputFidelity
from mm_edge.runtime import in_order, model_name, open_session

__all__ = [
    "Evaluation",
    "Judgement",
    "Reference",
    "compare_logits",
    "interval_of",
    "judge_logits",
    "open_session",
    "run_onnx",
]


# The most bytes of outputs that are held of one network that is no classifier.
OUTPUT_BYTES = 512 << 20
COMPARED_TYPES = tuple(f"tensor({kind})" for kind in ("float", "float16", "int64", "int32", "uint8"))


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
        outputs: the outputs of a network that is no classifier by name, images first; None for a classifier.
        reader: how boxes or classes are read from them; None where they are neither.
        answers: the boxes or classes; None without a reader.
        score: scores boxes or classes by the user's labels; None without these.
        metric: what it gives for the dense network.
    """

    labels: IntArray | None = None
    logits: Float32Array | None = None
    accuracy: float | None = None
    outputs: Mapping[str, Float32Array] | None = None
    reader: AnswerReader | None = None
    answers: Answers | None = None
    score: Callable[[Answers], MetricValue | None] | None = None
    metric: MetricValue | None = None


class Judgement(TypedDict):
    """The fields of a candidate that validation images decide."""

    accuracy_top1: float | None
    accuracy_drop: float | None
    agreement_top1: float | None
    kl_to_dense: float | None
    fidelity: Fidelity | None
    metric: NotRequired[MetricValue | None]
    accuracy_ci: NotRequired[tuple[float, float] | None]
    drop_ci: NotRequired[tuple[float, float] | None]


NOT_JUDGED: Judgement = {
    "accuracy_top1": None,
    "accuracy_drop": None,
    "agreement_top1": None,
    "kl_to_dense": None,
    "fidelity": None,
}


def judge_model(
    model: Path | bytes, batches: Iterable[tuple[Float32Array, IntArray]], reference: Reference, threads: int
) -> Judgement:
    """Run a candidate on the validation images and compare its answers with the labels and the dense network's."""
    if reference.outputs is None:
        return judge_logits(run_onnx(model, batches, threads), reference)
    outputs = run_outputs(model, batches, threads)
    if reference.score is None or reference.reader is None:
        return {**NOT_JUDGED, "fidelity": compare_outputs(outputs, reference)}
    answers = reference.reader.read(outputs)
    fidelity = compare_outputs(outputs, reference, answers)
    return {**NOT_JUDGED, "fidelity": fidelity, "metric": reference.score(answers)}


def refer_to_outputs(
    outputs: Mapping[str, Float32Array], size: tuple[int, int], is_segmenter: bool = False
) -> Reference:
    """Return the reference of a dense network that is no classifier, from its outputs for images of `size` (H, W).

    `is_segmenter` says that the user's labels are masks.
    """
    reader = find_reader(outputs, size, is_segmenter)
    return Reference(outputs=outputs, reader=reader, answers=None if reader is None else reader.read(outputs))


def compare_outputs(
    found: Mapping[str, Float32Array], reference: Reference, answers: Answers | None = None
) -> Fidelity | None:
    """Compare the outputs of a network that is no classifier, by name, with the dense network's.

    `answers` are the boxes or classes in `found`, if these were read already. Nothing is compared of outputs whose
    shapes differ, as at another input size.
    """
    dense = reference.outputs or {}
    if any(name not in found or found[name].shape != own.shape for name, own in dense.items()):
        return None
    # Whole numbers, such as the class of a pixel, have no error; boxes and masks are read from them.
    pairs = {name: (own, found[name]) for name, own in dense.items() if own.dtype.kind == "f"}
    same = {name: _fidelity(own, other) for name, (own, other) in pairs.items()}
    if reference.reader is None or reference.answers is None:
        return Fidelity(same)
    likeness = compare_answers(reference.reader.read(found) if answers is None else answers, reference.answers)
    return Fidelity(same, likeness.map50_to_dense, likeness.map_to_dense, likeness.miou_to_dense, boxes=likeness.boxes)


def _fidelity(dense: Float32Array, found: Float32Array) -> OutputFidelity:
    """Compare one output of two networks (images first)."""
    if not (np.isfinite(dense).all() and np.isfinite(found).all()):
        return OutputFidelity(None, None)
    own, other = (array.reshape(len(array), -1).astype(np.float64) for array in (dense, found))
    lengths = np.linalg.norm(own, axis=1) * np.linalg.norm(other, axis=1)
    cosine = (own * other).sum(axis=1) / np.maximum(lengths, 1e-30)
    return OutputFidelity(float(error_per_image(dense, found).mean()), float(cosine.mean()))


def judge_logits(logits: Float32Array, reference: Reference) -> Judgement:
    """Compare a candidate's answers (n, classes) on the validation images with the labels and the dense network's."""
    found = compare_logits(logits, reference.labels, reference.logits)
    return {
        "accuracy_top1": found.accuracy_top1,
        "accuracy_drop": _drop(reference.accuracy, found.accuracy_top1),
        "agreement_top1": found.agreement_top1,
        "kl_to_dense": found.kl_to_dense,
        "fidelity": None,
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
    output = session.get_outputs()[0].name
    pieces = _run(session, model, batches, [output], threads, on_images)
    found = [rows[output] for rows in pieces if output in rows]
    return np.concatenate(found) if found else np.zeros((0, 0), dtype=np.float32)


def run_outputs(
    model: Path | bytes,
    batches: Iterable[tuple[Float32Array, IntArray]],
    threads: int,
    on_images: Callable[[int], None] | None = None,
) -> dict[str, Float32Array]:
    """Return the outputs for the images by name, each with the images first: float32, or whole numbers.

    Images are run until the outputs fill OUTPUT_BYTES. Outputs whose shape depends on the image, or that do not have
    the images first, are left out.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
        JobError: it failed while running.
    """
    session = open_session(model)
    names = [item.name for item in session.get_outputs() if item.type in COMPARED_TYPES]
    found: dict[str, list[Float32Array]] = {name: [] for name in names}
    size = pieces = 0
    for rows in _run(session, model, batches, names, threads, on_images):
        for name, array in rows.items():
            found[name].append(array)
            size += array.nbytes
        pieces += 1
        if size > OUTPUT_BYTES:
            break
    whole = {name: rows for name, rows in found.items() if len(rows) == pieces}
    alike = {name: rows for name, rows in whole.items() if len({row.shape[1:] for row in rows}) == 1}
    return {name: np.concatenate(rows) for name, rows in alike.items()}


def _run(
    session: Any,
    model: Path | bytes,
    batches: Iterable[tuple[Float32Array, IntArray]],
    names: Sequence[str],
    threads: int,
    on_images: Callable[[int], None] | None,
) -> Iterator[dict[str, Float32Array]]:
    """Yield the outputs called `names` for some images after the others; `on_images` is told of each batch done."""
    inputs = session.get_inputs()
    fixed = inputs[0].shape[0] if inputs[0].shape and isinstance(inputs[0].shape[0], int) else None
    halves = {item.name for item in inputs if item.type == "tensor(float16)"}

    def run_one(piece: tuple[Float32Array, int]) -> dict[str, Float32Array]:
        images, used = piece
        try:
            given = by_input(images, [item.name for item in inputs])
            feed = {name: array.astype(np.float16) if name in halves else array for name, array in given.items()}
            found = session.run(names, feed)
        except Exception as error:  # ONNX Runtime's own exception types have no common base
            raise JobError(f"ONNX Runtime failed on {model_name(model)}: {first_line(error)}") from error
        # What does not have the images first, such as a list of all boxes found, cannot be told apart by image.
        return {
            name: np.asarray(rows, np.float32 if rows.dtype.kind == "f" else rows.dtype)[:used]
            for name, rows in zip(names, found, strict=True)
            if rows.ndim and len(rows) == len(images)
        }

    for images, _ in batches:
        yield from in_order(run_one, _pieces(images, fixed), threads)
        if on_images is not None:
            on_images(len(images))


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
    divergence = max(0.0, float(divergence_per_image(dense_logits, logits).mean())) if usable else None
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
