"""Scores and ranges of a run, from gradient passes over calibration images, which are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from mm_edge.arrays import Float32Array, Float32Arrays, in_order_of_fields
from mm_edge.graph.layers import read_layer_weights
from mm_edge.load.models import LoadedModel
from mm_edge.plan.ranges import observed_ranges, rule_ranges
from mm_edge.plan.scores import (
    GRASP_IMAGES,
    Batch,
    Scores,
    gradients,
    hessian_gradient_products,
    projected_gradients,
    score_weights,
)
from mm_edge.plan.signals import need_gradient, pick_one, without_gradient
from mm_edge.records import Layer, SparsityRange
from mm_edge.run.job import IMAGES_PER_BATCH, Job
from mm_edge.run.networks import Network
from mm_edge.run.request import Request
from mm_edge.runtime import release_memory

# E2 asks for 5-10 % of the training data; beyond this many images the gradient's ranking no longer changes.
GRADIENT_IMAGES = 1024
# Two images of 224 x 224. With 32 of them EfficientNet-Lite0 holds 2.8 GB of activations and is no faster per image.
GRADIENT_PIXELS = 2 * 224 * 224


def read_ranges(
    source: str,
    layers: tuple[Layer, ...],
    family: str,
    weights: Mapping[str, Float32Array],
    gradient: Mapping[str, Float32Array] | None = None,
    products: Mapping[str, Float32Array] | None = None,
) -> dict[str, SparsityRange]:
    """Return the ranges of one source, a name in request.RANGES, before constraints."""
    if source == "observed":
        return observed_ranges(layers, weights, gradient, products)
    return rule_ranges(layers, family)


def channel_signals(request: Request) -> tuple[str, ...]:
    """Return the signals that structured candidates are made by.

    Where the closed form chooses the channels, signals lead to the same networks: one of them is enough.
    """
    return request.signals if request.select == "signal" else (pick_one(request.signals),)


def signals_needed(request: Request) -> tuple[str, ...]:
    """Return the signals that decide anything; one is enough where the closed form chooses every channel."""
    return channel_signals(request) if set(request.kinds) == {"structured"} else request.signals


def needs_gradient(request: Request) -> bool:
    """Whether weights are scored, or ranges observed, by gradients."""
    return need_gradient(signals_needed(request)) or request.ranges == "observed"


def _note_idle_signals(job: Job) -> None:
    """Note the signals that change nothing."""
    request = job.request
    used = channel_signals(request)
    idle = [name for name in request.signals if name not in used]
    if not idle or "structured" not in request.kinds:
        return
    spared = "" if need_gradient(signals_needed(request)) else "; no gradient is taken"
    verb = "changes" if len(idle) == 1 else "change"
    job.note(
        f"{' and '.join(idle)} {verb} nothing in structured candidates, because --select {request.select} "
        f"chooses their channels{spared}: each network is made once and carries all its names; "
        "--select signal makes one per signal"
    )


def score_network(job: Job, dense: Network) -> tuple[Scores, dict[str, SparsityRange]]:
    """Return the scores of the signals that decide something and can be computed, and the ranges before constraints."""
    weights = read_layer_weights(dense.raw, dense.layers)
    gradient: Float32Arrays = {}
    _note_idle_signals(job)
    signals = signals_needed(job.request)
    if needs_gradient(job.request):
        gradient = _gradients(job)
        if not gradient:
            signals = without_gradient(signals)
    with job.stages.stage("scores"):
        scores = score_weights(weights, gradient, signals)
    products = _products(job, dense.layers) if job.request.ranges == "observed" and gradient else None
    bounds = read_ranges(job.request.ranges, dense.layers, job.model.family, weights, gradient or None, products)
    return scores, bounds


def _gradients(job: Job) -> Float32Arrays:
    """Return the gradients over the calibration images, which are stored; empty without a module or images."""
    if job.model.module is None:
        job.note("a network given as .onnx has no gradients: signal magnitude only")
        return {}
    if job.data is None or not len(job.data.calibration):
        job.note("no calibration images: signal magnitude only; give --data PATH for the other signals")
        return {}
    supervised = job.loss is not None or (job.model.info.num_classes is not None and job.data.labelled)
    key = job.key(data=job.data_key, images=GRADIENT_IMAGES, **({} if supervised else {"loss": "projections"}))
    key |= _loss_key(job)
    stored = job.store.load_arrays("gradients", key)
    if stored is None:
        images = job.data.calibration.take(GRADIENT_IMAGES)
        loss = None if job.loss is None else job.loss.on(images)
        take = partial(gradients, loss=loss) if supervised else projected_gradients
        with job.stages.stage("gradients") as advance:
            found = take(job.model.module, _Batches(images, _gradient_batch(job.model)), job.request.seed, advance)
        stored = found.values
        job.store.save_arrays("gradients", key, stored)
        release_memory()
    return stored


def _products(job: Job, layers: tuple[Layer, ...]) -> Float32Arrays:
    """Return GraSP's Hessian-gradient products, which are stored."""
    assert job.model.module is not None and job.data is not None
    key = job.key(data=job.data_key, images=GRASP_IMAGES) | _loss_key(job)
    stored = job.store.load_arrays("hessian_gradients", key)
    if stored is None:
        taken = job.data.calibration.take(GRASP_IMAGES)
        images, loss = _Batches(taken, _gradient_batch(job.model)), None if job.loss is None else job.loss.on(taken)
        names = [layer.fqn for layer in layers]
        with job.stages.stage("hessian-gradient products") as advance:
            stored = hessian_gradient_products(job.model.module, images, names, job.request.seed, advance, loss)
        job.store.save_arrays("hessian_gradients", key, stored)
    return stored


def _loss_key(job: Job) -> dict[str, str]:
    return {} if job.loss is None else {"loss": f"{job.loss.code.rpartition(':')[2]} {job.loss.digest}"}


class _Batches:
    """Calibration images as the batches of tensors that scoring reads."""

    def __init__(self, images: Any, size: int) -> None:
        self._images = images
        self._size = size

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self._images.batches(self._size):
            given = tuple(torch.from_numpy(array) for array in in_order_of_fields(images))
            known = torch.from_numpy(labels) if self._images.labels is not None else None
            yield given if len(given) > 1 else given[0], known

    def __len__(self) -> int:
        return -(-len(self._images) // self._size)


def _gradient_batch(model: LoadedModel) -> int:
    """Return how many images a backward pass holds at once: GRADIENT_PIXELS bounds the activations kept for it."""
    if model.family == "ExportedProgram":
        return 1  # the batch it was exported for
    _, height, width = model.input.shape
    return max(1, min(IMAGES_PER_BATCH, GRADIENT_PIXELS // (height * width)))
