"""Recovery without training (E9, recipe A): a consumer's weights are re-solved for the inputs that survive.

With W0 the dense weights on the kept columns, h what the pruned network reads and y what the consumer should put out:

    D  = Cov(y - W0 h, h) [Cov(h, h) + lambda mean(diag) I]^-1,      W' = W0 + D,      b' = b + E[y] - W' E[h]

so that lambda pulls toward the dense weights, not toward zero. To screen a candidate, h is the kept part of the dense
network's own inputs t and y - W0 h = W_removed t_removed: only t's covariance is needed, which one pass gives for all
candidates. To finish one, the pruned network is walked from input to output: h comes from it as recovered so far, and
y is the dense block's output less the student's own skip connection. Each consumer then takes whichever of the
screened weights, the walked ones, gently walked ones and the dense ones has the lowest divergence on held-back images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mm_edge.evaluate import compare_logits
from mm_edge.export import RawGraph
from mm_edge.graph.axes import Axis, BoolArray
from mm_edge.graph.compact import Keep, apply_mask, mask_tensors
from mm_edge.graph.groups import Group, Structure
from mm_edge.recover.consumers import Consumer, read_consumers
from mm_edge.recover.moments import (
    DenseMoments,
    Moments,
    collect_dense,
)
from mm_edge.recover.network import Frontier, Network
from mm_edge.recover.surgeon import RIDGE, Order, Surgeon, damped, order_of

Floats = npt.NDArray[np.float64]
Tensors = dict[str, npt.NDArray[Any]]
Advance = Callable[[int, int], None]

GENTLE = 0.3
HELD_BACK = 0.2
HELD_BACK_MOST = 128


@dataclass(frozen=True)
class RecoveryContext:
    """What all candidates of a run share; built once by `build_context`.

    Attributes:
        raw: the dense graph.
        structure: its coupled groups.
        network: the dense network, ready to run.
        consumers: by the name of their weight.
        images: calibration images (N, C, H, W).
        fitted: numbers of the images that moments come from.
        held_back: numbers of the images that decide.
        dense: the dense network's own moments and block outputs.
        logits: the dense network's answers on the held-back images.
        threads: for ONNX Runtime.
        orders: orders found so far, by group.
    """

    raw: RawGraph
    structure: Structure
    network: Network
    consumers: Mapping[str, Consumer]
    images: npt.NDArray[np.float32]
    fitted: tuple[int, ...]
    held_back: tuple[int, ...]
    dense: DenseMoments
    logits: npt.NDArray[np.float32]
    threads: int = 1
    orders: dict[Axis, Order] = field(default_factory=dict)


@dataclass(frozen=True)
class Recovered:
    """A recovered candidate.

    Attributes:
        tensors: what changed, dense-shaped and masked, by name: weights, biases, running means.
        keep: the indices that stay; other ones than planned where brain surgeon chose them.
        notes: what was decided.
        kl_held_back: divergence from the dense network on the held-back calibration images, nats.
    """

    tensors: Tensors
    keep: Keep
    notes: tuple[str, ...]
    kl_held_back: float | None


def build_context(
    raw: RawGraph,
    structure: Structure,
    images: npt.NDArray[np.float32],
    *,
    threads: int = 1,
    progress: Advance | None = None,
) -> RecoveryContext:
    """Run the dense network once over the calibration `images` (N, C, H, W) and keep what all candidates need."""
    network = Network(raw.model.clone())
    consumers = {
        item.weight: item for item in read_consumers(raw, network) if can_lose_columns(structure, item)
    }
    held = min(int(HELD_BACK * len(images)), HELD_BACK_MOST)
    fitted = tuple(range(len(images) - held))
    held_back = tuple(range(len(images) - held, len(images)))
    everything = Frontier(network, images, range(len(images)))
    dense = collect_dense(network, tuple(consumers.values()), everything, fitted, threads, progress)
    logits = answers(network, everything, held_back, threads)
    return RecoveryContext(raw, structure, network, consumers, images, fitted, held_back, dense, logits, threads)


def can_lose_columns(structure: Structure, consumer: Consumer) -> bool:
    """Return whether a group takes columns of the consumer's weight."""
    axis = structure.tensor_axes[consumer.weight][consumer.in_axis]
    table = structure.table
    return any(table.size(leaf) > 1 and table.pin_reason(leaf) is None for leaf in table.leaves(axis))


def answers(
    network: Network, frontier: Frontier, images: Iterable[int], threads: int = 1
) -> npt.NDArray[np.float32]:
    """Return the network's first output for some images, (images, classes)."""
    (output, *_) = network.outputs
    rows = [values[output] for _, values in frontier.run(network, (output,), tuple(images), threads)]
    return np.concatenate([row.reshape(-1, row.shape[-1]) for row in rows])


