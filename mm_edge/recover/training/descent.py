"""Gradient steps on part of a network: what tuning (tune.py) and distilling (distil.py) share.

    W <- Adam(W, rate * rms(W) * schedule), then M W

The learning rate is a multiple of a tensor's own root mean square; it rises for WARM_UP steps and then falls
(schedule.py). The layers before the first trained one are run once, on CROPS crops, and their output is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from mm_edge.arrays import Float32Array
from mm_edge.recover.training.schedule import rise_and_fall
from mm_edge.recover.training.traced import Traced, Values, channels_last

# Crops per step, steps in which the learning rate rises, and crops made of the images in all.
BATCH = 32
WARM_UP = 20
CROPS = 1280
# Memory for the values of all crops at the first trained layer.
CROP_CACHE_BYTES = 512 << 20
# The most values that a step may compute per image, as a number or as a share of what the whole network computes,
# whichever is larger. Early layers have the largest maps; leaving them out allows more steps in the same time.
STEP_VALUES = 6_000_000
STEP_SHARE = 0.4


def is_single(traced: Traced, position: int) -> bool:
    """Return whether a single tensor crosses `position`, and the graph can be cut there."""
    return len(traced.live(position)) == 1 and traced.can_cut(position)


def is_affordable(traced: Traced, start: int, end: int) -> bool:
    """Return whether memory holds all crops' values at `start`, and a step from `start` to `end` is cheap enough."""
    limit = max(STEP_VALUES, STEP_SHARE * traced.work(0, len(traced.nodes)))
    return 4 * CROPS * traced.size(start) <= CROP_CACHE_BYTES and traced.work(start, end) <= limit


def trainable(traced: Traced, parameters: frozenset[str] | set[str], start: int, end: int) -> list[str]:
    """Return the names of those `parameters` that the operations from `start` to before `end` read, sorted."""
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
    """Change `weights` in place by gradient steps.

    Args:
        weights: by name.
        masks: by name, False where a weight stays zero; a weight without a mask changes everywhere.
        loss: returns the loss of a batch, given the numbers of its crops (BATCH,).
        rate: the highest learning rate, as a multiple of a tensor's root mean square.
        steps: how many steps.
        generator: draws the order of the crops.
        after: called with the number of steps done, after every step.
    """
    groups = [{"params": [item], "lr": rate * _rms(item, masks.get(name))} for name, item in weights.items()]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(rise_and_fall, steps=steps, warm_up=WARM_UP))
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
    """Yield the values `wanted` of `images` (N, C, H, W) in batches of BATCH, and how many images of a batch count.

    The last batch is filled up with copies of its first image.
    """
    for part in torch.split(torch.from_numpy(images), BATCH):
        full = torch.cat([part, part[:1].expand(BATCH - len(part), *part.shape[1:])])
        yield traced.run(state, {traced.input: channels_last(full)}, wanted), len(part)


def crops(
    sizes: Sequence[Float32Array], generator: torch.Generator, *, smallest: float, whole: float
) -> Iterator[tuple[Tensor, ...]]:
    """Yield CROPS random crops of images in batches, half of them mirrored, every second one mixed with another crop.

    Args:
        sizes: the same images (N, C, H, W) at one or several sizes; crops are taken from the first.
        generator: of every random choice.
        smallest: the least share of an image's area that a crop has, in (0, 1].
        whole: the share of the crops that are whole images, in [0, 1].

    Yields:
        The same crops at each of the sizes, (BATCH, C, H, W).
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
    """Return the same random part of an image (C, H, W) at each of the sizes that the image is given in."""
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
        found = [resize_images(part, (array.shape[1], array.shape[2]))[0] for array in image]
    flip = bool(torch.rand((), generator=generator) < 0.5)
    return [array.flip(-1) if flip else array for array in found]


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images (N, C, H, W) resized to `size` (H, W)."""
    return functional.interpolate(images, size, mode="bilinear", antialias=True)


def _rms(weight: Tensor, mask: Tensor | None) -> float:
    kept = weight.detach() if mask is None else weight.detach()[mask]
    return max(float(kept.square().mean().sqrt()), 1e-4) if kept.numel() else 0.0
