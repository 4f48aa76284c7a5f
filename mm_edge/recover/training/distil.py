"""Distilling from larger pictures: the dense network at its own input size teaches a network at a smaller one.

    loss = mean KL(softmax(d) || softmax(s)) + mean_i (f_si - f_di)^2 / mean_i Var(f_di)

The teacher is the dense network at the size it was given at, the student is the candidate at its own size. d and s are
their answers to the same picture, each at its own size. f is what the last layer reads; its term is left out where the
two networks' f differ in shape.

No labels are read. The steps are few, because more of them fit the few hundred images instead of the task. Measured on
EfficientNet-Lite0 (two splits, images never seen): a rate of 3e-4 takes the divergence of the dense network at 192 px
from 0.110 to 0.100 nats in 150 steps, and to 0.090 in 3,000 steps of twice the batch. Ten times the rate more than
doubled the divergence of a pruned network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from mm_edge.arrays import Arrays, Float32Array, Float32Arrays
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import mask_tensors
from mm_edge.progress import Advance
from mm_edge.recover.closed_form.context import RecoveryContext
from mm_edge.recover.training import descent
from mm_edge.recover.training.acceptance import Tuned, accept, judge_views, mirrored, resized
from mm_edge.recover.training.pair import Pair, make_pair, masked_state
from mm_edge.recover.training.traced import Traced, Values, channels_last

# Distilling trains all layers end to end, which overfits sooner than block-wise tuning. It therefore takes fewer and
# shorter steps than tune.py, and milder crops: the least area of a crop, and the share of the images left uncropped.
STEPS = 200
RATE = 3e-4
SMALLEST_CROP = 0.6
WHOLE = 0.5


def distil(
    own: RecoveryContext,
    given: RecoveryContext,
    keep: Keep,
    tensors: Arrays,
    *,
    seed: int = 0,
    progress: Advance | None = None,
) -> Tuned:
    """Teach a candidate at the input size of `own` what the dense network answers at the size of `given`.

    Args:
        own: the dense network at the candidate's input size, with its module.
        given: the dense network at the size it was given at, with its module.
        keep: the indices that stay, by group of `own`.
        tensors: the candidate's tensors, dense-shaped and masked, solved without the held-back images.
        seed: of crops, mixtures and order.
        progress: called with (batches cached and steps done, of how many).

    Raises:
        ValueError: a context has no module.
    """
    views = resized(mirrored(given), own)
    before = judge_views(views, keep, tensors)
    dense, teacher = (Traced(item.trainable_module, item.image_shape, descent.BATCH) for item in (own, given))
    masks = mask_tensors(own.structure, keep)
    whole = masked_state(dense, masks, tensors)
    compared = _compared(dense, teacher)
    pair = make_pair(own, dense, keep, whole, [name for name, _ in compared])
    found = _Distiller(own, given, teacher, pair, pair.zeros(masks), compared, seed).run(progress)
    ends = {name: pair.shrunk.put(name, array, whole[name]) for name, array in found.items()}
    note = f"distilled {STEPS} steps from larger pictures"
    return accept(views, keep, tensors, before, (whole, ends), note, what="distilling")


def _compared(dense: Traced, teacher: Traced) -> list[tuple[str, str]]:
    """Return the values that are compared, each by its names in the student and in the teacher.

    First come the answers, then what the last layer reads. The latter is left out if its shape depends on the input
    size, because nothing was pooled before the last layer.
    """
    answers = (dense.outputs[0], teacher.outputs[0])
    read = _last_read(dense), _last_read(teacher)
    if read[0] is None or read[1] is None or dense.shape(read[0]) != teacher.shape(read[1]):
        return [answers]
    return [answers, (read[0], read[1])]


def _last_read(traced: Traced) -> str | None:
    """Return the value that goes into the last layer with weights: the narrowest of the few cuts before that layer."""
    last = max((position for positions in traced.readers.values() for position in positions), default=0)
    cuts = [cut for cut in range(max(1, last - 3), last + 1) if descent.is_single(traced, cut)]
    if not cuts:
        return None
    (name,) = traced.live(min(cuts, key=lambda cut: (traced.size(cut), -cut)))
    return name


class _Distiller:
    """One run of distilling: its images, networks and weights."""

    def __init__(
        self,
        own: RecoveryContext,
        given: RecoveryContext,
        teacher: Traced,
        pair: Pair,
        masks: dict[str, Tensor],
        compared: list[tuple[str, str]],
        seed: int,
    ) -> None:
        self.own, self.given, self.teacher, self.pair, self.masks = own, given, teacher, pair, masks
        self.student, self.compared = pair.pruned, compared
        self.state = {name: channels_last(value) for name, value in self.student.state.items()}
        self.generator = torch.Generator().manual_seed(seed)
        end = len(self.student.nodes)
        starts = (cut for cut in range(end) if descent.is_single(self.student, cut))
        self.start = next((cut for cut in starts if descent.is_affordable(self.student, cut, end)), end)
        self.inputs = self.student.live(self.start)

    def run(self, progress: Advance | None) -> Float32Arrays:
        """Return the weights after the last step, in the student's shapes."""
        advance = progress or (lambda done, total: None)
        batches = -(-descent.CROPS // descent.BATCH)
        kept, targets = self._cache(lambda done: advance(done, batches + STEPS))
        names = descent.trainable(self.student, self.own.raw.parameters, self.start, len(self.student.nodes))
        weights = {name: nn.Parameter(self.state[name].clone()) for name in names}
        if not weights:
            return {}

        def loss(chosen: Tensor) -> Tensor:
            feed = {name: channels_last(value[chosen]) for name, value in kept.items()}
            found = self.student.run({**self.state, **weights}, feed, [name for name, _ in self.compared])
            return _loss([found[name] for name, _ in self.compared], [value[chosen] for value in targets])

        def after(step: int) -> None:
            advance(batches + step, batches + STEPS)

        descent.descend(weights, self.masks, loss, rate=RATE, steps=STEPS, generator=self.generator, after=after)
        return {name: item.detach().numpy().copy() for name, item in weights.items()}

    @torch.no_grad()
    def _cache(self, advance: Callable[[int], None]) -> tuple[Values, list[Tensor]]:
        """Return the student's values at the start and the teacher's values that are compared, for every crop."""
        kept: dict[str, list[Tensor]] = {name: [] for name in self.inputs}
        targets: list[list[Tensor]] = [[] for _ in self.compared]
        taught = {name: channels_last(value) for name, value in self.teacher.state.items()}
        sizes = self._images()
        pictures = descent.crops(sizes, self.generator, smallest=SMALLEST_CROP, whole=WHOLE)
        for done, (large, small) in enumerate(pictures):
            found = self.student.run(self.state, {self.student.input: channels_last(small)}, self.inputs)
            for name, value in found.items():
                kept[name].append(value)
            there = [name for _, name in self.compared]
            wanted = self.teacher.run(taught, {self.teacher.input: channels_last(large)}, there)
            for (here, name), values in zip(self.compared, targets, strict=True):
                values.append(self.pair.counterpart(here, wanted[name]))
            advance(done + 1)
        return {name: torch.cat(values) for name, values in kept.items()}, [torch.cat(values) for values in targets]

    def _images(self) -> list[Float32Array]:
        """Return the images to learn from, at the teacher's size and at the student's."""
        fitted = list(self.given.fitted)
        large = self.given.images[fitted]
        if len(self.own.images) == len(self.given.images):
            return [large, self.own.images[fitted]]
        _, height, width = self.own.images.shape[1:]
        return [large, descent.resize_images(torch.from_numpy(large), (height, width)).numpy()]


def _loss(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Return the loss at the top of the file, of the values in the order of `_compared`."""
    taught = wanted[0].flatten(0, -2).log_softmax(1)
    total = functional.kl_div(found[0].flatten(0, -2).log_softmax(1), taught, log_target=True, reduction="batchmean")
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        spread = theirs.flatten(1).var(dim=0).mean().clamp_min(1e-12)
        # Channels that are removed but still computed are zero in the student; the teacher's are not compared with.
        live = (mine.detach().abs().amax(dim=0, keepdim=True) > 0).to(mine.dtype)
        total = total + ((mine - theirs) * live).square().mean() / spread
    return total
