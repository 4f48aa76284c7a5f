"""Fine-tuning under masks (method.md, phase 3), taught by the dense network.

    loss   = s CE(label, student) + (1 - s) T^2 KL(softmax(teacher / T) || softmax(student / T))
    w     <- AdamW(w), then M w: the mask comes after every step, so that what was pruned never grows back
    rate   = peak * min(t / warm, (1 + cos(pi (t - warm) / (steps - warm))) / 2)
    e     <- d e + (1 - d) w,   d = min(1 - 1 / horizon, (1 + t) / (10 + t))

The averaged weights e are what is judged after every epoch, on validation images, by the compact graph itself; the
best state is kept, the one training started from among them. Half of the batches are mixed (mixup or cutmix), their
labels with them.

Every random choice follows from the seed, the epoch and the place of an image or the number of a step, and a stored
state holds everything else, so that a run killed at any moment ends as an unbroken one: on a CPU bit for bit.

Exactness (E8): a removed channel's rows, scale and shift are zero after every step, so whatever its running statistics
become it contributes nothing. They are given the values they started with when the weights are handed back. What is
trained is smaller still: removed channels are dropped from the module where its code allows it (shrink.py), and the
weights are handed back in the dense shapes.

On a CPU that multiplies bfloat16 natively both networks run in it where that is faster (`autocast_type`); weights,
their average and the optimiser stay fp32.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from mm_edge.arrays import Array, Arrays, BoolArray
from mm_edge.errors import UsageError
from mm_edge.graph.export import output_tensors
from mm_edge.load.data import ImageSet
from mm_edge.plan.masks import bind_masks
from mm_edge.progress import Advance
from mm_edge.records import InputSpec
from mm_edge.recover.training.shrink import Slices, shrink_

# Activations kept for a backward pass: 32 images of 224 x 224. A larger batch is accumulated.
PIXELS_AT_ONCE = 32 * 224 * 224
LEAST_AT_ONCE = 8
# Part of the picture a random crop keeps, and its aspect: milder than training from scratch, the features are there.
CROP_SCALE = (0.6, 1.0)
CROP_RATIO = (0.8, 1.25)
WORKERS = 8
# Decoded images kept in memory, so that an epoch after the first decodes nothing: 170,000 of 32 x 32.
DECODED_BYTES = 512 * 2**20
# bfloat16 pays in layers this wide: 1.8 times faster in a residual network, no faster in a transformer of width 64.
WIDE = 128


@dataclass(frozen=True)
class Settings:
    """How to fine-tune.

    Attributes:
        epochs: at most so many passes over the images.
        batch: images a step.
        peak: highest learning rate.
        warm_up: share of the steps the rate rises in.
        weight_decay: of tensors with more than one axis.
        temperature: T of the distillation.
        label_share: s; 0 distils only.
        mixed: share of the batches that are mixed.
        patience: epochs without a better one after which it stops.
        checkpoint_s: seconds between stored states; the end of an epoch stores one as well.
        seed: of every random choice.
    """

    epochs: int = 10
    batch: int = 128
    peak: float = 5e-4
    warm_up: float = 0.05
    weight_decay: float = 0.05
    temperature: float = 2.0
    label_share: float = 0.5
    mixed: float = 0.5
    patience: int = 3
    checkpoint_s: float = 180.0
    seed: int = 0


@dataclass(frozen=True)
class Student:
    """What is fine-tuned.

    Attributes:
        dense: the dense network, the teacher; it is copied and stays as it is.
        start: the pruned network's state by name, dense-shaped and masked.
        masks: by parameter, True where weights stay.
        idle: by buffer, False where its channel was removed.
        trainable: the parameters that may change; the others are not in the exported graph under their own names.
        groups: of each coupled group that lost channels, what stays of the tensors it reaches.
    """

    dense: nn.Module
    start: Mapping[str, Array]
    masks: Mapping[str, BoolArray]
    idle: Mapping[str, BoolArray]
    trainable: frozenset[str]
    groups: tuple[Slices, ...] = ()


@dataclass(frozen=True)
class Score:
    """What validation images say of a state: the higher the accuracy, then the lower the divergence, the better."""

    accuracy: float | None
    kl: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """Return what to compare by; larger is better."""
        return (-1.0 if self.accuracy is None else self.accuracy, -math.inf if self.kl is None else -self.kl)


@dataclass(frozen=True)
class FineTuned:
    """The best state found.

    Attributes:
        tensors: the state by name, dense-shaped and masked; None where none was better than the start.
        epochs: how many were run.
        reason: why it stopped.
    """

    tensors: Arrays | None
    epochs: int
    reason: str


@dataclass(frozen=True)
class Checkpoints:
    """Where an unfinished run is kept: `load` returns what `save` was last given, None where there is nothing."""

    load: Callable[[], Arrays | None] = lambda: None
    save: Callable[[Arrays], None] = lambda arrays: None


Judge = Callable[[Arrays], Score | None]


def finetune(
    student: Student,
    images: ImageSet,
    spec: InputSpec,
    judge: Judge,
    settings: Settings,
    checkpoints: Checkpoints | None = None,
    advance: Advance | None = None,
    tell: Callable[[str], None] | None = None,
) -> FineTuned:
    """Fine-tune a pruned network on `images` and return the best state.

    Args:
        student: the pruned network and its teacher.
        images: calibration images with their labels.
        spec: the network's input.
        judge: scores a state on validation images; returns None where there are none: the last state is then kept.
        settings: how.
        checkpoints: where an unfinished run is kept.
        advance: called with (steps done, of how many).
        tell: called with a line after every epoch.

    Raises:
        UsageError: fewer than two images.
        JobError: a mask names no parameter of the network.
    """
    if images.places < 2:
        raise UsageError(f"--recover finetune has {images.places} calibration images; give at least 2")
    checkpoints = checkpoints or Checkpoints()
    _, height, width = spec.shape
    plan = _make_plan(images.places, height * width, settings)
    with _own_randomness():
        run = _Run(student, spec, settings, plan, choose_device())
        kept = checkpoints.load()
        if kept is None:
            run.judge_(judge)
        else:
            run.restore_(kept)
        _train_(run, images, judge, checkpoints, advance, tell)
    return run.result()


def choose_device() -> torch.device:
    """Return the fastest of cuda, mps and cpu that is here."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast_type(module: nn.Module, device: torch.device) -> torch.dtype | None:
    """Return bfloat16 where `module` trains faster in it on this machine, else None.

    On a CPU with bfloat16 instructions that is so when most weights are in wide layers and no convolution is grouped:
    measured 1.7 to 1.9 times for residual networks and 1.4 for a ViT of width 192, and 0.6 to 0.7 times for networks
    of depthwise convolutions. A rule and no measurement, so that two runs never differ in it.
    """
    if device.type != "cpu" or not _has_bfloat16():
        return None
    wide = total = 0
    for layer in module.modules():
        if getattr(layer, "groups", 1) > 1:
            return None
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            total += weight.numel()
            wide += weight.numel() * (min(weight.shape[:2]) >= WIDE)
    return torch.bfloat16 if wide > total / 2 else None


