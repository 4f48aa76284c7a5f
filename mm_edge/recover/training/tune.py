"""Block-wise tuning after the closed form (E9 in docs/method.md): gradient steps on cached block inputs, no labels.

    loss = sum_v mean_i (s_vi - d_vi)^2 / mean_i Var(d_vi)

over a few *cuts* v, narrow positions between the layers that read pruned channels; s is the pruned network's value
there and d the dense network's. The layers before the first cut are run once and their output is kept; the layers
after the last cut are not run.

What is trained is the pruned network without its removed channels (shrink.py), in the channels-last memory format: 2.3
times faster than the masked network in dense shapes. Its images are crops of the calibration images, half of them
mixed.

Late weights are specific to classes, and a few hundred images do not cover the classes. At every check the mirrored
held-back images therefore choose a cut from which on the closed form's weights stay. The best state of all checks is
then accepted in part, wholly or not at all (acceptance.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from mm_edge.arrays import Arrays, Float32Array
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import mask_tensors
from mm_edge.progress import Advance
from mm_edge.recover.closed_form.context import RecoveryContext
from mm_edge.recover.closed_form.judging import judge_answers
from mm_edge.recover.closed_form.solve import kept_blocks
from mm_edge.recover.training import descent
from mm_edge.recover.training.acceptance import Tuned, accept, judge_views, judged_by_outputs, mirrored, reject
from mm_edge.recover.training.pair import Pair, make_pair, masked_state
from mm_edge.recover.training.traced import Traced, Values, channels_last

# The values of these that distil.py has too are larger there or smaller, for the reason given there.
STEPS = 300
CHECK = 75
RATE = 4e-3
# The most cuts that are compared.
TARGETS = 5
# The least area of a crop, and the share of the images left uncropped.
SMALLEST_CROP = 0.35
WHOLE = 0.25


@dataclass(frozen=True)
class _Best:
    """The best state seen.

    Attributes:
        weights: the tuned weights by name, without those that stay as the closed form left them.
        step: after how many steps.
        frozen: how many of the last targets keep the closed form's weights.
        divergence: on the mirrored held-back images, in nats.
    """

    weights: Values
    step: int
    frozen: int
    divergence: float


@dataclass(frozen=True)
class Span:
    """The operations that are tuned: those from position `start` to the last of the positions `targets`."""

    start: int
    targets: tuple[int, ...]

    def compared(self, traced: Traced) -> tuple[str, ...]:
        """Return the names of the values at the targets."""
        return tuple(name for cut in self.targets for name in traced.live(cut))


def tune(
    context: RecoveryContext,
    keep: Keep,
    tensors: Arrays,
    *,
    seed: int = 0,
    progress: Advance | None = None,
) -> Tuned:
    """Tune the weights of a pruned network, and accept the result as far as the held-back images find it better.

    Args:
        context: of the dense network, with its module; its `fitted` images are trained on, its held-back ones judge.
        keep: the indices that stay, by group.
        tensors: the closed form's, dense-shaped and masked, by name, solved without the held-back images.
        seed: of crops, mixtures and order.
        progress: called with (batches cached and steps done, of how many).

    Raises:
        ValueError: the context has no module.
    """
    views = mirrored(context)
    before = judge_views(views, keep, tensors)
    dense = Traced(context.trainable_module, context.image_shape, descent.BATCH)
    span = find_span(context, dense, keep)
    if span is None:
        return reject(tensors, before, "tuning dropped: no layer of its reach reads what was pruned")
    masks = mask_tensors(context.structure, keep)
    whole = masked_state(dense, masks, tensors)
    pair = make_pair(context, dense, keep, whole, span.compared(dense))
    tuner = _Tuner(context, views, pair, pair.zeros(masks), span, seed)
    best, history = tuner.run(progress)
    moved = {name: pair.shrunk.put(name, value.numpy().copy(), whole[name]) for name, value in best.weights.items()}
    note = f"tuned {best.step} steps up to cut {len(span.targets) - best.frozen} of {len(span.targets)}"
    return accept(views, keep, tensors, before, (whole, moved), note, history)


def find_span(context: RecoveryContext, traced: Traced, keep: Keep) -> Span | None:
    """Return what to tune, or None if nothing can be.

    It starts as early as the memory of the cache and the cost of a step allow, and ends after the last layer that reads
    pruned channels.
    """
    readers = []
    for name, consumer in context.consumers.items():
        shape = context.graph.arrays[name].shape
        if name in traced.readers and not kept_blocks(context.structure, consumer, shape, keep).whole:
            readers.append(traced.readers[name][0])
    if not readers:
        return None
    readers = sorted(set(readers))
    masked = [traced.readers[name][0] for name in mask_tensors(context.structure, keep) if name in traced.readers]
    cuts = [traced.narrowest(first + 1, last) for first, last in pairwise(readers)]
    # The narrowest position after the last reader would be the answer itself. The first single one ends the block.
    cuts += [cut for cut in range(readers[-1] + 1, len(traced.nodes) + 1) if descent.is_single(traced, cut)][:1]
    cuts = sorted({cut for cut in cuts if descent.is_single(traced, cut)})
    if not cuts or cuts[-1] <= readers[-1]:
        cuts.append(len(traced.nodes))  # several outputs, which no single tensor stands before
    starts = [cut for cut in (min(masked), *cuts) if traced.can_cut(cut)]
    start = next((cut for cut in starts if descent.is_affordable(traced, cut, cuts[-1])), None) if cuts else None
    if start is None or start >= cuts[-1]:
        return None
    inside = [cut for cut in cuts if cut > start]
    chosen = np.unique(np.linspace(0, len(inside) - 1, TARGETS).round().astype(int))
    return Span(start, tuple(inside[index] for index in chosen))


class _Tuner:
    """One run of tuning: its images, networks and weights."""

    def __init__(
        self,
        context: RecoveryContext,
        views: RecoveryContext,
        pair: Pair,
        masks: Mapping[str, Tensor],
        span: Span,
        seed: int,
    ) -> None:
        self.context, self.views = context, judged_by_outputs(views)
        self.pair, self.traced, self.span = pair, pair.pruned, span
        self.generator = torch.Generator().manual_seed(seed)
        self.state = {name: channels_last(value) for name, value in pair.pruned.state.items()}
        self.masks = masks
        end = span.targets[-1]
        self.names = descent.trainable(self.traced, context.raw.parameters, span.start, end)
        self.inputs = self.traced.live(span.start)
        self.wanted = span.compared(self.traced)

    @torch.no_grad()
    def cache(self, advance: Callable[[int], None]) -> tuple[Values, Values]:
        """Return the pruned network's values at the start and the dense network's at the targets, for every crop."""
        given: dict[str, list[Tensor]] = {name: [] for name in self.inputs}
        targets: dict[str, list[Tensor]] = {name: [] for name in self.wanted}
        dense = {name: channels_last(value) for name, value in self.pair.dense.state.items()}
        images = self.context.images[list(self.context.fitted)]
        pictures = descent.crops([images], self.generator, smallest=SMALLEST_CROP, whole=WHOLE)
        for done, (batch,) in enumerate(pictures):
            feed = {self.traced.input: channels_last(batch)}
            for name, value in self.traced.run(self.state, feed, self.inputs).items():
                given[name].append(value)
            for name, value in self.pair.dense.run(dense, feed, self.wanted).items():
                targets[name].append(self.pair.counterpart(name, value).half())
            advance(done + 1)
        return {n: torch.cat(v) for n, v in given.items()}, {n: torch.cat(v) for n, v in targets.items()}

    def run(self, progress: Advance | None) -> tuple[_Best, tuple[float, ...]]:
        """Return the best state by the held-back images, and the least divergence at every check."""
        advance = progress or (lambda done, total: None)
        batches = -(-descent.CROPS // descent.BATCH)
        given, targets = self.cache(lambda done: advance(done, batches + STEPS))
        scale = {name: _variance(value) for name, value in targets.items()}
        weights = {name: nn.Parameter(self.state[name].clone()) for name in self.names}
        with torch.no_grad():
            held = list(descent.batches(self.traced, self.state, self.views.images, self.inputs))
        best = _Best({}, 0, 0, math.inf)
        history: list[float] = []

        def after(step: int) -> None:
            nonlocal best
            if step % CHECK == 0:
                found = self._check(weights, held, step)
                history.append(found.divergence)
                best = found if found.divergence < best.divergence else best
            advance(batches + step, batches + STEPS)

        def loss(chosen: Tensor) -> Tensor:
            return self._loss(weights, chosen, given, targets, scale)

        descent.descend(weights, self.masks, loss, rate=RATE, steps=STEPS, generator=self.generator, after=after)
        return best, tuple(history)

    def _loss(
        self,
        weights: Mapping[str, Tensor],
        chosen: Tensor,
        given: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        scale: Mapping[str, float],
    ) -> Tensor:
        state = {**self.state, **weights}
        feed = {name: channels_last(value[chosen]) for name, value in given.items()}
        found = self.traced.run(state, feed, self.wanted)
        total = torch.zeros(())
        for name, value in found.items():
            # Channels that are removed but still computed are zero; the dense network's are not compared with.
            error = (value - targets[name][chosen].float()) * self._live(value)
            total = total + error.square().mean() / scale[name]
        return total

    def _check(self, weights: Mapping[str, Tensor], held: Sequence[tuple[Values, int]], step: int) -> _Best:
        """Return the best of the states in which the weights from some target on stay as the closed form left them."""
        tried = []
        for frozen, cut in enumerate((*self.span.targets[::-1],)):
            moved = {
                name: item.detach().clone() for name, item in weights.items() if min(self.traced.readers[name]) < cut
            }
            tried.append(_Best(moved, step, frozen, self._divergence(moved, held)))
        return min(tried, key=lambda item: item.divergence)

    @staticmethod
    def _live(value: Tensor) -> Tensor:
        """Return 1 for channels of the pruned network's value that are not zero on every image, 0 for the others."""
        axes = [axis for axis in range(value.dim()) if axis != 1]
        return (value.detach().abs().amax(dim=axes, keepdim=True) > 0).to(value.dtype)

    @torch.no_grad()
    def _divergence(self, weights: Mapping[str, Tensor], held: Sequence[tuple[Values, int]]) -> float:
        state = {**self.state, **weights}
        names = [value.name for value in self.context.raw.model.graph.outputs]
        rows: list[list[Float32Array]] = [[] for _ in self.views.judged.kinds]
        for given, count in held:
            found = self.traced.run(state, given, self.traced.outputs)
            arrays = {name: found[own].numpy() for name, own in zip(names, self.traced.outputs, strict=True) if name}
            for image in range(count):
                values = {name: array[image : image + 1] for name, array in arrays.items()}
                for kind, of_kind in zip(self.views.judged.kinds, rows, strict=True):
                    of_kind.append(kind.of(values))
        return judge_answers(self.views, tuple(np.stack(of_kind) for of_kind in rows)).mean


def _variance(value: Tensor) -> float:
    flat = value.float().transpose(0, 1).flatten(1)
    return max(float(flat.var(dim=1).mean()), 1e-12)
