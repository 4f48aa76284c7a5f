"""What recovery knows about one network: its dense graph and module, the images, and the dense network's moments."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from mm_edge.arrays import Array, Arrays, Float32Array, Float64Array, IntArray
from mm_edge.graph.answers import AnswerViews, find_answers
from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.compact import compact_arrays, materialise
from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import Structure
from mm_edge.graph.partial import Frontier, RunnableGraph, narrowest
from mm_edge.progress import Advance
from mm_edge.recover.closed_form.consumers import Consumer, read_consumers, read_product_path
from mm_edge.recover.closed_form.emphasis import Emphasis, find_emphasis
from mm_edge.recover.closed_form.moments import DenseMoments, collect_dense
from mm_edge.recover.closed_form.surgeon import Order

# The answers to some images, one array (images, positions, channels) per kind.
AnswerArrays = tuple[Float32Array, ...]

# The consumers that read a group, each with the columns (indices, columns per index) that belong to every index.
Readers = list[tuple[Consumer, IntArray]]

# Share of the images that is held back to judge, and the most images that are.
HELD_BACK = 0.2
HELD_BACK_MOST = 128
IMAGES_MOST = 640
# Memory for the values that a walk holds for all images, and for the solutions that a context remembers.
FRONTIER_BYTES = 2 << 30
SOLUTION_BYTES = 256 << 20


@dataclass(frozen=True)
class RecoveryContext:
    """What recovering any candidate of one network needs; `build_context` makes it once.

    Attributes:
        raw: the dense graph as exported.
        structure: its coupled groups.
        graph: the dense graph, ready to run.
        consumers: the consumers that have moments, by the name of their weight.
        images: calibration images (N, C, H, W).
        fitted: numbers of the images that moments come from.
        held_back: numbers of the images that judge.
        dense: the dense network's own moments, and what its consumers should put out.
        judged: which values are compared with the dense network's.
        answers: the dense network's answers to the held-back images, by kind of `judged`.
        emphasis: which positions of an image moments are mostly drawn from; None where all are alike.
        answering: names of the weight and bias of the layer that alone makes the class scores, where these alone are
            compared; empty otherwise. The scores grow in proportion when both are multiplied by one number.
        threads: how many images are run at a time.
        orders: the orders of removal found so far, by group.
        readers: the readers of a group found so far, by group.
        solutions: weights and shifts solved from the dense moments so far, by consumer, kept columns and lambda.
        module: the dense module, which training needs; None for a network that exists as a graph only.
    """

    raw: RawGraph
    structure: Structure
    graph: RunnableGraph
    consumers: Mapping[str, Consumer]
    images: Float32Array
    fitted: tuple[int, ...]
    held_back: tuple[int, ...]
    dense: DenseMoments
    judged: AnswerViews
    answers: AnswerArrays
    emphasis: Emphasis | None = None
    answering: tuple[str, ...] = ()
    threads: int = 1
    orders: dict[Axis, Order] = field(default_factory=dict)
    readers: dict[Axis, Readers] = field(default_factory=dict)
    solutions: dict[tuple[Hashable, ...], tuple[Array, Float64Array]] = field(default_factory=dict)
    module: nn.Module | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one image, (C, H, W)."""
        return self.images.shape[1:]

    @property
    def trainable_module(self) -> nn.Module:
        """The dense module.

        Raises:
            ValueError: the context was built without one.
        """
        if self.module is None:
            raise ValueError("training needs the dense module: pass it to build_context as module=")
        return self.module

    def remember_(self, key: tuple[Hashable, ...], solution: tuple[Array, Float64Array]) -> None:
        """Store a solution, and drop the oldest ones while all together exceed SOLUTION_BYTES."""
        self.solutions[key] = solution
        size = sum(weight.nbytes for weight, _ in self.solutions.values())
        while size > SOLUTION_BYTES and len(self.solutions) > 1:
            oldest = next(iter(self.solutions))
            size -= self.solutions.pop(oldest)[0].nbytes