def _has_bfloat16() -> bool:
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so they may go
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def rate(step: int, steps: int, settings: Settings) -> float:
    """Return the learning rate of `step`, from 0, of `steps`."""
    warm = max(1, round(settings.warm_up * steps))
    if step < warm:
        return settings.peak * (step + 1) / warm
    return settings.peak * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


@dataclass(frozen=True)
class _Plan:
    """How the images are cut into steps of `batch`, and a step into parts of `at_once` images that add up."""

    places: int
    batch: int
    at_once: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return self.places // self.batch

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def parts(self) -> int:
        return -(-self.batch // self.at_once)

    def order(self, epoch: int) -> npt.NDArray[np.intp]:
        """Return the places of an epoch's images; what fills no batch waits for another epoch."""
        generator = np.random.default_rng((self.seed, epoch))
        return generator.permutation(self.places)[: self.steps_per_epoch * self.batch]


def _make_plan(places: int, pixels: int, settings: Settings) -> _Plan:
    batch = min(settings.batch, places)
    # Parts of nearly one size: none is left with too few images for its BatchNorm statistics.
    parts = -(-batch // max(LEAST_AT_ONCE, PIXELS_AT_ONCE // pixels))
    return _Plan(places, batch, -(-batch // parts), settings.epochs, settings.seed)


def _train_(
    run: _Run,
    images: ImageSet,
    judge: Judge,
    checkpoints: Checkpoints,
    advance: Advance | None,
    tell: Callable[[str], None] | None,
) -> None:
    """Run the steps that are left, unless it stops early."""
    plan, settings = run.plan, run.settings
    if run.stopped:
        return
    parts = iter(_load_parts(images, run))
    stored = time.monotonic()
    while not run.stopped:
        # Whatever draws in this step (mixing, dropout) draws the same in a run that was killed and goes on here.
        _seed_all(settings.seed, 1, run.step)
        run.update_([next(parts) for _ in range(plan.parts)])
        if advance is not None:
            advance(run.step, plan.steps)
        if run.step % plan.steps_per_epoch == 0:
            run.judge_(judge)
            if tell is not None:
                tell(run.describe())
        elif time.monotonic() - stored < settings.checkpoint_s:
            continue
        checkpoints.save(run.stored())
        stored = time.monotonic()


class _Run:
    """The state of a run: everything that follows is determined by it and the seed."""

    def __init__(
        self, student: Student, spec: InputSpec, settings: Settings, plan: _Plan, device: torch.device
    ) -> None:
        self.spec, self.settings, self.plan, self.device = spec, settings, plan, device
        self.step = 0
        self._student = student
        # Convolutions train a fifth faster so on a CPU; on mps the layout has had wrong results.
        self._layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
        self._type = autocast_type(student.dense, device)
        self._teacher, self._module = copy.deepcopy(student.dense), copy.deepcopy(student.dense)
        self._teacher.eval().requires_grad_(False)
        _assign_(self._module.state_dict(), student.start)
        bind_masks(self._module, student.masks).apply_()
        self._shrunk = shrink_(self._module, student.groups, _example(spec))
        for network in (self._teacher, self._module):
            network.to(device).to(memory_format=self._layout)  # type: ignore[call-overload]
        self._module.train()
        for name, parameter in self._module.named_parameters():
            parameter.requires_grad_(name in student.trainable)
        masks = {name: self._shrunk.take(name, mask) for name, mask in student.masks.items()}
        self._masks = bind_masks(self._module, {name: mask for name, mask in masks.items() if not mask.all()})
        self._named = {name: item for name, item in self._module.named_parameters() if item.requires_grad}
        self._optimiser = _make_optimiser(self._named, settings)
        self._average = {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}
        self._history: list[Score | None] = []
        self._best: Arrays | None = None
        with torch.no_grad():
            self._classes = len(_logits(self._teacher(torch.zeros(1, *spec.shape, device=device)))[0])
        self._mixup = _make_mixup(settings, self._classes)

    @property
    def stopped(self) -> str | None:
        """Why the run is over; None while it is not."""
        epochs = len(self._history) - 1
        if epochs >= self.plan.epochs:
            return f"all {epochs} epochs done" if epochs != 1 else "the one epoch done"
        waited = epochs - self._best_epoch
        if self._history[-1] is not None and waited >= self.settings.patience:
            return f"validation images found no better state in the last {waited} epochs"
        return None

    @property
    def _best_epoch(self) -> int:
        """The first epoch no other beats, 0 for the start; the last one where nothing was judged."""
        if self._history[-1] is None:
            return len(self._history) - 1
        ranks = [score.rank for score in self._history if score is not None]
        return ranks.index(max(ranks))

    def describe(self) -> str:
        """Return a line about the last epoch."""
        score = self._history[-1]
        said = "" if score is None or score.accuracy is None else f", validation top-1 {score.accuracy:.2%}"
        return f"epoch {len(self._history) - 1} of {self.plan.epochs}{said}"

    def update_(self, parts: list[tuple[Tensor, Tensor] | None]) -> None:
        """Do one step on the images of all `parts`: (n, C, H, W) and labels (n,) each."""
        read = [part for part in parts if part is not None]
        total = sum(len(images) for images, _ in read)
        self._optimiser.zero_grad(set_to_none=True)
        for images, labels in read:
            loss = self._loss(images.to(self.device, memory_format=self._layout), labels.to(self.device))
            (loss * (len(images) / total)).backward()  # type: ignore[no-untyped-call]
        for group in self._optimiser.param_groups:
            group["lr"] = rate(self.step, self.plan.steps, self.settings)
        if read:
            nn.utils.clip_grad_norm_(self._named.values(), 1.0)
            self._optimiser.step()
            self._masks.apply_()
        self.step += 1
        self._follow_()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        images, targets = self._mix(images, labels)
        with self._autocast():
            with torch.no_grad():
                taught = _logits(self._teacher(images)).float()
            logits = _logits(self._module(images)).float()
        heat, share = self.settings.temperature, self.settings.label_share
        distilled = functional.kl_div(
            functional.log_softmax(logits / heat, 1),
            functional.log_softmax(taught / heat, 1),
            reduction="batchmean",
            log_target=True,
        )
        loss = (1 - share) * heat**2 * distilled
        return loss + share * functional.cross_entropy(logits, targets) if share else loss

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self._type is None else torch.autocast(self.device.type, self._type)

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images, mixed or not, and their targets (n, classes)."""
        if self._mixup is None or len(images) % 2:  # timm pairs the first image with the last
            return images, functional.one_hot(labels, self._classes).float()
        mixed: tuple[Tensor, Tensor] = self._mixup(images, labels)
        return mixed

    @torch.no_grad()
    def _follow_(self) -> None:
        """Move the averaged weights after the trained ones; whole numbers are taken as they are."""
        decay = min(1 - 1 / max(1.0, self.plan.steps / 20), (1 + self.step) / (10 + self.step))
        for name, tensor in self._module.state_dict().items():
            if tensor.is_floating_point():
                self._average[name].lerp_(tensor, 1 - decay)
            else:
                self._average[name].copy_(tensor)

    def judge_(self, judge: Judge) -> None:
        """Score the averaged weights as they are now, and keep them where they are the best."""
        state = self._handed_back()
        self._history.append(judge(state))
        if self._best_epoch == len(self._history) - 1:
            self._best = state

    def _handed_back(self) -> Arrays:
        """Return the averaged weights, dense-shaped; the statistics of removed channels are those of the start."""
        state: Arrays = {}
        for name, tensor in self._average.items():
            start, stays = self._student.start[name], self._student.idle.get(name)
            array = self._shrunk.put(name, tensor.cpu().numpy().copy(), start)
            state[name] = array if stays is None else np.where(stays, array, start)
        return state

    def result(self) -> FineTuned:
        """Return the best state, once the run has stopped."""
        epochs, reason, best = len(self._history) - 1, self.stopped or "", self._best_epoch
        if self._history[-1] is None:
            return FineTuned(self._best, epochs, reason)
        if best == 0:
            return FineTuned(None, epochs, f"{reason}; none was better than the start")
        return FineTuned(self._best, epochs, f"{reason}; epoch {best} is the best" if epochs > 1 else reason)

    def stored(self) -> Arrays:
        """Return everything that `restore_` needs, as arrays."""
        found: Arrays = {}
        for kind, tensors in (("module", self._module.state_dict()), ("average", self._average)):
            found |= {f"{kind}/{name}": tensor.cpu().numpy().copy() for name, tensor in tensors.items()}
        for name, parameter in self._named.items():
            moments = self._optimiser.state[parameter]
            found |= {f"{kind}/{name}": tensor.cpu().numpy().copy() for kind, tensor in moments.items()}
        if self._best is not None:
            found |= {f"best/{name}": array for name, array in self._best.items()}
        history = [None if score is None else [score.accuracy, score.kl] for score in self._history]
        progress = json.dumps({"step": self.step, "history": history}).encode()
        return {**found, "progress": np.frombuffer(progress, dtype=np.uint8)}

    def restore_(self, found: Arrays) -> None:
        """Go back to what `stored` returned."""
        progress = json.loads(found["progress"].tobytes())
        self.step = progress["step"]
        self._history = [None if score is None else Score(*score) for score in progress["history"]]
        _assign_(self._module.state_dict(), _kind(found, "module"))
        _assign_(self._average, _kind(found, "average"))
        self._best = _kind(found, "best") or None
        kinds = {name.partition("/")[0] for name in found} - {"module", "average", "best", "progress"}
        for name, parameter in self._named.items():
            self._optimiser.state[parameter] = {
                kind: torch.from_numpy(found[f"{kind}/{name}"].copy()) for kind in kinds if f"{kind}/{name}" in found
            }
        # The optimiser's own loading puts each tensor on the device where it belongs.
        self._optimiser.load_state_dict(self._optimiser.state_dict())


def _kind(found: Arrays, kind: str) -> Arrays:
    return {name.partition("/")[2]: array for name, array in found.items() if name.startswith(f"{kind}/")}


@torch.no_grad()
def _assign_(tensors: Mapping[str, Tensor], arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        tensors[name].copy_(torch.from_numpy(np.array(array)))


def _example(spec: InputSpec) -> Tensor:
    """Return two inputs of noise, always the same."""
    return torch.randn(2, *spec.shape, generator=torch.Generator().manual_seed(0))


def _logits(output: object) -> Tensor:
    """Return the first of what a network returned: in training some return a second head's answer beside it."""
    return output_tensors(output)[0]


def _make_optimiser(named: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Return AdamW; what has one axis (biases, norms) does not decay."""
    several = [item for item in named.values() if item.ndim > 1]
    single = [item for item in named.values() if item.ndim <= 1]
    groups = [{"params": several, "weight_decay": settings.weight_decay}, {"params": single, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.peak)


def _make_mixup(settings: Settings, classes: int) -> Mixup | None:
    if not settings.mixed:
        return None
    return Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, prob=settings.mixed, label_smoothing=0.0, num_classes=classes)


Sample = tuple[Tensor, int]


class _Augmented(Dataset[Sample | None]):
    """Images by (epoch, place), augmented the same way whichever process and in whatever order they are read.

    An image is uint8 (C, H, W). Decoded images are kept while they take no more than `room` bytes.
    """

    def __init__(self, images: ImageSet, spec: InputSpec, seed: int, room: int = 0) -> None:
        self._images, self._seed, self._room = images, seed, room
        self._decoded: dict[int, tuple[npt.NDArray[np.uint8], int]] = {}
        self._transform = create_transform(
            input_size=spec.shape,
            is_training=True,
            scale=CROP_SCALE,
            ratio=CROP_RATIO,
            hflip=0.5,
            color_jitter=None,
            interpolation=spec.interpolation,
            normalize=False,  # a batch at a time, in _stack
        )

    def __getitem__(self, key: tuple[int, int]) -> Sample | None:
        found = self._read(key[1])
        if found is None:
            return None
        _seed_process(self._seed, 2, *key)
        return self._transform(found[0]), found[1]

    def _read(self, place: int) -> tuple[Image.Image, int] | None:
        kept = self._decoded.get(place)
        if kept is not None:
            return Image.fromarray(kept[0]), kept[1]
        found = self._images.at(place)
        if found is not None:
            pixels = np.array(found[0])
            if pixels.nbytes <= self._room:
                self._room -= pixels.nbytes
                self._decoded[place] = pixels, found[1]
        return found


class _Order:
    """The keys of every part of a step from `first` on."""

    def __init__(self, plan: _Plan, first: int) -> None:
        self._plan, self._first = plan, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan = self._plan
        for epoch in range(self._first // plan.steps_per_epoch, plan.epochs):
            batches = plan.order(epoch).reshape(plan.steps_per_epoch, plan.batch)
            done = self._first % plan.steps_per_epoch if epoch == self._first // plan.steps_per_epoch else 0
            for batch in batches[done:]:
                for start in range(0, plan.batch, plan.at_once):
                    yield [(epoch, int(place)) for place in batch[start : start + plan.at_once]]


def _load_parts(images: ImageSet, run: _Run) -> Any:
    # On a CPU the workers would take the cores that train; elsewhere images are prepared while the device computes.
    workers = 0 if run.device.type == "cpu" else min(WORKERS, os.cpu_count() or 1)
    return DataLoader(
        _Augmented(images, run.spec, run.settings.seed, DECODED_BYTES // max(1, workers)),
        batch_sampler=_Order(run.plan, run.step),
        collate_fn=partial(_stack, run.spec),
        num_workers=workers,
    )


def _stack(spec: InputSpec, samples: list[Sample | None]) -> tuple[Tensor, Tensor] | None:
    """Return a part of a batch, normalised, without what could not be read.

    None where BatchNorm would have nothing to average.
    """
    read = [sample for sample in samples if sample is not None]
    if len(read) < 2:
        return None
    pixels = torch.stack([image for image, _ in read]).float().div_(255)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
    return pixels.sub_(mean).div_(std), torch.tensor([label for _, label in read])


def _seed_all(*numbers: int) -> None:
    """Seed every generator that mixing and a network draw from, those of all devices among them."""
    torch.manual_seed(_seed_process(*numbers))


def _seed_process(*numbers: int) -> int:
    """Seed every generator that timm's augmentation draws from; of PyTorch's that of the CPU alone, 80 times faster."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Give the caller's generators back as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
