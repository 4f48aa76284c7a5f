"""A model of time on one device, fitted to a table of measurements in which one group alone is narrowed.

    share(g, c)     the time with group g at c indices and all others whole, as a share of the dense network's
    time(counts) =  1 - sum_n t_n (1 - w_n(counts) / w_n)            w_n: multiply-adds of node n, dense

t_n >= 0 is the share of the time that falls with the work of node n. It is fitted to the table, and drawn towards the
node's share of the multiply-adds, p_n = w_n / sum w, which decides where the table holds little information:

    min_t  sum_(g, c) [1 - share(g, c) - sum_n t_n (1 - w_n(g, c) / w_n)]^2 / noise^2  +  sum_n (t_n - a p_n)^2 / s_n^2

where a is the part of the time that falls with multiply-adds, fitted first on its own, and s_n = a (p_n + 1 / N), wide
enough for nodes that take long for their few multiply-adds, as depthwise convolutions do. The noise is the residual of
the fit; fit and noise are found in turn, FITS times. On a busy machine the noise is large, and the model stays near the
multiply-adds. The rest of the time, 1 - sum t, does not depend on widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mm_edge.arrays import Float64Array
from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.costs import Cost
from mm_edge.graph.groups import Structure
from mm_edge.graph.widths import AllowedWidths, lead

# The widths each group is timed at.
PARTS = (0.5, 0.25)
# The least noise that is assumed of a short measurement, as a share of the dense network's time.
LEAST_NOISE = 0.003
FITS = 4
FIT_SWEEPS = 1000


@dataclass(frozen=True)
class TimedWidth:
    """One entry of the table: the time with the group of `leaf` at `count` indices, as a share of dense."""

    leaf: Axis
    count: int
    share: float


def measure_table(
    structure: Structure,
    allowed: Sequence[AllowedWidths],
    time: Callable[[Keep], float],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TimedWidth, ...]:
    """Time every group that has a width to give at a few of its widths; `time` returns the share of what is kept."""
    wanted = [(item.leaf, count) for item in allowed for count in _counts(item)]
    table = []
    for leaf, count in wanted:
        table.append(TimedWidth(leaf, count, time(lead(structure, {leaf: count}))))
        if progress is not None:
            progress(len(table), len(wanted))
    return tuple(table)


def _counts(widths: AllowedWidths) -> list[int]:
    size, below = widths.widths[-1], widths.widths[:-1]
    near = [min(below, key=lambda width: abs(width - part * size)) for part in PARTS if below]
    return list(dict.fromkeys(near))


def fit_time(cost: Cost, table: Sequence[TimedWidth]) -> Cost:
    """Return the time that multiply-adds `cost`, as a share of the dense network's; see the top of the file."""
    work = np.array([cost.of_item(item, {}) for item in cost.items])
    falls = np.array([_falls(cost, entry) for entry in table])
    saved = np.array([1 - entry.share for entry in table])
    prior = work / work.sum()
    by_macs = falls @ prior
    part = float(np.clip(saved @ by_macs / max(by_macs @ by_macs, 1e-12), 0.05, 1.0))
    spread = part * (prior + 1 / len(prior))
    found, noise = part * prior, float(np.std(saved - part * by_macs))
    for _ in range(FITS):
        noise = max(noise, LEAST_NOISE)
        found = _non_negative(falls / noise, saved / noise, part * prior, spread)
        noise = float(np.sqrt(np.mean((saved - falls @ found) ** 2)))
    found /= max(1.0, found.sum())
    items = tuple(
        replace(item, constant=item.constant * share / dense)
        for item, share, dense in zip(cost.items, found, work, strict=True)
    )
    return Cost(cost.table, items, fixed=float(1 - found.sum()))


def _falls(cost: Cost, entry: TimedWidth) -> list[float]:
    """Return the share of each item's work that goes with the entry's narrowing."""
    counts = {entry.leaf: float(entry.count)}
    return [1 - cost.of_item(item, counts) / cost.of_item(item, {}) for item in cost.items]


def _non_negative(rows: Float64Array, goal: Float64Array, start: Float64Array, spread: Float64Array) -> Float64Array:
    """Minimise |rows t - goal|^2 + |(t - start) / spread|^2 over t >= 0 by coordinate descent."""
    gram = rows.T @ rows + np.diag(spread**-2)
    right = rows.T @ goal + start * spread**-2
    found = start.copy()
    for _ in range(FIT_SWEEPS):
        before = found.copy()
        for index in range(len(found)):
            step = (right[index] - gram[index] @ found) / gram[index, index]
            found[index] = max(0.0, found[index] + step)
        if np.abs(found - before).max() < 1e-9:
            break
    return found


def at_another_size(time: Cost, macs: Cost, dense_macs: Cost) -> Cost:
    """Return the model `time` of the dense network for the same network on other pictures, whose work is `macs`.

    Nodes correspond by their order in the graph; where they do not, every multiply-add there takes the mean time.
    """
    falling = time.total() - time.fixed
    if len(macs.items) != len(time.items):
        each = falling / dense_macs.total()
        items = tuple(replace(item, constant=item.constant * each) for item in macs.items)
        return Cost(macs.table, items, time.fixed)
    items = tuple(
        replace(here, constant=here.constant * timed.constant / dense.constant)
        for here, timed, dense in zip(macs.items, time.items, dense_macs.items, strict=True)
    )
    return Cost(macs.table, items, time.fixed)
