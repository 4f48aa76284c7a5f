"""Gradient steps on part of a network: what tuning (tune.py) and distilling (distil.py) share.

    W <- Adam(W, rate * rms(W) * schedule), then M W

A learning rate is given in parts of a tensor's own root mean square, rises in WARM_UP steps and falls by a cosine. What
comes before the first layer that is trained is run once, on CROPS pictures, and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mm_edge.arrays import Float32Array
from mm_edge.recover.training.traced import Traced, Values, channels_last

BATCH = 32
WARM_UP = 20
CROPS = 1280
CACHE_BYTES = 512 << 20
# A step may make so many numbers of an image, or this share of what the whole network makes: early maps are the dear
# ones, and the same time buys more where steps are cheap.
STEP_VALUES = 6_000_000
STEP_SHARE = 0.4


def is_single(traced: Traced, position: int) -> bool:
    """Return whether one tensor crosses `position`."""
    return len(traced.live(position)) == 1 and traced.can_cut(position)


def is_affordable(traced: Traced, start: int, end: int) -> bool:
    """Return whether memory holds every crop's values at `start`, and a step from there to `end` is cheap enough."""
    limit = max(STEP_VALUES, STEP_SHARE * traced.work(0, len(traced.nodes)))
    return 4 * CROPS * traced.size(start) <= CACHE_BYTES and traced.work(start, end) <= limit


def trainable(traced: Traced, parameters: frozenset[str] | set[str], start: int, end: int) -> list[str]:
    """Return which of the `parameters` the operations from `start` to before `end` read."""
    return sorted(
        name
        for name in traced.parameters & parameters
        if any(start <= position < end for position in traced.readers.get(name, ()))
    )


def descend(
    weights: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    loss: Callable[[Tensor], Tensor],
    *,
    rate: float,
    steps: int,
    generator: torch.Generator,
    after: Callable[[int], None],
) -> None:
    """Change `weights` in place in so many steps.

    Args:
        weights: by name.
        masks: by name, False where a weight stays zero; whole where none is given.
        loss: of a batch, by the numbers of its crops.
        rate: the highest learning rate, in parts of a tensor's root mean square.
        steps: how many.
        generator: of the order of the crops.
        after: called with the number of every step done.
    """
    groups = [{"params": [item], "lr": rate * _rms(item, masks.get(name))} for name, item in weights.items()]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rise_and_fall(step, steps))
    order = torch.zeros(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.randperm(CROPS // BATCH * BATCH, generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        with torch.enable_grad():
            value = loss(chosen)
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for name in weights.keys() & masks.keys():
                weights[name].mul_(masks[name])
        after(step)


def batches(traced: Traced, state: Values, images: Float32Array, wanted: Sequence[str]) -> Iterator[tuple[Values, int]]:
    """Yield the values `wanted` of `images`, in batches filled up with copies, and how many of a batch count."""
    for part in torch.split(torch.from_numpy(images), BATCH):
        full = torch.cat([part, part[:1].expand(BATCH - len(part), *part.shape[1:])])
        yield traced.run(state, {traced.input: channels_last(full)}, wanted), len(part)


def crops(
    sizes: Sequence[Float32Array], generator: torch.Generator, *, smallest: float, whole: float
) -> Iterator[tuple[Tensor, ...]]:
    """Yield CROPS pictures in batches: parts of images, flipped half of the time, every second one mixed with another.

    Args:
        sizes: the same images (N, C, H, W) at one or several sizes; parts are taken from the first.
        generator: of every random choice.
        smallest: the least share of an image's area that is taken.
        whole: how many of the pictures are whole images.

    Yields:
        the same pictures at each of the sizes, (BATCH, C, H, W).
    """
    count = len(sizes[0])
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-CROPS // count))]
    order = torch.cat(rounds)[:CROPS]
    for start in range(0, CROPS, BATCH):
        numbers = order[start : start + BATCH].tolist()
        pictures = [_crop([array[n] for array in sizes], generator, smallest, whole) for n in numbers]
        share = torch.rand(len(pictures), 1, 1, 1, generator=generator)
        share = torch.where(torch.arange(len(pictures)).reshape(-1, 1, 1, 1) % 2 == 0, torch.ones(()), share)
        stacked = [torch.stack(list(same)) for same in zip(*pictures, strict=True)]
        yield tuple(share * part + (1 - share) * part.roll(1, 0) for part in stacked)


def _crop(image: Sequence[Float32Array], generator: torch.Generator, smallest: float, whole: float) -> list[Tensor]:
    """Return a random part of an image (C, H, W), given at several sizes, at each of them."""
    _, height, width = image[0].shape
    draw = torch.rand(5, generator=generator).tolist()
    found = [torch.from_numpy(array) for array in image]
    if draw[0] >= whole:
        area = smallest + (1 - smallest) * draw[1]
        ratio = math.exp((2 * draw[2] - 1) * math.log(4 / 3))
        rows = min(height, max(1, round(height * math.sqrt(area / ratio))))
        cols = min(width, max(1, round(width * math.sqrt(area * ratio))))
        top, left = int(draw[3] * (height - rows + 1)), int(draw[4] * (width - cols + 1))
        part = found[0][None, :, top : top + rows, left : left + cols]
        found = [resize(part, (array.shape[1], array.shape[2]))[0] for array in image]
    flip = bool(torch.rand((), generator=generator) < 0.5)
    return [array.flip(-1) if flip else array for array in found]


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images (N, C, H, W) at another size."""
    return functional.interpolate(images, size, mode="bilinear", antialias=True)


def _rise_and_fall(step: int, steps: int) -> float:
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(steps - WARM_UP, 1)))


def _rms(weight: Tensor, mask: Tensor | None) -> float:
    kept = weight.detach() if mask is None else weight.detach()[mask]
    return max(float(kept.square().mean().sqrt()), 1e-4) if kept.numel() else 0.0
