"""What all candidates of a run share while they are recovered: the dense network, its moments, and who reads what."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mm_edge.arrays import Array, Arrays, Float32Array, Float64Array, IntArray
from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.compact import apply_mask, compact_arrays, mask_tensors, materialise
from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import Group, Structure
from mm_edge.graph.partial import Frontier, RunnableGraph, narrowest
from mm_edge.progress import Advance
from mm_edge.quality.evaluation import divergence_per_row, log_softmax
from mm_edge.recover.closed_form.consumers import Consumer, read_branch, read_consumers
from mm_edge.recover.closed_form.moments import DenseMoments, collect_dense
from mm_edge.recover.closed_form.surgeon import Order, Surgeon, order_of

Readers = list[tuple[Consumer, IntArray]]

HELD_BACK = 0.2
HELD_BACK_MOST = 128
IMAGES_MOST = 640
CAUTION = 0.5
FRONTIER_BYTES = 2 << 30
SOLUTION_BYTES = 256 << 20
SCALES = (0.2, 5.0)
SCALE_STEPS = 20
SCALE_STEP = 1e-3
SCALE_LEAP = 0.3


@dataclass(frozen=True)
class Judged:
    """What the held-back images say of a network.

    How sure a network is, is the cheapest of its faults: one number in its last layer mends it. Networks are compared
    as they are after that, or who answers right but too surely, as on smaller pictures, would lose to who errs.

    Attributes:
        divergences: KL(dense || network) of each image with the answers multiplied by `scale`, nats; infinite where an
            answer is not finite.
        scale: the number that makes their mean least; 1 where no layer could take it.
    """

    divergences: Float64Array
    scale: float

    @property
    def mean(self) -> float:
        """The mean divergence; rounding can leave -1e-17."""
        return max(0.0, float(self.divergences.mean()))


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
        answering: names of the weight and bias that make the network's answers, if one layer alone does: multiplied by
            one number, they multiply the answers.
        threads: how many images are run at a time.
        orders: orders found so far, by group.
        readers: who reads a group and by which columns, found so far.
        solutions: weights and shifts solved from the dense moments, by consumer, kept columns and lambda.
    """

    raw: RawGraph
    structure: Structure
    network: RunnableGraph
    consumers: Mapping[str, Consumer]
    images: Float32Array
    fitted: tuple[int, ...]
    held_back: tuple[int, ...]
    dense: DenseMoments
    logits: Float32Array
    answering: tuple[str, ...] = ()
    threads: int = 1
    orders: dict[Axis, Order] = field(default_factory=dict)
    readers: dict[Axis, Readers] = field(default_factory=dict)
    solutions: dict[tuple[Hashable, ...], tuple[Array, Float64Array]] = field(default_factory=dict)

    def remember_(self, key: tuple[Hashable, ...], solution: tuple[Array, Float64Array]) -> None:
        """Keep a solution; the oldest go when all together pass SOLUTION_BYTES."""
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
    threads: int = 1,
    progress: Advance | None = None,
    module: object = None,
) -> RecoveryContext:
    """Run the dense network once over the calibration `images` (N, C, H, W) and keep what all candidates need.

    Moments are kept of every weight that can lose columns, and of the weights named in `also`.
    """
    network = RunnableGraph(raw.model.clone())
    everyone = read_consumers(raw, network)
    consumers = {item.weight: item for item in everyone if item.weight in also or can_lose_columns(structure, item)}
    images = images[: min(IMAGES_MOST, _affordable_images(network, tuple(consumers.values())))]
    held = min(max(int(HELD_BACK * len(images)), 1), HELD_BACK_MOST)
    fitted = tuple(range(len(images) - held))
    held_back = tuple(range(len(images) - held, len(images)))
    everything = Frontier(network, images, range(len(images)))
    dense = collect_dense(network, tuple(consumers.values()), everything, fitted, held_back, threads, progress)
    logits = answers(network, everything, held_back, threads)
    answering = _answering(network, everyone)
    return RecoveryContext(
        raw, structure, network, consumers, images, fitted, held_back, dense, logits, answering, threads
    )


def _answering(network: RunnableGraph, consumers: Sequence[Consumer]) -> tuple[str, ...]:
    """Return the tensors of the layer whose product, and the bias added to it, is the network's first output."""
    for item in consumers:
        branch = read_branch(network, item)
        if branch.result != network.outputs[0] or branch.skip is not None or not (branch.scale == 1.0).all():
            continue
        if item.shift is None:
            return () if branch.offset.any() else (item.weight,)
        if item.shift.sign > 0 and np.array_equal(branch.offset, network.arrays[item.shift.tensor]):
            return item.weight, item.shift.tensor
    return ()


