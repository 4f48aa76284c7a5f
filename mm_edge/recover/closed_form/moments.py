"""Second moments of what consumers read, streamed over images and accumulated in float64.

    mean = sum_i h_i / n,      covariance = sum_i h_i h_i^T / n - mean mean^T,      cross = sum_i h_i y_i^T / n - ...

over at most `POSITIONS` random output positions an image (the same ones for the dense network and for every
candidate, so that the student's inputs h can be paired with the dense network's wanted outputs y). A consumer of
more than `WIDEST` inputs has no moment matrix: its blocks are its single columns.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_edge.arrays import BoolArray, Float32Array, Float32Arrays, Float64Array, IntArray
from mm_edge.graph.partial import Frontier, RunnableGraph, Values
from mm_edge.recover.closed_form.consumers import Branch, Consumer, columns, count_positions, input_of, read_branch

Indices = IntArray

POSITIONS = 49
WIDEST = 8192
ROWS = 1024
ACCUMULATOR_BYTES = 3 << 29


@dataclass(frozen=True)
class Moments:
    """What one consumer reads: per group, mean (G, K) and covariance (G, K, K).

    `cross` (G, K, O per group), `wanted` and `spread` (both G, O per group: mean and variance) pair it with wanted
    outputs; None without.
    """

    mean: Float64Array
    covariance: Float64Array
    cross: Float64Array | None = None
    wanted: Float64Array | None = None
    spread: Float64Array | None = None


class Accumulator:
    """Sums of one consumer's inputs, and of their products with wanted outputs where there are any."""

    def __init__(self) -> None:
        """Start empty."""
        self.count = 0
        self._rows: list[tuple[Float32Array, Float32Array | None]] = []
        self._waiting = 0
        self._sums: dict[str, Any] = {}

    def add(self, inputs: Float32Array, wanted: Float32Array | None = None) -> None:
        """Add rows of inputs (n, G, K) and of wanted outputs (n, O)."""
        self._rows.append((inputs, wanted))
        self._waiting += len(inputs)
        if self._waiting >= ROWS:
            self._flush()

    def finish(self) -> Moments:
        """Return the moments of all rows added."""
        self._flush()
        mean = self._sums["h"] / self.count
        covariance = self._sums["hh"] / self.count - mean[:, :, None] * mean[:, None, :]
        if "y" not in self._sums:
            return Moments(mean, covariance)
        wanted = self._sums["y"] / self.count
        cross = self._sums["hy"] / self.count - mean[:, :, None] * wanted[:, None, :]
        spread = self._sums["yy"] / self.count - wanted**2
        return Moments(mean, covariance, cross, wanted, spread)

    def _flush(self) -> None:
        if not self._rows:
            return
        h = np.concatenate([inputs for inputs, _ in self._rows]).transpose(1, 2, 0)  # (G, K, n)
        parts = {"h": h.sum(axis=2, dtype=np.float64), "hh": h @ h.transpose(0, 2, 1)}
        if self._rows[0][1] is not None:
            y = np.concatenate([wanted for _, wanted in self._rows if wanted is not None])
            y = y.reshape(len(y), len(h), -1).transpose(1, 0, 2)  # (G, n, O per group)
            parts |= {"y": y.sum(axis=1, dtype=np.float64), "hy": h @ y, "yy": (y * y).sum(axis=1, dtype=np.float64)}
        for name, part in parts.items():
            if name in self._sums:
                self._sums[name] += part
            else:
                self._sums[name] = part.astype(np.float64)
        self.count += self._waiting
        self._rows, self._waiting = [], 0


def sample_positions(network: RunnableGraph, consumer: Consumer, image: int) -> Indices:
    """Return the output positions looked at in image number `image`: all, or `POSITIONS` of them, ever the same."""
    total = count_positions(network, consumer)
    if total <= POSITIONS:
        return np.arange(total)
    generator = np.random.default_rng([image, zlib.crc32(consumer.node.encode()), total])
    return generator.choice(total, POSITIONS, replace=False, shuffle=False)


