"""Second moments of what consumers read, summed image by image in float64.

    mean = sum_i h_i / n,      covariance = sum_i h_i h_i^T / n - mean mean^T,      cross = sum_i h_i y_i^T / n - ...

The sums run over at most `POSITIONS` random output positions per image; emphasis.py says which are likelier. Those
positions are the same for the dense network and for every candidate, so that the pruned network's inputs h can be
paired with the dense network's outputs y. No moments are kept of a consumer with more than `WIDEST` inputs per output:
the matrix would be too large.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_edge.arrays import Array, BoolArray, Float32Array, Float32Arrays, Float64Array, IntArray
from mm_edge.graph.partial import Frontier, RunnableGraph
from mm_edge.recover.closed_form.consumers import (
    Consumer,
    ProductPath,
    columns,
    count_positions,
    input_of,
    read_product_path,
)
from mm_edge.recover.closed_form.emphasis import Emphasis

POSITIONS = 49
WIDEST = 8192
# Rows are multiplied in blocks of at least so many, and all accumulators of one pass together take so much memory.
ROWS = 1024
ACCUMULATOR_BYTES = 3 << 29


@dataclass(frozen=True)
class Moments:
    """The moments of what one consumer of G groups reads.

    Attributes:
        mean: of the inputs, (G, K).
        covariance: of the inputs, (G, K, K).
        cross: covariance of inputs and wanted outputs, (G, K, O per group); None without wanted outputs.
        wanted: mean of the wanted outputs, (G, O per group); None without them.
        spread: variance of the wanted outputs, (G, O per group); None without them.
    """

    mean: Float64Array
    covariance: Float64Array
    cross: Float64Array | None = None
    wanted: Float64Array | None = None
    spread: Float64Array | None = None


class Accumulator:
    """Sums over one consumer's inputs and, if wanted outputs are given, over their products with the inputs."""

    def __init__(self) -> None:
        """Start empty."""
        self.count = 0
        self._rows: list[tuple[Float32Array, Float32Array | None]] = []
        self._waiting = 0
        self._sums: dict[str, Any] = {}

    @property
    def empty(self) -> bool:
        """Whether no row was added."""
        return not (self.count or self._waiting)

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


def sample_positions(
    graph: RunnableGraph, consumer: Consumer, image: int, emphasis: Emphasis | None = None
) -> IntArray:
    """Return the output positions that are used of image number `image`: all, or a fixed sample of `POSITIONS`.

    They are drawn evenly without `emphasis`, and where the outputs are no map.
    """
    total = count_positions(graph, consumer)
    if total <= POSITIONS:
        return np.arange(total)
    generator = np.random.default_rng([image, zlib.crc32(consumer.node.encode()), total])
    grid = graph.shapes[graph.node(consumer.node).output[0]][2:]
    chances = None if emphasis is None or consumer.window is None or len(grid) != 2 else emphasis.chances(image, grid)
    return generator.choice(total, POSITIONS, replace=False, shuffle=False, p=chances)


@dataclass(frozen=True)
class DenseMoments:
    """What is known of the dense network's consumers, by the name of their node.

    Attributes:
        moments: of the inputs, over the fitted images.
        results: the values at the ends of the product paths, at the sampled positions, (images, positions, O), float32.
    """

    moments: Mapping[str, Moments]
    results: Mapping[str, Float32Array]


def collect_dense(
    graph: RunnableGraph,
    consumers: Sequence[Consumer],
    frontier: Frontier,
    fitted: Sequence[int],
    others: Sequence[int] = (),
    threads: int = 1,
    advance: Callable[[int, int], None] | None = None,
    emphasis: Emphasis | None = None,
) -> DenseMoments:
    """Return the moments of the dense `graph` on the images `fitted`, and its results on `fitted` and `others`.

    The numbers in `fitted` and `others` together must be 0, 1, ...: results are looked up by image number. Consumers
    whose sums do not fit into memory together are handled in several passes over the images.
    """
    numbers = sorted({*fitted, *others})
    in_moments = set(fitted)
    moments: dict[str, Moments] = {}
    results: Float32Arrays = {}
    parts = list(_affordable(graph, consumers))
    for number, part in enumerate(parts):
        paths = {item.node: read_product_path(graph, item) for item in part}
        sums = {item.node: Accumulator() for item in part}
        kept: dict[str, list[Float32Array]] = {item.node: [] for item in part}
        wanted = [name for item in part for name in (input_of(graph, item), paths[item.node].result)]
        for done, (image, values) in enumerate(frontier.run(graph, wanted, numbers, threads)):
            for item in part:
                where = sample_positions(graph, item, image, emphasis)
                if image in in_moments and width(graph, item) <= WIDEST:
                    sums[item.node].add(columns(values[input_of(graph, item)], item, where))
                kept[item.node].append(_at(values, paths[item.node].result, paths[item.node].index[where]))
            if advance is not None:
                advance(number * len(numbers) + done + 1, len(parts) * len(numbers))
        moments |= {node: sums[node].finish() for node in sums if not sums[node].empty}
        results |= {node: np.stack(rows) for node, rows in kept.items()}
    return DenseMoments(moments, results)


def collect_paired(
    graph: RunnableGraph,
    consumer: Consumer,
    frontier: Frontier,
    numbers: Sequence[int],
    results: Float32Array,
    threads: int = 1,
    emphasis: Emphasis | None = None,
) -> Moments:
    """Return moments of what `consumer` reads in the pruned `graph`, paired with the outputs it should have.

    `results` are the dense network's results for this consumer, (images, positions, O), without removed channels. The
    pruned network's own skip connection is subtracted from them, so that the consumer also corrects errors that earlier
    layers left in the skip connection.
    """
    path = read_product_path(graph, consumer)
    data = input_of(graph, consumer)
    sums = Accumulator()
    wanted = [data] if path.skip is None else [data, path.skip]
    for image, values in frontier.run(graph, wanted, numbers, threads):
        where = sample_positions(graph, consumer, image, emphasis)
        target = results[image].astype(np.float64) - path.offset
        if path.skip is not None:
            target = target - _at(values, path.skip, path.index[where])
        target = target / live_scale(path)
        sums.add(columns(values[data], consumer, where), target.astype(np.float32))
    return sums.finish()


def live_scale(path: ProductPath) -> Float64Array:
    """Return the path's scale (O,), with 1 for channels that do not reach the result: their targets mean nothing."""
    return np.where(is_live(path), path.scale, 1.0)


def is_live(path: ProductPath) -> BoolArray:
    """Return which output channels reach the path's result, (O,): those whose scale is not next to zero."""
    size = np.abs(path.scale)
    return np.asarray(size > 1e-5 * size.max(initial=0.0))


def width(graph: RunnableGraph, consumer: Consumer) -> int:
    """Return K, the inputs of one output."""
    weight = graph.arrays[consumer.weight]
    return int(weight.size // weight.shape[1 - consumer.in_axis])


def _at(values: Mapping[str, Array], name: str, index: IntArray) -> Float32Array:
    return np.asarray(values[name].reshape(-1)[index], dtype=np.float32)


def _affordable(graph: RunnableGraph, consumers: Sequence[Consumer]) -> Iterable[list[Consumer]]:
    """Yield the consumers in parts whose accumulators fit into ACCUMULATOR_BYTES together."""
    part: list[Consumer] = []
    total = 0
    for item in consumers:
        wide = width(graph, item)
        size = 0 if wide > WIDEST else 8 * item.groups * wide**2
        if part and total + size > ACCUMULATOR_BYTES:
            yield part
            part, total = [], 0
        part.append(item)
        total += size
    if part:
        yield part
