"""Recovery of an n:m candidate without training: the kept weights are adjusted for those that the pattern removes.

The pattern removes single weights, not inputs, so every output has a kept set S and a removed set R of its own. With H
the covariance of the dense network's own inputs (plan/n_m.py has the derivation),

    w'_S = w_S + (H_SS + r I)^-1 H_SR w_R,        b' = b + (w - w') E[h]        (E9 in docs/method.md)

For a layer without a bias, H is the second moment E[h h^T] instead. One pass over the dense network serves all
candidates. The result is used only if the held-back images find it better than masking alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Arrays, BoolArray
from mm_edge.graph.partial import Frontier
from mm_edge.plan.n_m import compensate
from mm_edge.recover.closed_form.consumers import Consumer
from mm_edge.recover.closed_form.context import RecoveryContext, pruned_graph
from mm_edge.recover.closed_form.judging import is_better, judge, rescale


@dataclass(frozen=True)
class PatternRecovery:
    """The result of `recover_pattern`.

    Attributes:
        tensors: what changed, as stored in the network, by name; empty if masking alone is no worse.
        layers: how many layers were solved.
    """

    tensors: Arrays
    layers: int


def recover_pattern(context: RecoveryContext, masks: Mapping[str, BoolArray]) -> PatternRecovery:
    """Return the weights and biases that make up for the weights which `masks` remove.

    `masks` are by the name of a weight and in its shape, True where a weight stays.
    """
    masked = {name: np.where(mask, context.graph.arrays[name], 0).astype(np.float32) for name, mask in masks.items()}
    solved: Arrays = dict(masked)
    count = 0
    for name, mask in masks.items():
        consumer = context.consumers.get(name)
        if consumer is not None and consumer.node in context.dense.moments:
            _solve_layer(context, consumer, mask, solved)
            count += 1
    frontier = Frontier(context.graph, context.images, context.held_back)
    before, after = (judge(context, pruned_graph(context, {}, item), frontier) for item in (masked, solved))
    if not is_better(after, before):
        return PatternRecovery({}, 0)
    return PatternRecovery(rescale(context, {}, solved, after.scale), count)


def _solve_layer(context: RecoveryContext, consumer: Consumer, mask: BoolArray, tensors: Arrays) -> None:
    """Solve one layer and put its weight, and its bias where it has one, into `tensors`."""
    dense = context.graph.arrays[consumer.weight]
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
        tensors[name] = consumer.shift.moved(tensors.get(name, context.graph.arrays[name]), moved)
