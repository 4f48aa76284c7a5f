"""How far a pruned network's answers are from the dense network's, on the images held back from every moment.

    d_i = mean over views of mean over kinds of  divergence(dense answers to image i, answers of the pruned network)

Views and kinds are those of graph/answers.py. Where class scores alone are compared, the pruned network's are
multiplied by s, one positive number for the whole network, the one that makes the mean of d_i least. The last layer can
take such a factor into its weight and bias at no cost, so two networks are compared after each got its own best s.
Otherwise a network with the right classes and too large a confidence, as on smaller pictures, would rank below one
with wrong classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Arrays, Float32Array, Float64Array
from mm_edge.graph.answers import AnswerKind
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import apply_mask, mask_tensors
from mm_edge.graph.partial import Frontier, RunnableGraph
from mm_edge.quality.divergences import DIVERGENCES, Divergence, divergence_for, log_softmax
from mm_edge.recover.closed_form.context import AnswerArrays, RecoveryContext, answers

# A new solution counts as better from so many standard errors of the mean gain on.
CAUTION = 0.5
# Bounds of the scale; the most steps of its search; the change at which the search ends; the longest step.
SCALES = (0.2, 5.0)
SCALE_STEPS = 20
SCALE_STEP = 1e-3
SCALE_LEAP = 0.3
# Of more class scores than SCALED_MOST, as a text recogniser has, the scale is searched for on rows with about
# SCALED_SAMPLE: the search passes over them up to SCALE_STEPS times in float64.
SCALED_MOST = 1 << 22
SCALED_SAMPLE = 1 << 19


@dataclass(frozen=True)
class Judged:
    """How far a network is from the dense one on the held-back images.

    Attributes:
        divergences: of each image, with the answers multiplied by `scale`; in nats for class scores alone, else in
            shares of the channels' variance; infinite where an answer is not finite.
        scale: the factor that makes their mean least; 1 where no layer can take a factor.
    """

    divergences: Float64Array
    scale: float

    @property
    def mean(self) -> float:
        """The mean divergence, never negative: rounding can leave -1e-17."""
        return max(0.0, float(self.divergences.mean()))


def judge(context: RecoveryContext, graph: RunnableGraph, frontier: Frontier) -> Judged:
    """Return how far `graph` is from the dense network; `frontier` holds its values for the held-back images."""
    return judge_answers(context, answers(graph, context.judged, frontier, context.held_back, context.threads))


def judge_answers(context: RecoveryContext, found: AnswerArrays) -> Judged:
    """Return how far the answers `found` to the held-back images are from the dense network's.

    There is one array (images, positions, channels) per kind of `context.judged`.
    """
    if not all(np.isfinite(array).all() for array in found):
        return Judged(np.full(len(context.held_back), np.inf), 1.0)
    scale = _best_scale(context, found)
    if scale != 1.0:
        found = tuple(array * np.float32(scale) for array in found)
    pairs = zip(context.judged.kinds, context.answers, found, strict=True)
    by_kind = {kind: measure_of(kind).per_image(dense, own) for kind, dense, own in pairs}
    views = [np.mean([by_kind[kind] for kind in view], axis=0) for view in context.judged.views]
    return Judged(np.asarray(np.mean(views, axis=0)), scale)


def measure_of(kind: AnswerKind) -> Divergence:
    """Return the divergence that a kind of answers is compared by."""
    return DIVERGENCES[kind.divergence] if kind.divergence else divergence_for(kind.shape)


def _best_scale(context: RecoveryContext, found: AnswerArrays) -> float:
    if not context.answering:
        return 1.0
    step = math.ceil(found[0].size / SCALED_SAMPLE) if found[0].size > SCALED_MOST else 1
    dense, scores = (array.reshape(-1, array.shape[-1])[::step] for array in (context.answers[0], found[0]))
    return best_scale(dense, scores)


def divergence(context: RecoveryContext, graph: RunnableGraph, frontier: Frontier) -> float:
    """Return the mean divergence that `judge` finds."""
    return judge(context, graph, frontier).mean


def is_better(new: Judged, old: Judged) -> bool:
    """Return whether the divergences fell by more than `CAUTION` standard errors, image by image."""
    if not np.isfinite(new.divergences).all():
        return False
    gain = old.divergences - new.divergences
    return bool(gain.mean() > CAUTION * gain.std() / math.sqrt(len(gain)))


def best_scale(wanted: Float32Array, found: Float32Array) -> float:
    """Return the s within SCALES that makes the mean of KL(softmax(wanted) || softmax(s found)) least.

    `wanted` and `found` are logits (rows, classes). The mean is convex in s: its slope is the mean of E_q[z] - E_p[z]
    and its curvature the mean of Var_q[z], with z the answers `found`, p = softmax(wanted) and q = softmax(s z).

    This is Newton's method with bisection: a step that would leave the interval in which the slope changes its sign is
    replaced by the middle of that interval. Newton's method alone can jump between two points for ever where q turns
    into a one-hot vector for all rows at nearly the same s.
    """
    z = found.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    goal = float((np.exp(log_softmax(wanted)) * z).sum(axis=1).mean())
    scale, low, high = 1.0, -math.inf, math.inf
    for _ in range(SCALE_STEPS):
        q = np.exp(log_softmax(scale * z))
        mean = (q * z).sum(axis=1)
        slope = float(mean.mean()) - goal
        curvature = float(((q * z**2).sum(axis=1) - mean**2).mean())
        low, high = (low, scale) if slope > 0 else (scale, high)
        before, step = scale, np.clip(slope / max(curvature, 1e-12), -SCALE_LEAP, SCALE_LEAP)
        scale = float(np.clip(before - step, *SCALES))
        if abs(scale - before) < SCALE_STEP:
            break
        if not low < scale < high:
            scale = (low + high) / 2
    return scale


def rescale(context: RecoveryContext, keep: Keep, tensors: Arrays, scale: float) -> Arrays:
    """Return `tensors` (dense-shaped, masked) with the last layer's weight and bias multiplied by `scale`.

    A scale within SCALE_STEP of 1 changes nothing: `tensors` themselves come back.
    """
    if abs(scale - 1.0) < SCALE_STEP:
        return tensors
    masks = mask_tensors(context.structure, keep)
    found = dict(tensors)
    for name in context.answering:
        array = tensors[name] if name in tensors else apply_mask(context.graph.arrays[name], masks.get(name))
        found[name] = (np.asarray(array, dtype=np.float64) * scale).astype(array.dtype)
    return found
