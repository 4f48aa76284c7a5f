"""Divergences: how far a network's answers are from the dense network's, on the same images.

    kl    KL(p || q) = sum_c p_c (log p_c - log q_c),   p, q = softmax of the dense and of the found logits

in nats, in float64. This module imports NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Array, Float32Array, Float64Array
from mm_edge.deferred import Deferred  # noqa: F401  for entries whose function lies in another module


@dataclass(frozen=True)
class Divergence:
    """One measure of how far answers are apart; 0 for equal answers.

    Attributes:
        help: what it is, in a few words.
        unit: what it is counted in.
        fits: whether it applies to outputs of a shape (images first).
        per_image: takes the dense and the found outputs, of one shape and finite, and returns one value per image.
    """

    help: str
    unit: str
    fits: Callable[[tuple[int, ...]], bool]
    per_image: Callable[[Float32Array, Float32Array], Float64Array]


def kl_per_row(dense: Float32Array, found: Float32Array) -> Float64Array:
    """Return KL(dense || found) of every row of two sets of finite logits (n, classes), in nats."""
    log_p, log_q = log_softmax(dense), log_softmax(found)
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=1))


def log_softmax(logits: Array) -> Float64Array:
    """Return the logarithm of the softmax of every row (n, classes)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), dtype=np.float64)


def _any_shape(shape: tuple[int, ...]) -> bool:
    return True


# From the general to the specific: the last that fits an output is taken.
DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence("KL from the dense network's softmax", "nats", _any_shape, kl_per_row),
}


def divergence_for(shape: tuple[int, ...]) -> Divergence:
    """Return the divergence for outputs of a shape (images first): the last entry of DIVERGENCES that fits it."""
    return next(item for item in reversed(DIVERGENCES.values()) if item.fits(shape))


def divergence_per_row(dense: Float32Array, found: Float32Array) -> Float64Array:
    """Return the divergence of `found` from `dense` for every image, by the measure that fits their shape."""
    return divergence_for(dense.shape).per_image(dense, found)