def _affordable_images(network: RunnableGraph, consumers: Iterable[Consumer]) -> int:
    """Return how many images' values fit in memory at the widest of the places where a walk holds them."""
    at = sorted(network.position(item.node) for item in consumers)
    cuts = [narrowest(network, first, last) for first, last in zip([0, *(item + 1 for item in at)], at, strict=False)]
    widest = max((network.live_size(cut) for cut in [0, *cuts]), default=1)
    return max(2, FRONTIER_BYTES // (4 * widest))


def can_lose_columns(structure: Structure, consumer: Consumer) -> bool:
    """Return whether a group takes columns of the consumer's weight."""
    axis = structure.tensor_axes[consumer.weight][consumer.in_axis]
    table = structure.table
    return any(table.size(leaf) > 1 and table.pin_reason(leaf) is None for leaf in table.leaves(axis))


def answers(network: RunnableGraph, frontier: Frontier, images: Iterable[int], threads: int = 1) -> Float32Array:
    """Return the network's first output for some images, (images, classes)."""
    (output, *_) = network.outputs
    rows = [values[output] for _, values in frontier.run(network, (output,), tuple(images), threads)]
    return np.concatenate([row.reshape(-1, row.shape[-1]) for row in rows])


def pruned_network(
    context: RecoveryContext, keep: Keep, tensors: Arrays, like: RunnableGraph | None = None
) -> RunnableGraph:
    """Return the compact network of `tensors` (dense-shaped, masked), ready to run.

    `like` is one of as many indices of every group: where weights are all that differs, shapes are not inferred anew.
    """
    if like is None or not all(kept.any() for kept in keep.values()):  # constants stand where nothing is kept
        return RunnableGraph(materialise(context.raw, context.structure, keep, tensors))
    return like.holding(compact_arrays(context.raw, context.structure, keep, tensors))


def judge(context: RecoveryContext, network: RunnableGraph, frontier: Frontier) -> Judged:
    """Return what the held-back images say of `network`."""
    return judge_answers(context, answers(network, frontier, context.held_back, context.threads))


def judge_answers(context: RecoveryContext, found: Float32Array) -> Judged:
    """Return what answers (rows, classes) to the held-back images say."""
    if not np.isfinite(found).all():
        return Judged(np.full(len(context.held_back), np.inf), 1.0)
    scale = best_scale(context.logits, found) if context.answering else 1.0
    per_row = divergence_per_row(context.logits, found * np.float32(scale))
    return Judged(np.asarray(per_row.reshape(len(context.held_back), -1).mean(axis=1)), scale)


def rescale(context: RecoveryContext, keep: Keep, tensors: Arrays, scale: float) -> Arrays:
    """Return `tensors` (dense-shaped, masked) with the answers multiplied by `scale`."""
    if abs(scale - 1.0) < SCALE_STEP:
        return tensors
    masks = mask_tensors(context.structure, keep)
    found = dict(tensors)
    for name in context.answering:
        array = tensors[name] if name in tensors else apply_mask(context.network.arrays[name], masks.get(name))
        found[name] = (np.asarray(array, dtype=np.float64) * scale).astype(array.dtype)
    return found


def best_scale(wanted: Float32Array, found: Float32Array) -> float:
    """Return the s, within SCALES, that makes the mean KL(softmax(wanted) || softmax(s found)) least.

    It is convex in s: its slope is the mean of E_q[z] - E_p[z], its curvature the mean of Var_q[z], z the answers
    `found`, p and q the two softmaxes. Newton's method, halving what the slopes leave open where it would leave that:
    where all rows turn sure at one s, it would step from one side to the other for ever.
    """
    z = found.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    goal = float((np.exp(log_softmax(wanted)) * z).sum(axis=1).mean())
    scale, low, high = 1.0, -math.inf, math.inf
    for _ in range(SCALE_STEPS):
        q = np.exp(log_softmax(scale * z))
        mean = (q * z).sum(axis=1)
        slope = float(mean.mean()) - goal
        curvature = float(((q * z**2).sum(axis=1) - mean**2).mean())
        low, high = (low, scale) if slope > 0 else (scale, high)
        before, step = scale, np.clip(slope / max(curvature, 1e-12), -SCALE_LEAP, SCALE_LEAP)
        scale = float(np.clip(before - step, *SCALES))
        if abs(scale - before) < SCALE_STEP:
            break
        if not low < scale < high:
            scale = (low + high) / 2
    return scale


def divergence(context: RecoveryContext, network: RunnableGraph, frontier: Frontier) -> float:
    """Return the mean divergence that `judge` finds, nats."""
    return judge(context, network, frontier).mean


def is_better(new: Judged, old: Judged) -> bool:
    """Return whether divergences fell by more than chance on the same images: `CAUTION` standard errors."""
    if not np.isfinite(new.divergences).all():
        return False
    gain = old.divergences - new.divergences
    return bool(gain.mean() > CAUTION * gain.std() / math.sqrt(len(gain)))


# ---- which indices stay


def readers_of(context: RecoveryContext, group: Group) -> Readers:
    """Return the consumers that have moments and read `group`, each with the columns of every index.

    Columns are (indices, columns per index). A consumer in which an index reaches nothing, or which has independent
    blocks (a depthwise convolution carries the group through), is left out.
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
