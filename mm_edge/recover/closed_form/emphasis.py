"""Where in an image the dense network's answers say most: moments are mostly drawn from these positions.

A detector answers "nothing" almost everywhere. Where positions are drawn evenly, the solved weights serve the
background, because what belongs to an object is seen at a handful of positions. So a share of the draws goes by a map:

    p(position) = (1 - SHARE) / n + SHARE * m(position) / sum of m

    m    the largest probability that the dense network gives any class there, from a map of probabilities, or from a
         list whose positions are those of the head's maps, one map after another; on the finest of these grids, the
         largest of what the maps say of a cell

Networks without such an output, and classifiers, have no map, and their positions are drawn evenly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mm_edge.arrays import Array, Float32Array, Float64Array
from mm_edge.graph.answers import AnswerKind, AnswerViews
from mm_edge.graph.partial import RunnableGraph

SHARE = 0.5
# Probabilities with a larger mean do not say nothing almost everywhere: a segmenter's, an image's pixels, box corners.
RARE = 0.2

Grid = tuple[int, int]


@dataclass(frozen=True)
class Emphasis:
    """The map m of every image, by its number: arrays (h, w), none negative."""

    maps: Mapping[int, Float32Array]

    def chances(self, image: int, grid: Grid) -> Float64Array:
        """Return the probability that each position of a grid (h, w) is drawn, (h * w,)."""
        weights = resize(self.maps[image], grid).reshape(-1).astype(np.float64)
        even = np.full(weights.size, 1 / weights.size)
        return even if not weights.any() else (1 - SHARE) * even + SHARE * weights / weights.sum()


@dataclass(frozen=True)
class _Source:
    """An output that may hold probabilities, and the grids that its positions make, one after another."""

    kind: AnswerKind
    grids: tuple[Grid, ...]


def find_emphasis(
    graph: RunnableGraph, judged: AnswerViews, values: Iterable[tuple[int, Mapping[str, Array]]]
) -> Emphasis | None:
    """Return the maps of all images; None where no output holds probabilities that are small almost everywhere.

    Args:
        graph: the dense graph.
        judged: its answers.
        values: the values named in `judged`, by image number; not read where their shapes already rule a map out.
    """
    sources = list(_sources(graph, judged))
    if not sources:
        return None
    read: list[dict[int, Float32Array]] = [{} for _ in sources]
    for image, found in values:
        for source, maps in zip(sources, read, strict=True):
            maps[image] = _map_of(source, found)
    means = [_mean_probability(maps) for maps in read]
    best = min(range(len(means)), key=means.__getitem__)
    return Emphasis(read[best]) if means[best] < RARE else None


def _mean_probability(maps: Mapping[int, Float32Array]) -> float:
    """Return the mean of all maps; infinite where they hold anything but probabilities, or nothing above zero."""
    if any(array.min() < 0 or array.max() > 1 for array in maps.values()):
        return math.inf
    return float(np.mean([array.mean() for array in maps.values()])) or math.inf


def resize(array: Float32Array, grid: Grid) -> Float32Array:
    """Return a map (h, w) on another grid: the largest of the cells that a cell covers, or the cell it lies in."""
    for axis, size in enumerate(grid):
        array = np.maximum.reduceat(array, np.arange(size) * array.shape[axis] // size, axis=axis)
    return array


def _sources(graph: RunnableGraph, judged: AnswerViews) -> Iterator[_Source]:
    """Yield the outputs whose positions lie in known grids."""
    if judged.class_scores is not None or not judged.views:
        return
    heads = _head_grids(graph, judged.views[1:])
    for kind in judged.views[0]:
        if len(kind.parts) != 1 or kind.divergence == "kl":
            continue
        if len(kind.shape) == 4 and kind.parts[0].axis == 1:
            yield _Source(kind, (kind.shape[2:],))
        elif len(kind.shape) == 3 and heads:
            positions, held = math.prod(kind.shape[1:]) // kind.shape[kind.parts[0].axis], sum(map(math.prod, heads))
            if positions % held == 0:
                yield _Source(kind, heads)


def _head_grids(graph: RunnableGraph, views: Sequence[Sequence[AnswerKind]]) -> tuple[Grid, ...]:
    """Return the grids of the maps before decoding, each once, in their order."""
    shapes = [graph.shapes[part.value] for view in views for kind in view for part in kind.parts]
    return tuple(dict.fromkeys((shape[2], shape[3]) for shape in shapes if len(shape) == 4))


def _largest(source: _Source, values: Mapping[str, Array]) -> Float32Array:
    """Return the largest number of every position, (positions,), of one image; -1 where one is negative."""
    (part,) = source.kind.parts
    moved = np.moveaxis(values[part.value], part.axis, -1)
    channels = moved.reshape(-1, moved.shape[-1])[:, part.start : part.stop]
    return np.asarray(np.where((channels >= 0).all(axis=1), channels.max(axis=1), -1), dtype=np.float32)


def _map_of(source: _Source, values: Mapping[str, Array]) -> Float32Array:
    """Return the map of one image on the finest grid."""
    largest = _largest(source, values)
    held = sum(map(math.prod, source.grids))
    finest = max(source.grids)
    pieces, start = [], 0
    for grid in source.grids:
        count = math.prod(grid) * (len(largest) // held)
        # Of several anchors the largest. They lie one after another: each makes a whole map.
        pieces.append(resize(largest[start : start + count].reshape(-1, *grid).max(axis=0), finest))
        start += count
    return np.asarray(np.max(pieces, axis=0), dtype=np.float32)
