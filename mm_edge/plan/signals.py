"""Signals: how much each weight matters, by the name users type with --signals.

With w a weight and g = the sum over images of dL/dw, L the cross entropy:

    E1 magnitude   S = |w|
    E2 gradient    S = |g|
    E3 product     S = |w g|

Higher scores mean keep. Scores are divided by their mean over the layer afterwards (scores.py), for every signal alike.
This module imports nothing heavy, so that the command line can name signals without PyTorch.

Source: arXiv 2603.20280 (E1-E3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mm_edge.deferred import Deferred  # noqa: F401  for entries whose function lies in another module

if TYPE_CHECKING:
    from mm_edge.arrays import Float32Array


@dataclass(frozen=True)
class Signal:
    """One way to score weights.

    Attributes:
        help: what it is, in a few words, for --help.
        needs_gradient: whether it needs the summed gradient of the loss.
        score: the raw score of every weight of one layer, from the weight and its gradient (None where it needs none),
            arrays of one shape.
    """

    help: str
    needs_gradient: bool
    score: Callable[[Float32Array, Float32Array | None], Float32Array]


def magnitude(weight: Float32Array, gradient: Float32Array | None) -> Float32Array:
    """E1: |w|."""
    return abs(weight)


def gradient_size(weight: Float32Array, gradient: Float32Array | None) -> Float32Array:
    """E2: |g|."""
    assert gradient is not None
    return abs(gradient)


def product(weight: Float32Array, gradient: Float32Array | None) -> Float32Array:
    """E3: |w g|."""
    assert gradient is not None
    return abs(weight * gradient)


SIGNALS: dict[str, Signal] = {
    "magnitude": Signal("the size of the weight", False, magnitude),
    "gradient": Signal("the size of the loss's gradient by the weight", True, gradient_size),
    "product": Signal("the product of both", True, product),
}

# What is scored by where the signals asked for need gradients and there are none.
WITHOUT_GRADIENT = "magnitude"


def need_gradient(signals: Iterable[str]) -> bool:
    """Return whether any of the named signals needs gradients."""
    return any(SIGNALS[name].needs_gradient for name in signals)


def pick_one(signals: Sequence[str]) -> str:
    """Return the signal to score by where one is enough: the first of the named ones that needs no gradient."""
    return next((name for name in signals if not SIGNALS[name].needs_gradient), signals[0])


def without_gradient(signals: Iterable[str]) -> tuple[str, ...]:
    """Return those of the named signals that need no gradient; magnitude where all need one."""
    return tuple(name for name in signals if not SIGNALS[name].needs_gradient) or (WITHOUT_GRADIENT,)