@dataclass(frozen=True)
class DenseMoments:
    """What one pass over the dense network leaves: by consumer's node, its inputs' moments and wanted results.

    `results` are the branch results at the sampled positions, (images, positions, O), float32.
    """

    moments: Mapping[str, Moments]
    results: Mapping[str, Float32Array]


def collect_dense(
    network: RunnableGraph,
    consumers: Sequence[Consumer],
    frontier: Frontier,
    fitted: Sequence[int],
    others: Sequence[int] = (),
    threads: int = 1,
    advance: Callable[[int, int], None] | None = None,
) -> DenseMoments:
    """Return the dense network's own moments on the images `fitted`, in as many passes as memory allows.

    Branch results are kept of the `others` too: by image number, which together are 0, 1, ...
    """
    numbers = sorted({*fitted, *others})
    in_moments = set(fitted)
    moments: dict[str, Moments] = {}
    results: Float32Arrays = {}
    parts = list(_affordable(network, consumers))
    for number, part in enumerate(parts):
        branches = {item.node: read_branch(network, item) for item in part}
        sums = {item.node: Accumulator() for item in part}
        kept: dict[str, list[Float32Array]] = {item.node: [] for item in part}
        wanted = [name for item in part for name in (input_of(network, item), branches[item.node].result)]
        for done, (image, values) in enumerate(frontier.run(network, wanted, numbers, threads)):
            for item in part:
                where = sample_positions(network, item, image)
                if image in in_moments and width(network, item) <= WIDEST:
                    sums[item.node].add(columns(values[input_of(network, item)], item, where))
                kept[item.node].append(_at(values, branches[item.node].result, branches[item.node].index[where]))
            if advance is not None:
                advance(number * len(numbers) + done + 1, len(parts) * len(numbers))
        moments |= {node: sums[node].finish() for node in sums if sums[node].count or sums[node]._waiting}
        results |= {node: np.stack(rows) for node, rows in kept.items()}
    return DenseMoments(moments, results)


def collect_paired(
    network: RunnableGraph,
    consumer: Consumer,
    frontier: Frontier,
    numbers: Sequence[int],
    results: Float32Array,
    threads: int = 1,
) -> Moments:
    """Return moments of what `consumer` reads in the student `network`, paired with the outputs it should have.

    `results` are the dense network's branch results (images, positions, O), its removed channels left out. The
    student's own skip connection is taken off them, so that what went wrong upstream is made good here.
    """
    branch = read_branch(network, consumer)
    data = input_of(network, consumer)
    sums = Accumulator()
    wanted = [data] if branch.skip is None else [data, branch.skip]
    for image, values in frontier.run(network, wanted, numbers, threads):
        where = sample_positions(network, consumer, image)
        target = results[image].astype(np.float64) - branch.offset
        if branch.skip is not None:
            target = target - _at(values, branch.skip, branch.index[where])
        target = target / live_scale(branch)
        sums.add(columns(values[data], consumer, where), target.astype(np.float32))
    return sums.finish()


def live_scale(branch: Branch) -> Float64Array:
    """Return the branch's scale; channels it does not let through get one, their targets mean nothing."""
    return np.where(is_live(branch), branch.scale, 1.0)


def is_live(branch: Branch) -> BoolArray:
    """Return which output channels reach the branch's result."""
    size = np.abs(branch.scale)
    return np.asarray(size > 1e-5 * size.max(initial=0.0))


def width(network: RunnableGraph, consumer: Consumer) -> int:
    """Return K, the inputs of one output."""
    weight = network.arrays[consumer.weight]
    return int(weight.size // weight.shape[1 - consumer.in_axis])


def _at(values: Values, name: str, index: Indices) -> Float32Array:
    return np.asarray(values[name].reshape(-1)[index], dtype=np.float32)


def _affordable(network: RunnableGraph, consumers: Sequence[Consumer]) -> Iterable[list[Consumer]]:
    """Cut the consumers into runs whose accumulators fit in memory together."""
    part: list[Consumer] = []
    total = 0
    for item in consumers:
        wide = width(network, item)
        size = 0 if wide > WIDEST else 8 * item.groups * wide**2
        if part and total + size > ACCUMULATOR_BYTES:
            yield part
            part, total = [], 0
        part.append(item)
        total += size
    if part:
        yield part
