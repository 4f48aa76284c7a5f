"""Divergences: how far a network's answers are from the dense network's, on the same images.

    kl          KL(p || q) = sum_c p_c (log p_c - log q_c),   p, q = softmax of the dense and of the found class scores,
                in nats, the mean over positions
    channels    mean over channels c of  mean over positions of (dense - found)^2 / variance of dense in c,
                the variance over all images and positions; 1 is as far as the mean of the channel would be

Both take arrays (images, positions, channels) and return one value per image, in float64. This module imports NumPy
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Array, Float32Array, Float64Array
from mm_edge.deferred import Deferred  # noqa: F401  for entries whose function lies in another module

# Numbers that are turned into float64 at a time.
CHUNK = 1 << 22
# The least variance that is divided by: a channel that never changes must not change.
LEAST_VARIANCE = 1e-12


@dataclass(frozen=True)
class Divergence:
    """One measure of how far answers are apart; 0 for equal answers.

    Attributes:
        help: what it is, in a few words.
        unit: what it is counted in.
        fits: whether it applies to outputs of a shape (images first).
        per_image: takes the dense and the found answers (images, positions, channels), both finite, and returns one
            value per image.
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


def kl_per_image(dense: Float32Array, found: Float32Array) -> Float64Array:
    """Return the mean over positions of KL(dense || found), (images,); the channels are class scores."""
    rows = [array.reshape(-1, array.shape[-1]) for array in (dense, found)]
    step = max(1, CHUNK // dense.shape[-1])
    pieces = [kl_per_row(rows[0][at : at + step], rows[1][at : at + step]) for at in range(0, len(rows[0]), step)]
    return np.asarray(np.concatenate(pieces).reshape(len(dense), -1).mean(axis=1))


def channel_error(dense: Float32Array, found: Float32Array) -> Float64Array:
    """Return each image's squared error over the variance of the channel, the mean over channels, (images,)."""
    variance = np.maximum(dense.reshape(-1, dense.shape[-1]).var(axis=0, dtype=np.float64), LEAST_VARIANCE)
    errors = [((own - other) ** 2).mean(axis=0, dtype=np.float64) for own, other in zip(dense, found, strict=True)]
    return np.asarray((np.stack(errors) / variance).mean(axis=1))


def _any_shape(shape: tuple[int, ...]) -> bool:
    return True


def _is_class_scores(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2


# From the general to the specific: the last that fits an output is taken.
DIVERGENCES: dict[str, Divergence] = {
    "channels": Divergence(
        "squared error over the channel's variance", "shares of the variance", _any_shape, channel_error
    ),
    "kl": Divergence("KL from the dense network's softmax", "nats", _is_class_scores, kl_per_image),
}


def divergence_for(shape: tuple[int, ...]) -> Divergence:
    """Return the divergence for outputs of a shape (images first): the last entry of DIVERGENCES that fits it."""
    return next(item for item in reversed(DIVERGENCES.values()) if item.fits(shape))


def divergence_per_image(dense: Float32Array, found: Float32Array) -> Float64Array:
    """Return the divergence of outputs `found` from `dense` for every image, by the measure that fits their shape.

    Both have the images first; of more than two axes the second holds the channels.
    """
    return divergence_for(dense.shape).per_image(_channels_last(dense), _channels_last(found))


def error_per_image(dense: Float32Array, found: Float32Array) -> Float64Array:
    """Return `channel_error` of outputs (images, channels, ...), (images,)."""
    return channel_error(_channels_last(dense), _channels_last(found))


def _channels_last(outputs: Float32Array) -> Float32Array:
    """Return outputs (images, channels, ...) as (images, positions, channels)."""
    return np.moveaxis(outputs.reshape(len(outputs), outputs.shape[1], -1), 1, 2)
