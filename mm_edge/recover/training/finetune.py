"""Fine-tuning under masks (phase 3 in docs/method.md), taught by the dense network.

    loss   = s CE(label, student) + (1 - s) T^2 KL(softmax(teacher / T) || softmax(student / T))
    w     <- AdamW(w), then M w: the mask comes after every step, so that what was pruned never grows back
    rate   = a linear rise to the peak, then half a cosine down to zero (schedule.py)
    e     <- d e + (1 - d) w,   d = min(1 - 1 / horizon, (1 + t) / (10 + t)),   horizon = steps / 20

A network that is no classifier is taught by all outputs of the dense network instead, each channel c alike:

    loss   = sum over outputs of mean_c [ mean (teacher_c - student_c)^2 / Var(teacher_c) ]

Its images are those it takes, mirrored half of the time and not mixed. It stays in eval mode, because the code of many
detectors answers otherwise in training mode.

After every epoch the averaged weights e are judged on validation images, as the compact graph. The best state is kept;
the state before training is one of the candidates. Half of the batches are mixed (mixup or cutmix), their labels too.

Every random choice follows from the seed and either the epoch and the number of an image or the number of a step. A
stored state holds everything else. A run that is killed at any moment and resumed therefore gives the same result as an
unbroken run, on a CPU bit for bit.

Exactness (E8 in docs/method.md): the rows, the scale and the shift of a removed channel are zero after every step, so
that it contributes nothing whatever its running statistics become. The result has those statistics as they were before
training. Removed channels are dropped from the trained module if its code allows it (shrink.py); the result is in the
dense shapes.

On a CPU with bfloat16 instructions both networks run in bfloat16 where that is faster (`autocast_type`). The weights,
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
from mm_edge.quality.divergences import LEAST_VARIANCE
from mm_edge.records import InputSpec
from mm_edge.recover.training.schedule import rise_and_fall
from mm_edge.recover.training.shrink import Slices, shrink_

# The most pixels in one forward and backward pass: 32 images of 224 x 224. A larger batch is accumulated in parts.
PIXELS_AT_ONCE = 32 * 224 * 224
LEAST_AT_ONCE = 8
# Area and aspect ratio of a random crop. They are milder than in training from scratch, because the network already has
# its features.
CROP_SCALE = (0.6, 1.0)
CROP_RATIO = (0.8, 1.25)
WORKERS = 8
# Memory for decoded images, so that later epochs need not decode them again: 170,000 images of 32 x 32.
DECODED_BYTES = 512 * 2**20
# From this width on a layer is faster in bfloat16: 1.8 times in a residual network, not at all in a transformer of
# width 64.
WIDE = 128


@dataclass(frozen=True)
class Settings:
    """How to fine-tune.

    Attributes:
        epochs: the most passes over the images.
        batch: images per step.
        peak: the highest learning rate.
        warm_up: share of the steps in which the learning rate rises.
        weight_decay: of tensors with more than one axis; the others do not decay.
        temperature: T of the distillation.
        label_share: s; with 0 labels are not used.
        by_outputs: whether all outputs of the dense network teach, and not its class scores.
        mixed: share of the batches that are mixed.
        patience: training stops after so many epochs without a better state.
        checkpoint_s: seconds between stored states; the end of every epoch stores one as well.
        seed: of every random choice.
    """

    epochs: int = 10
    batch: int = 128
    peak: float = 5e-4
    warm_up: float = 0.05
    weight_decay: float = 0.05
    temperature: float = 2.0
    label_share: float = 0.5
    by_outputs: bool = False
    mixed: float = 0.5
    patience: int = 3
    checkpoint_s: float = 180.0
    seed: int = 0


@dataclass(frozen=True)
class Student:
    """The pruned network that is fine-tuned, and the dense network that teaches it.

    Attributes:
        dense: the teacher's module; it is copied and not changed.
        start: the pruned network's state by name, dense-shaped and masked.
        masks: by the name of a parameter, True where a weight stays.
        idle: by the name of a buffer, False where its channel was removed.
        trainable: names of the parameters that may change; the exported graph does not hold the others by name.
        groups: the slices of each coupled group that lost channels, from `group_slices`.
    """

    dense: nn.Module
    start: Mapping[str, Array]
    masks: Mapping[str, BoolArray]
    idle: Mapping[str, BoolArray]
    trainable: frozenset[str]
    groups: tuple[Slices, ...] = ()


@dataclass(frozen=True)
class Score:
    """How good a state is on validation images: higher accuracy is better, then lower divergence.

    Attributes:
        accuracy: top-1, in [0, 1]; None without labels.
        kl: the divergence from the dense network in nats; None if it was not measured.
    """

    accuracy: float | None
    kl: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """The key to compare scores by; larger is better."""
        return (-1.0 if self.accuracy is None else self.accuracy, -math.inf if self.kl is None else -self.kl)


@dataclass(frozen=True)
class FineTuned:
    """The result of fine-tuning.

    Attributes:
        tensors: the best state by name, dense-shaped and masked; None if none was better than the start.
        epochs: how many epochs were run.
        reason: why training stopped.
    """

    tensors: Arrays | None
    epochs: int
    reason: str


@dataclass(frozen=True)
class Checkpoints:
    """Stores an unfinished run: `load` returns what `save` was last given, None if that never happened."""

    load: Callable[[], Arrays | None] = lambda: None
    save: Callable[[Arrays], None] = lambda arrays: None


# Scores a state (by name, dense-shaped and masked) on validation images; None if there are none.
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
        images: calibration images; their labels are read where the settings give labels a share.
        spec: the network's input.
        judge: scores a state on validation images. If there are none it returns None, and the last state is kept.
        settings: how to fine-tune.
        checkpoints: stores an unfinished run and finds it again.
        advance: called with (steps done, of how many).
        tell: called with a line of text after every epoch.

    Raises:
        UsageError: fewer than two images.
        JobError: a mask names no parameter of the network.
    """
    if images.position_count < 2:
        raise UsageError(f"--recover finetune has {images.position_count} calibration images; give at least 2")
    checkpoints = checkpoints or Checkpoints()
    _, height, width = spec.shape
    batching = _make_batching(images.position_count, height * width, settings)
    with _own_randomness():
        run = _Run(student, spec, settings, batching, choose_device())
        kept = checkpoints.load()
        if kept is None:
            run.judge_(judge)
        else:
            run.restore_(kept)
        _train_(run, images, judge, checkpoints, advance, tell)
    return run.result()


