"""The learning rate of gradient steps: a linear rise, then half a cosine down to zero.

    rate(t) = peak (t + 1) / w                                   for t < w
    rate(t) = peak (1 + cos(pi (t - w) / (steps - w))) / 2       for t >= w

It is a function of the step alone. torch's SequentialLR of LinearLR and CosineAnnealingLR has the same shape, but it
computes a rate from the one before, so that a resumed run would have to store that as well.
"""

from __future__ import annotations

import math


def rise_and_fall(step: int, steps: int, warm_up: int, peak: float = 1.0) -> float:
    """Return the learning rate of `step`, from 0, of `steps`, of which the first `warm_up` rise to `peak`."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2
