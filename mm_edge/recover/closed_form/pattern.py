"""Recovery of an n:m candidate without training: what the pattern removes is made good by the weights it keeps.

The pattern removes single weights, not inputs, so every output has its own kept set S. With H the covariance of the
dense network's own inputs (the formula at the top of semi_structured.py),

    w'_S = w_S + (H_SS + r I)^-1 H_SR w_R,        b' = b + (w - w') E[h]        (E9)

A layer without a bias to move takes the uncentred second moment for H instead. One pass over the dense network serves
all candidates; held-back images decide whether the result is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Arrays, BoolArray
from mm_edge.graph.partial import Frontier
from mm_edge.plan.n_m import compensate
from mm_edge.recover.closed_form.consumers import Consumer
from mm_edge.recover.closed_form.context import RecoveryContext, is_better, judge, pruned_network, rescale


@dataclass(frozen=True)
class PatternRecovery:
    """The changed tensors by name (empty where masking alone is no worse) and how many layers were solved."""

    tensors: Arrays
    layers: int


def recover_pattern(context: RecoveryContext, masks: Mapping[str, BoolArray]) -> PatternRecovery:
    """Return the weights and biases that make good what `masks` (by weight name, as stored) remove."""
    masked = {name: np.where(mask, context.network.arrays[name], 0).astype(np.float32) for name, mask in masks.items()}
    solved: Arrays = dict(masked)
    count = 0
    for name, mask in masks.items():
        consumer = context.consumers.get(name)
        if consumer is not None and consumer.node in context.dense.moments:
            _solve_layer(context, consumer, mask, solved)
            count += 1
    frontier = Frontier(context.network, context.images, context.held_back)
    before, after = (judge(context, pruned_network(context, {}, item), frontier) for item in (masked, solved))
    if not is_better(after, before):
        return PatternRecovery({}, 0)
    return PatternRecovery(rescale(context, {}, solved, after.scale), count)


def _solve_layer(context: RecoveryContext, consumer: Consumer, mask: BoolArray, tensors: Arrays) -> None:
    """Solve one layer and put its weight, and its bias where it has one, into `tensors`."""
    dense = context.network.arrays[consumer.weight]
    moments = context.dense.moments[consumer.node]
    blocks, kept = consumer.matrix(dense), consumer.matrix(mask.astype(np.float32)) > 0.5
    second = moments.covariance
    if consumer.shift is None:
        second = second + moments.mean[:, :, None] * moments.mean[:, None, :]
    rows = [
        compensate(block.astype(np.float32), moment, keep)
        for block, moment, keep in zip(blocks, second, kept, strict=True)
    ]
    solved = np.stack(rows).astype(np.float64)
    tensors[consumer.weight] = consumer.weight_of(solved, dense)
    if consumer.shift is not None:
        name = consumer.shift.tensor
        moved = ((blocks - solved) @ moments.mean[:, :, None])[:, :, 0].reshape(-1)
        tensors[name] = consumer.shift.moved(tensors.get(name, context.network.arrays[name]), moved)