def build_context(
    raw: RawGraph,
    structure: Structure,
    images: Float32Array,
    *,
    also: Collection[str] = (),
    judge: Sequence[str] = (),
    threads: int = 1,
    progress: Advance | None = None,
    module: nn.Module | None = None,
) -> RecoveryContext:
    """Run the dense network once over calibration images and keep what recovering its candidates needs.

    Args:
        raw: the dense graph as exported.
        structure: its coupled groups.
        images: (N, C, H, W); as many of the first ones are used as IMAGES_MOST and memory allow, and the last fifth of
            those is held back.
        also: names of weights whose moments are wanted besides those of every weight that can lose columns.
        judge: names of values to compare with the dense network's instead of those found in the graph.
        threads: how many images are run at a time.
        progress: called with (images done, of how many).
        module: the dense module, if the candidates may be trained.
    """
    judged = find_answers(raw, structure, judge)
    graph = RunnableGraph(raw.model.clone(), judged.values)
    found = read_consumers(raw, graph)
    consumers = {item.weight: item for item in found if item.weight in also or can_lose_columns(structure, item)}
    images = images[: min(IMAGES_MOST, _affordable_images(graph, tuple(consumers.values())))]
    held = min(max(int(HELD_BACK * len(images)), 1), HELD_BACK_MOST)
    fitted = tuple(range(len(images) - held))
    held_back = tuple(range(len(images) - held, len(images)))
    everything = Frontier(graph, images, range(len(images)))
    emphasis = find_emphasis(graph, judged, everything.run(graph, judged.values, tuple(range(len(images))), threads))
    dense = collect_dense(graph, tuple(consumers.values()), everything, fitted, held_back, threads, progress, emphasis)
    return RecoveryContext(
        raw=raw,
        structure=structure,
        graph=graph,
        consumers=consumers,
        images=images,
        fitted=fitted,
        held_back=held_back,
        dense=dense,
        judged=judged,
        answers=answers(graph, judged, everything, held_back, threads),
        emphasis=emphasis,
        answering=_answering(graph, found, judged.class_scores),
        threads=threads,
        module=module,
    )


def _answering(graph: RunnableGraph, consumers: Sequence[Consumer], scores: str | None) -> tuple[str, ...]:
    """Return the weight and bias of the layer whose product plus bias is the value `scores`; () without one."""
    for item in consumers:
        path = read_product_path(graph, item)
        if path.result != scores or path.skip is not None or not (path.scale == 1.0).all():
            continue
        if item.shift is None:
            return () if path.offset.any() else (item.weight,)
        if item.shift.sign > 0 and np.array_equal(path.offset, graph.arrays[item.shift.tensor]):
            return item.weight, item.shift.tensor
    return ()


def _affordable_images(graph: RunnableGraph, consumers: Iterable[Consumer]) -> int:
    """Return how many images' values fit into FRONTIER_BYTES at the widest position where a walk holds them."""
    at = sorted(graph.position(item.node) for item in consumers)
    cuts = [narrowest(graph, first, last) for first, last in zip([0, *(item + 1 for item in at)], at, strict=False)]
    widest = max((graph.live_size(cut) for cut in [0, *cuts]), default=1)
    return max(2, FRONTIER_BYTES // (4 * widest))


def can_lose_columns(structure: Structure, consumer: Consumer) -> bool:
    """Return whether pruning some group would remove columns of the consumer's weight."""
    axis = structure.tensor_axes[consumer.weight][consumer.in_axis]
    table = structure.table
    return any(table.size(leaf) > 1 and table.pin_reason(leaf) is None for leaf in table.leaves(axis))


def answers(
    graph: RunnableGraph, judged: AnswerViews, frontier: Frontier, images: Iterable[int], threads: int = 1
) -> AnswerArrays:
    """Return the graph's answers to the images numbered `images`, by kind of `judged`."""
    rows: list[list[Float32Array]] = [[] for _ in judged.kinds]
    for _, values in frontier.run(graph, judged.values, tuple(images), threads):
        for kind, found in zip(judged.kinds, rows, strict=True):
            found.append(kind.of(values))
    return tuple(np.stack(found) for found in rows)


def pruned_graph(
    context: RecoveryContext, keep: Keep, tensors: Arrays, like: RunnableGraph | None = None
) -> RunnableGraph:
    """Return the compact graph of `tensors` (dense-shaped, masked), ready to run.

    Args:
        context: of the dense network.
        keep: the indices that stay, by group.
        tensors: what differs from the dense network's tensors, by name.
        like: a compact graph that keeps as many indices of every group, if there is one: only the weights differ from
            it, so that shapes need not be inferred again.
    """
    # A group that keeps nothing leaves constants in the graph, and those depend on what other groups keep.
    if like is None or not all(kept.any() for kept in keep.values()):
        return RunnableGraph(materialise(context.raw, context.structure, keep, tensors), context.judged.values)
    return like.holding(compact_arrays(context.raw, context.structure, keep, tensors))
