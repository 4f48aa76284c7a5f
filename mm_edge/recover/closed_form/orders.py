"""Who reads a group of channels, and in which order the group's indices are removed.

Two orders are offered. Optimal brain surgeon (surgeon.py) knows how inputs vary together. The energy order,

    e(j) = sum over readers of |W_j|^2 / |W|^2,          the least first,

looks at weights only; it generalises better late in a network, where calibration images cover few of the classes.
"""

from __future__ import annotations

import math

import numpy as np

from mm_edge.graph.groups import Group
from mm_edge.recover.closed_form.context import Readers, RecoveryContext
from mm_edge.recover.closed_form.surgeon import Order, Surgeon, order_of


def readers_of(context: RecoveryContext, group: Group) -> Readers:
    """Return the consumers that read `group` and have moments, each with the columns that belong to every index.

    The columns are an array (indices, columns per index). A consumer is left out if some index of the group reaches no
    column of it, or if it has several independent blocks: a depthwise convolution passes the group on instead of
    reading it.
    """
    if group.leaf not in context.readers:
        context.readers[group.leaf] = _find_readers(context, group)
    return context.readers[group.leaf]


def _find_readers(context: RecoveryContext, group: Group) -> Readers:
    found = []
    for item in group.slices:
        consumer = context.consumers.get(item.tensor)
        if consumer is None or item.axis != consumer.in_axis or consumer.groups > 1:
            continue
        if consumer.node not in context.dense.moments:
            continue
        per_position = math.prod(context.graph.arrays[item.tensor].shape[2:])
        columns = [
            (np.flatnonzero(item.coordinates == index)[:, None] * per_position + np.arange(per_position)).reshape(-1)
            for index in range(group.size)
        ]
        if len({len(part) for part in columns}) == 1 and len(columns[0]):
            found.append((consumer, np.stack(columns)))
    return found


def energy_order(context: RecoveryContext, group: Group) -> Order | None:
    """Return the order by the energy of the weights that read an index; None where nothing reads the group."""
    readers = readers_of(context, group)
    if not readers:
        return None
    energy = np.zeros(group.size)
    for consumer, columns in readers:
        weight = consumer.matrix(context.graph.arrays[consumer.weight])[0]
        energy += (weight[:, columns] ** 2).sum(axis=(0, 2)) / max(float((weight**2).sum()), 1e-30)
    removed = np.argsort(energy, kind="stable")
    return Order(removed, np.cumsum(energy[removed]))


def surgeon_order(context: RecoveryContext, group: Group) -> Order | None:
    """Return the order in which brain surgeon removes the indices of `group`; None where nothing reads the group."""
    if group.leaf not in context.orders:
        readers = readers_of(context, group)
        if not readers:
            return None
        surgeons = [
            Surgeon(
                consumer.matrix(context.graph.arrays[consumer.weight])[0],
                context.dense.moments[consumer.node].covariance[0],
                columns,
            )
            for consumer, columns in readers
        ]
        context.orders[group.leaf] = order_of(surgeons, group.size)
    return context.orders[group.leaf]