def divergence(context: RecoveryContext, network: Network, frontier: Frontier) -> float:
    """Return the mean KL(dense || network) on the held-back images, infinite where an answer is not finite."""
    found = compare_logits(answers(network, frontier, context.held_back, context.threads), None, context.logits)
    return float("inf") if found.kl_to_dense is None else found.kl_to_dense


# ---- which indices stay


def readers_of(context: RecoveryContext, group: Group) -> list[tuple[Consumer, npt.NDArray[np.int64]]]:
    """Return the consumers that have moments and read `group`, each with the columns of every index.

    Columns are (indices, columns per index). A consumer in which an index reaches nothing, or which has independent
    blocks (a depthwise convolution carries the group through), is left out.
    """
    found = []
    for item in group.slices:
        consumer = context.consumers.get(item.tensor)
        if consumer is None or item.axis != consumer.in_axis or consumer.groups > 1:
            continue
        if consumer.node not in context.dense.moments:
            continue
        per_position = math.prod(context.network.arrays[item.tensor].shape[2:])
        columns = [
            (np.flatnonzero(item.coordinates == index)[:, None] * per_position + np.arange(per_position)).reshape(-1)
            for index in range(group.size)
        ]
        if len({len(part) for part in columns}) == 1 and len(columns[0]):
            found.append((consumer, np.stack(columns)))
    return found


def energy_order(context: RecoveryContext, group: Group) -> Order | None:
    """Return the order by the weights that read an index, |W_j|^2, the least first; None where nothing reads it.

    Late in a network, where calibration images cover few classes, it generalises better than brain surgeon.
    """
    readers = readers_of(context, group)
    if not readers:
        return None
    energy = np.zeros(group.size)
    for consumer, columns in readers:
        weight = consumer.matrix(context.network.arrays[consumer.weight])[0]
        energy += (weight[:, columns] ** 2).sum(axis=(0, 2)) / max(float((weight**2).sum()), 1e-30)
    removed = np.argsort(energy, kind="stable")
    return Order(removed, np.cumsum(energy[removed]))


def surgeon_order(context: RecoveryContext, group: Group) -> Order | None:
    """Return the order in which brain surgeon removes the indices of `group`; None where nothing reads it."""
    if group.leaf not in context.orders:
        readers = readers_of(context, group)
        if not readers:
            return None
        surgeons = [
            Surgeon(
                consumer.matrix(context.network.arrays[consumer.weight])[0],
                context.dense.moments[consumer.node].covariance[0],
                columns,
            )
            for consumer, columns in readers
        ]
        context.orders[group.leaf] = order_of(surgeons, group.size)
    return context.orders[group.leaf]


# ---- solving


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
    groups = rows.any(axis=1)
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


def screen(context: RecoveryContext, keep: Keep, ridges: Mapping[str, float | None] | None = None) -> Tensors:
    """Return recovered tensors (dense-shaped, masked) from the dense network's moments alone.

    `ridges` holds lambda by weight; None keeps the dense weights and moves the mean only.
    """
    structure = context.structure
    masks = mask_tensors(structure, keep)
    tensors: Tensors = {}
    for name in masks:
        tensors[name] = apply_mask(context.network.arrays[name], masks[name])
    for consumer in context.consumers.values():
        if consumer.node not in context.dense.moments:
            continue
        dense = context.network.arrays[consumer.weight]
        kept = kept_blocks(structure, consumer, dense.shape, keep)
        if kept.whole:
            continue
        blocks = consumer.matrix(dense)
        moments = screened_moments(context.dense.moments[consumer.node], blocks, kept)
        start = blocks[kept.groups][:, kept.outputs][:, :, kept.columns]
        ridge = (ridges or {}).get(consumer.weight, RIDGE)
        solved, shift = fit(start, moments, np.inf if ridge is None else ridge)
        full = np.zeros_like(blocks)
        full[np.ix_(np.flatnonzero(kept.groups), np.flatnonzero(kept.outputs), np.flatnonzero(kept.columns))] = solved
        tensors[consumer.weight] = consumer.weight_of(full, dense)
        if consumer.shift is not None:
            name = consumer.shift.tensor
            whole = np.zeros((consumer.groups, len(kept.outputs)))
            whole[np.ix_(np.flatnonzero(kept.groups), np.flatnonzero(kept.outputs))] = shift
            base = tensors.get(name, context.network.arrays[name])
            tensors[name] = (base + consumer.shift.sign * whole.reshape(-1)).astype(base.dtype)
    return tensors
