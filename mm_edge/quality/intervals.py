"""95 % intervals of accuracies and of their differences.

Top-1, k of n images right: exact (Clopper and Pearson, 1934, Biometrika 26). With X ~ Bin(n, p),

    lo: P(X >= k | lo) = 0.025        hi: P(X <= k | hi) = 0.025

Loss, the same n images read by the dense network and by a candidate: with b images that dense alone reads right and
c that the candidate alone does, loss = (b - c) / n. Its interval holds every D that the score test for paired
proportions does not reject (Tango, 1998, Statistics in Medicine 17, equations 7 to 10):

    z(D) = (b - c - n D) / sqrt(n (2 q + D (1 - D)))         |z(D)| <= 1.96
    q    = (sqrt(B^2 - 8 n C) - B) / (4 n)                   what c / n is under D
    B    = (2 n - b + c) D - b - c        C = -c D (1 - D)

At D = 0 this is McNemar's test. Images that both networks read right or wrong say nothing about which is better, so
the interval is narrower than the difference of two separate intervals.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from mm_edge.arrays import BoolArray, Float32Array, Float64Array, IntArray

TAIL = 0.025
Z = 1.959963984540054  # the normal distribution's quantile at 1 - TAIL
_STEPS = 50  # halvings: more than a double resolves


def accuracy_interval(right: int, count: int) -> tuple[float, float]:
    """Return the exact 95 % interval of an accuracy of which `right` of `count` images are right, as fractions.

    Raises:
        ValueError: there is no image, or more are right than there are.
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"{right} of {count} images cannot be right")
    share = right / count
    lo = 0.0 if right == 0 else _halve(lambda p: _tail(right, count, p) < TAIL, 0.0, share)
    hi = 1.0 if right == count else _halve(lambda p: _tail(count - right, count, 1 - p) > TAIL, share, 1.0)
    return lo, hi


def drop_interval(lost: int, gained: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of the loss of top-1, in points of 100.

    Args:
        lost: images that dense alone reads right.
        gained: images that the candidate alone reads right.
        count: all images that both have read.

    Raises:
        ValueError: there is no image, or more differ than there are.
    """
    if min(lost, gained) < 0 or lost + gained > count or count == 0:
        raise ValueError(f"{lost} lost and {gained} gained of {count} images are impossible")
    middle = (lost - gained) / count
    lo = _halve(lambda loss: _score(lost, gained, count, loss) > Z, -1.0, middle)
    hi = _halve(lambda loss: _score(lost, gained, count, loss) > -Z, middle, 1.0)
    return 100 * lo, 100 * hi


def compare_right(logits: Float32Array, dense_logits: Float32Array, labels: IntArray) -> tuple[int, int, int]:
    """Return how many images dense alone reads right, how many the candidate alone does, and how many there are.

    Args:
        logits: the candidate's answers (n, classes).
        dense_logits: the dense network's (n, classes).
        labels: the true classes (n,).
    """
    own, dense = (_right(answers, labels) for answers in (logits, dense_logits))
    return int((dense & ~own).sum()), int((own & ~dense).sum()), len(labels)


def _right(logits: Float32Array, labels: IntArray) -> BoolArray:
    """Return which images are read right; one with a NaN or infinite answer is not."""
    return np.asarray(np.isfinite(logits).all(axis=1) & (logits.argmax(axis=1) == labels))


def _tail(right: int, count: int, p: float) -> float:
    """Return P(X >= right) for X ~ Bin(count, p) with p <= right / count."""
    # Beyond this many standard deviations nothing is left that a double could hold.
    last = min(count, right + 20 * math.isqrt(count) + 50)
    k = np.arange(right, last + 1)
    factorials = _log_factorials(count)
    ways = factorials[count] - factorials[k] - factorials[count - k]
    return float(np.exp(ways + k * math.log(p) + (count - k) * math.log1p(-p)).sum())


@functools.lru_cache(maxsize=4)
def _log_factorials(count: int) -> Float64Array:
    """Return log(0!), log(1!), ... log(count!)."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])


def _score(lost: int, gained: int, count: int, loss: float) -> float:
    """Return z(D) of the header at D = `loss`; it falls as D grows."""
    linear = (2 * count - lost + gained) * loss - lost - gained
    constant = -gained * loss * (1 - loss)
    alone = (math.sqrt(max(0.0, linear**2 - 8 * count * constant)) - linear) / (4 * count)
    variance = count * (2 * alone + loss * (1 - loss))
    above = lost - gained - count * loss
    if variance <= 0:
        return 0.0 if above == 0 else math.copysign(math.inf, above)
    return above / math.sqrt(variance)


def _halve(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """Return where `is_below`, true up to a point of [low, high] and false beyond it, changes."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if is_below(middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2
