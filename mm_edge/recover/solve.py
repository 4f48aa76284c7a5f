"""A consumer's weights re-solved for the inputs that survive (E9, recipe A).

With W0 the dense weights on the kept columns, h what the pruned network reads and y what the consumer should put out:

    D  = Cov(y - W0 h, h) [Cov(h, h) + lambda mean(diag) I]^-1,      W' = W0 + D,      b' = b + E[y] - W' E[h]

so that lambda pulls toward the dense weights, not toward zero. To screen a candidate, h is the kept part of the dense
network's own inputs t, and y - W0 h = W_removed t_removed: one pass over the dense network serves all candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mm_edge.graph.axes import BoolArray
from mm_edge.graph.compact import Keep, apply_mask, mask_tensors
from mm_edge.graph.groups import Structure
from mm_edge.recover.consumers import Consumer
from mm_edge.recover.context import RecoveryContext, Tensors
from mm_edge.recover.moments import Moments
from mm_edge.recover.surgeon import RIDGE, damped

Floats = npt.NDArray[np.float64]

GENTLE = 0.3


@dataclass(frozen=True)
class KeptBlocks:
    """What a candidate keeps of a consumer: groups, outputs within a group, columns within a group."""

    groups: BoolArray
    outputs: BoolArray
    columns: BoolArray

    @property
    def whole(self) -> bool:
        """Whether no column is removed."""
        return bool(self.columns.all())


def kept_blocks(structure: Structure, consumer: Consumer, shape: tuple[int, ...], keep: Keep) -> KeptBlocks:
    """Return what `keep` leaves of a consumer whose dense weight has `shape`."""
    axes = structure.kept(consumer.weight, keep)
    rows = axes[1 - consumer.in_axis].reshape(consumer.groups, -1)
    groups: BoolArray = np.asarray(rows.any(axis=1))
    per_position = int(np.prod(shape[2:], dtype=np.int64))
    outputs = rows[int(np.argmax(groups))]
    return KeptBlocks(groups, outputs, np.repeat(axes[consumer.in_axis], per_position))


def fit(weight: Floats, moments: Moments, ridge: float) -> tuple[Floats, Floats]:
    """Return W' (G, O, K) and E[y] - W' E[h] (G, O) from moments paired with wanted outputs; `weight` is W0."""
    assert moments.cross is not None and moments.wanted is not None
    if np.isinf(ridge):
        return weight, moments.wanted - (weight @ moments.mean[:, :, None])[:, :, 0]
    missing = moments.cross - moments.covariance @ weight.transpose(0, 2, 1)
    change = np.linalg.solve(damped(moments.covariance, ridge), missing).transpose(0, 2, 1)
    solved = weight + change
    return solved, moments.wanted - (solved @ moments.mean[:, :, None])[:, :, 0]


def screened_moments(dense: Moments, weight: Floats, kept: KeptBlocks) -> Moments:
    """Return the moments of the kept part of the dense inputs, paired with the dense outputs W t."""
    covariance, mean = dense.covariance[kept.groups], dense.mean[kept.groups]
    rows = weight[kept.groups][:, kept.outputs]
    outputs = rows @ covariance[:, :, kept.columns]
    return Moments(
        mean[:, kept.columns],
        covariance[:, kept.columns][:, :, kept.columns],
        outputs.transpose(0, 2, 1),
        (rows @ mean[:, :, None])[:, :, 0],
    )


def screen(
    context: RecoveryContext,
    keep: Keep,
    ridges: Mapping[str, float] | None = None,
    base: Tensors | None = None,
    only: Iterable[str] | None = None,
) -> Tensors:
    """Return recovered tensors (dense-shaped, masked) from the dense network's moments alone.

    Args:
        context: the run's.
        keep: the indices that stay, by group.
        ridges: lambda by weight, infinite to move the mean only; RIDGE where none is given.
        base: an earlier result to change, when only the weights in `only` read something else than then.
        only: the weights to solve for; all without.
    """
    structure = context.structure
    masks = mask_tensors(structure, keep)
    wanted = set(context.consumers if only is None else only)
    shifted = {item.shift.tensor for name, item in context.consumers.items() if name in wanted and item.shift}
    tensors: Tensors = {}
    for name, mask in masks.items():
        before = (base or {}).get(name)
        fresh = before is None or name in wanted or name in shifted
        tensors[name] = apply_mask(context.network.arrays[name] if fresh else before, mask)  # type: ignore[arg-type]
    for name, array in (base or {}).items():
        if name not in wanted and name not in shifted:
            tensors.setdefault(name, array)
    for name in sorted(wanted):
        consumer = context.consumers[name]
        if consumer.node in context.dense.moments:
            _screen_consumer(context, consumer, keep, (ridges or {}).get(name, RIDGE), tensors)
    return tensors


def _screen_consumer(context: RecoveryContext, consumer: Consumer, keep: Keep, ridge: float, tensors: Tensors) -> None:
    """Solve one consumer from the dense moments and put what changes into `tensors`."""
    dense = context.network.arrays[consumer.weight]
    kept = kept_blocks(context.structure, consumer, dense.shape, keep)
    if kept.whole:
        return
    blocks = consumer.matrix(dense)
    moments = screened_moments(context.dense.moments[consumer.node], blocks, kept)
    start = blocks[kept.groups][:, kept.outputs][:, :, kept.columns]
    solved, shift = fit(start, moments, ridge)
    groups, outputs, columns = (np.flatnonzero(part) for part in (kept.groups, kept.outputs, kept.columns))
    full = np.zeros_like(blocks)
    full[np.ix_(groups, outputs, columns)] = solved
    tensors[consumer.weight] = consumer.weight_of(full, dense)
    if consumer.shift is not None:
        name = consumer.shift.tensor
        whole = np.zeros((consumer.groups, len(kept.outputs)))
        whole[np.ix_(groups, outputs)] = shift
        current = tensors.get(name, context.network.arrays[name])
        tensors[name] = (current + consumer.shift.sign * whole.reshape(-1)).astype(current.dtype)