def choose_device() -> torch.device:
    """Return the fastest device of this machine: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast_type(module: nn.Module, device: torch.device) -> torch.dtype | None:
    """Return bfloat16 where `module` trains faster in it on this machine, else None.

    The answer is bfloat16 on a CPU with bfloat16 instructions if most weights are in wide layers and no convolution is
    grouped. Measured speed-ups: 1.7 to 1.9 for residual networks, 1.4 for a ViT of width 192, but 0.6 to 0.7 for
    networks of depthwise convolutions. It follows from a rule instead of a measurement on the spot, so that two runs on
    a machine never differ in it.
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
    return rise_and_fall(step, steps, max(1, round(settings.warm_up * steps)), settings.peak)


@dataclass(frozen=True)
class _Batching:
    """How the images are divided into steps of `batch` images, and a step into parts of `at_once` images.

    The gradients of a step's parts are added up.
    """

    images: int
    batch: int
    at_once: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.batch

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def parts(self) -> int:
        return -(-self.batch // self.at_once)

    def order(self, epoch: int) -> npt.NDArray[np.intp]:
        """Return the numbers of an epoch's images in order; those that fill no whole batch are left out."""
        generator = np.random.default_rng((self.seed, epoch))
        return generator.permutation(self.images)[: self.steps_per_epoch * self.batch]


def _make_batching(images: int, pixels: int, settings: Settings) -> _Batching:
    batch = min(settings.batch, images)
    # The parts have nearly the same size, so that none has too few images for its BatchNorm statistics.
    parts = -(-batch // max(LEAST_AT_ONCE, PIXELS_AT_ONCE // pixels))
    return _Batching(images, batch, -(-batch // parts), settings.epochs, settings.seed)


def _train_(
    run: _Run,
    images: ImageSet,
    judge: Judge,
    checkpoints: Checkpoints,
    advance: Advance | None,
    tell: Callable[[str], None] | None,
) -> None:
    """Run the steps that are left, or fewer if training stops early."""
    batching, settings = run.batching, run.settings
    if run.stopped:
        return
    parts = iter(_load_parts(images, run))
    stored = time.monotonic()
    while not run.stopped:
        # Mixing and dropout then draw the same numbers in a run that was killed and is resumed at this step.
        _seed_all(settings.seed, 1, run.step)
        run.update_([next(parts) for _ in range(batching.parts)])
        if advance is not None:
            advance(run.step, batching.steps)
        if run.step % batching.steps_per_epoch == 0:
            run.judge_(judge)
            if tell is not None:
                tell(run.describe())
        elif time.monotonic() - stored < settings.checkpoint_s:
            continue
        checkpoints.save(run.stored())
        stored = time.monotonic()


class _Run:
    """The state of a run. Together with the seed it determines everything that follows."""

    def __init__(
        self, student: Student, spec: InputSpec, settings: Settings, batching: _Batching, device: torch.device
    ) -> None:
        self.spec, self.settings, self.batching, self.device = spec, settings, batching, device
        self.step = 0
        self._student = student
        # Convolutions train a fifth faster in channels last on a CPU; on mps that layout has given wrong results.
        self._layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
        self._type = autocast_type(student.dense, device)
        self._teacher, self._module = copy.deepcopy(student.dense), copy.deepcopy(student.dense)
        self._teacher.eval().requires_grad_(False)
        _assign_(self._module.state_dict(), student.start)
        bind_masks(self._module, student.masks).apply_()
        self._shrunk = shrink_(self._module, student.groups, _example(spec))
        for module in (self._teacher, self._module):
            module.to(device).to(memory_format=self._layout)  # type: ignore[call-overload]
        self._module.train(not settings.by_outputs)
        for name, parameter in self._module.named_parameters():
            parameter.requires_grad_(name in student.trainable)
        masks = {name: self._shrunk.take(name, mask) for name, mask in student.masks.items()}
        self._masks = bind_masks(self._module, {name: mask for name, mask in masks.items() if not mask.all()})
        self._named = {name: item for name, item in self._module.named_parameters() if item.requires_grad}
        self._optimiser = _make_optimiser(self._named, settings)
        self._average = {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}
        self._history: list[Score | None] = []
        self._best: Arrays | None = None
        self._classes, self._mixup = 0, None
        if not settings.by_outputs:
            with torch.no_grad():
                self._classes = len(_logits(self._teacher(torch.zeros(1, *spec.shape, device=device)))[0])
            self._mixup = _make_mixup(settings, self._classes)

    @property
    def stopped(self) -> str | None:
        """Why the run is over; None while it is not."""
        epochs = len(self._history) - 1
        if epochs >= self.batching.epochs:
            return f"all {epochs} epochs done" if epochs != 1 else "the one epoch done"
        waited = epochs - self._best_epoch
        if self._history[-1] is not None and waited >= self.settings.patience:
            return f"validation images found no better state in the last {waited} epochs"
        return None

    @property
    def _best_epoch(self) -> int:
        """The first epoch with the best score, 0 for the start; the last epoch if nothing was judged."""
        if self._history[-1] is None:
            return len(self._history) - 1
        ranks = [score.rank for score in self._history if score is not None]
        return ranks.index(max(ranks))

    def describe(self) -> str:
        """Return a line of text about the last epoch."""
        score = self._history[-1]
        said = "" if score is None or score.accuracy is None else f", validation top-1 {score.accuracy:.2%}"
        return f"epoch {len(self._history) - 1} of {self.batching.epochs}{said}"

    def update_(self, parts: list[tuple[Tensor, Tensor] | None]) -> None:
        """Do one step on `parts`, each of images (n, C, H, W) and labels (n,), or None if it could not be read."""
        read = [part for part in parts if part is not None]
        total = sum(len(images) for images, _ in read)
        self._optimiser.zero_grad(set_to_none=True)
        for images, labels in read:
            loss = self._loss(images.to(self.device, memory_format=self._layout), labels.to(self.device))
            (loss * (len(images) / total)).backward()  # type: ignore[no-untyped-call]
        # A torch.optim.lr_scheduler would be one more state to store; the rate follows from the step alone.
        for group in self._optimiser.param_groups:
            group["lr"] = rate(self.step, self.batching.steps, self.settings)
        if read:
            nn.utils.clip_grad_norm_(self._named.values(), 1.0)
            self._optimiser.step()
            self._masks.apply_()
        self.step += 1
        self._follow_()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.settings.by_outputs:
            return self._error(images)
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

    def _error(self, images: Tensor) -> Tensor:
        """Return the squared error of all outputs over the variance of their channels in the batch."""
        with self._autocast():
            with torch.no_grad():
                taught = output_tensors(self._teacher(images))
            found = output_tensors(self._module(images))
        total = torch.zeros((), device=self.device)
        for theirs, own in zip(taught, found, strict=True):
            if own.requires_grad:
                wanted, given = (_by_channel(item) for item in (theirs, own))
                variance = wanted.var(dim=(0, 2), correction=0).clamp_min(LEAST_VARIANCE)
                total = total + ((wanted - given).square().mean(dim=(0, 2)) / variance).mean()
        return total

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self._type is None else torch.autocast(self.device.type, self._type)

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (n, C, H, W), mixed or not, and their targets (n, classes)."""
        if self._mixup is None or len(images) % 2:  # timm mixes the first image with the last, and so on
            return images, functional.one_hot(labels, self._classes).float()
        mixed: tuple[Tensor, Tensor] = self._mixup(images, labels)
        return mixed

    @torch.no_grad()
    def _follow_(self) -> None:
        """Move the averaged weights toward the trained ones; integers, such as counts of batches, are copied.

        timm's ModelEmaV3 gives the same bits, except that it moves a tied tensor once for each of its names. torch's
        AveragedModel does not: it averages integers too, and its first update overwrites the average.
        """
        decay = min(1 - 1 / max(1.0, self.batching.steps / 20), (1 + self.step) / (10 + self.step))
        for name, tensor in self._module.state_dict().items():
            if tensor.is_floating_point():
                self._average[name].lerp_(tensor, 1 - decay)
            else:
                self._average[name].copy_(tensor)

    def judge_(self, judge: Judge) -> None:
        """Score the averaged weights as they are now, and keep them if they are the best so far."""
        state = self._dense_shaped_average()
        self._history.append(judge(state))
        if self._best_epoch == len(self._history) - 1:
            self._best = state

    def _dense_shaped_average(self) -> Arrays:
        """Return the averaged weights, dense-shaped, with the statistics of removed channels from before training."""
        state: Arrays = {}
        for name, tensor in self._average.items():
            start, stays = self._student.start[name], self._student.idle.get(name)
            array = self._shrunk.put(name, tensor.cpu().numpy().copy(), start)
            state[name] = array if stays is None else np.where(stays, array, start)
        return state

    def result(self) -> FineTuned:
        """Return the result, once the run has stopped."""
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
        """Take over the state that `stored` returned."""
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
        # load_state_dict moves every tensor to the device of its parameter.
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
    """Return the first tensor of a module's output: in training some modules return a second head's answers too."""
    return output_tensors(output)[0]


def _by_channel(output: Tensor) -> Tensor:
    """Return an output as (images, channels, positions)."""
    return output.float().flatten(2) if output.dim() > 2 else output.float().reshape(len(output), -1, 1)


def _make_optimiser(named: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Return AdamW; tensors with one axis (biases, norms) do not decay."""
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
    """Augmented images, uint8 (C, H, W), with their labels, by (epoch, number of the image).

    An image is augmented in the same manner whichever process reads it and in whichever order. Decoded images are kept
    in memory up to `room` bytes.
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
            normalize=False,  # _stack normalises a whole batch
        )

    def __getitem__(self, key: tuple[int, int]) -> Sample | None:
        found = self._read(key[1])
        if found is None:
            return None
        _seed_process(self._seed, 2, *key)
        return self._transform(found[0]), found[1]

    def _read(self, number: int) -> tuple[Image.Image, int] | None:
        kept = self._decoded.get(number)
        if kept is not None:
            return Image.fromarray(kept[0]), kept[1]
        found = self._images.at(number)
        if found is not None:
            pixels = np.array(found[0])
            if pixels.nbytes <= self._room:
                self._room -= pixels.nbytes
                self._decoded[number] = pixels, found[1]
        return found


class _Mirrored(Dataset[Sample | None]):
    """Inputs as the network takes them, with their labels, by (epoch, number); half of them mirrored."""

    def __init__(self, images: ImageSet, seed: int) -> None:
        self._images, self._seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample | None:
        found = self._images.input(key[1])
        if found is None:
            return None
        flip = np.random.default_rng((self._seed, 2, *key)).random() < 0.5
        array = np.ascontiguousarray(found[0][..., ::-1] if flip else found[0])
        return torch.from_numpy(array), found[1]


class _Order:
    """Yields the keys of the images of every part, from the step `first` on."""

    def __init__(self, batching: _Batching, first: int) -> None:
        self._batching, self._first = batching, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batching = self._batching
        for epoch in range(self._first // batching.steps_per_epoch, batching.epochs):
            batches = batching.order(epoch).reshape(batching.steps_per_epoch, batching.batch)
            done = self._first % batching.steps_per_epoch if epoch == self._first // batching.steps_per_epoch else 0
            for batch in batches[done:]:
                for start in range(0, batching.batch, batching.at_once):
                    yield [(epoch, int(number)) for number in batch[start : start + batching.at_once]]


def _load_parts(images: ImageSet, run: _Run) -> Any:
    # On a CPU the workers would compete with training for the cores; other devices compute while images are prepared.
    by_outputs, seed = run.settings.by_outputs, run.settings.seed
    workers = 0 if run.device.type == "cpu" else min(WORKERS, os.cpu_count() or 1)
    return DataLoader(
        _Mirrored(images, seed) if by_outputs else _Augmented(images, run.spec, seed, DECODED_BYTES // max(1, workers)),
        batch_sampler=_Order(run.batching, run.step),
        collate_fn=_stack_inputs if by_outputs else partial(_stack, run.spec),
        num_workers=workers,
    )


def _stack(spec: InputSpec, samples: list[Sample | None]) -> tuple[Tensor, Tensor] | None:
    """Return normalised images (n, C, H, W) and their labels (n,), without those that could not be read.

    None if fewer than two images are left: BatchNorm could not normalise them.
    """
    read = [sample for sample in samples if sample is not None]
    if len(read) < 2:
        return None
    pixels = torch.stack([image for image, _ in read]).float().div_(255)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
    return pixels.sub_(mean).div_(std), torch.tensor([label for _, label in read])


def _stack_inputs(samples: list[Sample | None]) -> tuple[Tensor, Tensor] | None:
    """Return inputs (n, ...) and their labels (n,), without those that could not be read; None if none is left."""
    read = [sample for sample in samples if sample is not None]
    if not read:
        return None
    return torch.stack([image for image, _ in read]), torch.tensor([label for _, label in read])


def _seed_all(*numbers: int) -> None:
    """Seed every generator that mixing and a module draw from, on all devices."""
    torch.manual_seed(_seed_process(*numbers))


def _seed_process(*numbers: int) -> int:
    """Seed every generator that timm's augmentation draws from, and return the seed.

    Of PyTorch's generators only the CPU's is seeded, which is 80 times faster than to seed all.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Restore the caller's random generators afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
