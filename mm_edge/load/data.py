"""Images, split into calibration, validation and test, preprocessed as the network expects.

Photos come from sources.py, and inputs that are ready from ready.py. Every photo is decoded and resized at most once
per run while memory allows (see CACHE_BYTES), and one that cannot be read is left out with a warning, never replaced.

One pool is split by a stratified cut: with r the random rank of an image among the n of its class and u one random
number per class, images sorted by (r + u) / n are cut at the cumulative fractions. Each split has its exact size, and
the number of images of each class in it is within one of the class's share.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from mm_edge.arrays import Array, BoolArray, Float32Array, IntArray
from mm_edge.errors import DataError, reading
from mm_edge.load.network import ModelInput
from mm_edge.load.photos import Bytes, normalise, pixels_of, with_channels
from mm_edge.load.ready import ReadyPool, open_ready
from mm_edge.load.sources import UNREADABLE, Source, open_sources, settle_labels_
from mm_edge.records import InputSpec, to_json

SPLITS = ("calibration", "validation", "test")
# Preprocessed images kept in memory per data source: 10,000 images of 224 x 224, or 500,000 of 32 x 32.
CACHE_BYTES = 1536 * 2**20


class Named(Protocol):
    """What is known of a pool's members without reading them; sources.Source is one."""

    classes: tuple[str, ...]
    labels: IntArray

    def name(self, index: int) -> str:
        """Return the name of a member for messages."""

    def identity(self) -> str:
        """Return a text that changes when the members do."""


class Pool(Protocol):
    """Photos, or inputs that are ready, which the splits are cut from. It is here that batches are made of them."""

    spec: InputSpec

    @property
    def source(self) -> Named:
        """Its members' names and labels."""

    @property
    def readable(self) -> BoolArray:
        """Whether each member can be read, as far as is known."""

    @property
    def unreadable(self) -> list[str]:
        """Names of the members that cannot."""

    @property
    def holds_photos(self) -> bool:
        """Whether its members are photos."""

    def read(self, index: int) -> npt.NDArray[Any] | None:
        """Return member `index` as `stack` takes it; None, and left out from then on, if it cannot be read."""

    def stack(self, pieces: Sequence[Any]) -> Float32Array:
        """Return what `read` returned for some members as one batch that the network takes."""

    def decode(self, index: int) -> Image.Image | None:
        """Return member `index` as a photo; None if it is none or cannot be read."""

    def prepared_for(self, spec: InputSpec) -> Pool:
        """Return the same members for another input.

        Raises:
            DataError: they are not photos.
        """


@dataclass
class _Holdings:
    """What pools of one source share, at whatever size they prepare its images.

    `readable` says per image whether it can be read, `unreadable` names those that cannot, `cached_bytes` is what the
    prepared images kept in memory take.
    """

    readable: BoolArray
    unreadable: list[str] = field(default_factory=list)
    cached_bytes: int = 0


class _PhotoPool:
    """One source with its preprocessing and what has been read of it so far."""

    def __init__(self, source: Source, spec: InputSpec, holdings: _Holdings | None = None) -> None:
        self.source = source
        self.spec = spec
        self._holdings = holdings or _Holdings(np.ones(len(source.labels), dtype=bool))
        self._cache: dict[int, Bytes] = {}
        self._fit = pixels_of(spec)

    @property
    def readable(self) -> BoolArray:
        """Whether each image can be read, as far as is known."""
        return self._holdings.readable

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that cannot."""
        return self._holdings.unreadable

    @property
    def holds_photos(self) -> bool:
        """True: its images can be prepared for another input."""
        return True

    def prepared_for(self, spec: InputSpec) -> _PhotoPool:
        """Return a pool of the same images for another input."""
        return _PhotoPool(self.source, spec, self._holdings)

    def check_all(self) -> None:
        """Leave out files that a quick check finds unreadable; other damage is found when a file is decoded."""
        for index in range(len(self.readable)):
            try:
                self.source.check(index)
            except UNREADABLE:
                self._leave_out(index)

    def _leave_out(self, index: int) -> None:
        self.readable[index] = False
        self.unreadable.append(self.source.name(index))

    def decode(self, index: int) -> Image.Image | None:
        """Return image `index` with the channels the model takes; None, and left out from then on, if unreadable."""
        try:
            return with_channels(self.source.decode(index), self.spec.shape[0])
        except UNREADABLE:
            if self.readable[index]:
                self._leave_out(index)
            return None

    def read(self, index: int) -> Bytes | None:
        """Return image `index` resized, uint8 (C, H, W); None, and left out from then on, if unreadable."""
        if index in self._cache:
            return self._cache[index]
        image = self.decode(index)
        if image is None:
            return None
        pixels = self._fit(image)
        if self._holdings.cached_bytes + pixels.nbytes <= CACHE_BYTES:
            self._cache[index] = pixels
            self._holdings.cached_bytes += pixels.nbytes
        return pixels

    def stack(self, pieces: Sequence[Any]) -> Float32Array:
        """Return what `read` returned for some images as one batch that the network takes."""
        return normalise(np.stack(pieces), self.spec)


@dataclass(frozen=True)
class ImageSet:
    """Some images of a pool, in a fixed order; reading it twice gives the same.

    An image found unreadable while decoding is left out, of `labels` and `len` as well, from then on.
    """

    _pool: Pool
    _members: npt.NDArray[np.intp]

    @property
    def _indices(self) -> npt.NDArray[np.intp]:
        return self._members[self._pool.readable[self._members]]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._indices)

    @property
    def labels(self) -> IntArray | None:
        """Class indices, (len,); None for images without labels."""
        return self._pool.source.labels[self._indices] if self._pool.source.classes else None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the images: their files, or their numbers in the data set."""
        return tuple(self._pool.source.name(int(index)) for index in self._indices)

    def batches(self, batch_size: int) -> Iterator[tuple[Float32Array, IntArray]]:
        """Yield inputs (n, C, H, W), or (n, H, W, C) where the network takes these, with their labels (n,).

        Every n but the last is `batch_size`. The label of an image without one is NO_LABEL.
        """
        images: list[Any] = []
        labels: list[int] = []
        for index in self._indices:
            piece = self._pool.read(int(index))
            if piece is None:
                continue
            images.append(piece)
            labels.append(int(self._pool.source.labels[index]))
            if len(images) == batch_size:
                yield self._pool.stack(images), np.asarray(labels, dtype=np.int64)
                images, labels = [], []
        if images:
            yield self._pool.stack(images), np.asarray(labels, dtype=np.int64)

    def take(self, count: int) -> ImageSet:
        """Return the first `count` images; sets are shuffled when made, so these are of mixed classes."""
        return ImageSet(self._pool, self._indices[:count])

    @property
    def position_count(self) -> int:
        """Number of images, the unreadable ones included: positions do not change when an image is left out."""
        return len(self._members)

    def at(self, position: int) -> tuple[Image.Image, int] | None:
        """Return the decoded image at `position` (below `position_count`) and its label; None if it cannot be read."""
        index = int(self._members[position])
        image = self._pool.decode(index)
        return None if image is None else (image, int(self._pool.source.labels[index]))

    def input(self, position: int) -> tuple[Float32Array, int] | None:
        """Return what the network takes of the image at `position`, and its label; None if it cannot be read."""
        index = int(self._members[position])
        piece = self._pool.read(index)
        return None if piece is None else (self._pool.stack([piece])[0], int(self._pool.source.labels[index]))

    def raw(self, index: int) -> Bytes:
        """Return image `index` decoded, before any preprocessing: uint8 (H, W, 3).

        Raises:
            DataError: the image cannot be read.
        """
        position = int(self._indices[index])
        image = self._pool.decode(position)
        if image is None:
            raise DataError(f"image {self._pool.source.name(position)} cannot be read")
        return np.array(image.convert("RGB"))


@dataclass(frozen=True)
class DataSplits:
    """The three disjoint sets of a run. `classes` are the names in the order of the labels, () without labels."""

    source: str
    classes: tuple[str, ...]
    calibration: ImageSet
    validation: ImageSet
    test: ImageSet
    how: str
    seed: int
    notes: tuple[str, ...] = field(default=())

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return bool(self.classes)

    @property
    def spec(self) -> InputSpec:
        """The input that the images are prepared for."""
        return self.calibration._pool.spec

    @property
    def holds_photos(self) -> bool:
        """Whether they are photos, which can be prepared for another input, and not ready inputs."""
        return all(pool.holds_photos for pool in self._pools)

    @property
    def _pools(self) -> tuple[Pool, ...]:
        sets = (self.calibration, self.validation, self.test)
        return tuple({id(images._pool): images._pool for images in sets}.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences for the user, with the images found unreadable so far."""
        names = [name for pool in self._pools for name in pool.unreadable]
        if not names:
            return self.notes
        total = sum(len(pool.readable) for pool in self._pools)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return (
            *self.notes,
            f"{len(names)} of {total} images cannot be read and are left out: {', '.join(names[:5])}{more}",
        )

    @property
    def all_readable(self) -> bool:
        """Whether every image that was read so far could be."""
        return not any(pool.unreadable for pool in self._pools)

    def prepared_for(self, spec: InputSpec) -> DataSplits:
        """Return the same images in the same splits and order, prepared for another input."""
        pools = {id(pool): pool.prepared_for(spec) for pool in self._pools}
        sets = [
            ImageSet(pools[id(images._pool)], images._members)
            for images in (self.calibration, self.validation, self.test)
        ]
        return replace(self, calibration=sets[0], validation=sets[1], test=sets[2])

    @cached_property
    def identity(self) -> str:
        """A digest that changes when the images, their labels or the splits do; files by name, size and time."""
        sources = [pool.source.identity() for pool in self._pools]
        return hashlib.sha256(repr([*sources, self.how, self.seed]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return the report's `data` section: where the images come from and how many each split has."""
        sizes = {name: len(getattr(self, name)) for name in SPLITS}
        unreadable = sum(len(pool.unreadable) for pool in self._pools)
        return {
            "source": self.source,
            "classes": len(self.classes),
            "labelled": self.labelled,
            **sizes,
            "split": self.how,
            "seed": self.seed,
            "unreadable": unreadable,
            "kind": "photos" if self.holds_photos else "inputs",
            "preprocessing": to_json(self.spec) if self.holds_photos else None,
        }


def open_data(
    path: str,
    spec: InputSpec,
    num_classes: int | None,
    split: tuple[float, float, float] = (0.5, 0.25, 0.25),
    seed: int = 0,
    inputs: Sequence[ModelInput] = (),
) -> DataSplits:
    """Open a folder or tar of photos or class folders, or a data set as timm names it (`hfds/NAME`, `torch/NAME:ROOT`).

    Or a file of inputs that are ready (.npz, .npy), or FILE.py:CALLABLE that yields them; see ready.py. `inputs` are
    those of an .onnx or of a module with several, and empty for a module with one.

    With train/ val/ test/ inside, or `-train` `-val` `-test` files or folders beside the one given: calibration from
    train, validation from val, test from test; what is missing is cut from the nearest, and a fraction of 0 in `split`
    empties a set. Otherwise the images are one pool, split by the fractions.

    Without class folders the images have no labels. `num_classes` is None for a network that is no classifier: labels
    are left out.

    Raises:
        DataError: the path, the images or the fractions cannot be used as given.
    """
    _check_split(split)
    with reading(f"--data '{path}'", DataError):
        return _open(path, spec, num_classes, split, seed, inputs)


def _open(
    path: str,
    spec: InputSpec,
    num_classes: int | None,
    split: tuple[float, float, float],
    seed: int,
    inputs: Sequence[ModelInput],
) -> DataSplits:
    ready = open_ready(path, spec, num_classes, inputs)
    if ready is not None:
        pool = ReadyPool(ready[0], spec)
        return _divide(path, {"pool": (pool, np.arange(len(pool.readable)))}, split, seed, ready[1])
    _check_photos(spec, inputs)
    return _open_photos(path, spec, num_classes, split, seed)


def _check_photos(spec: InputSpec, inputs: Sequence[ModelInput]) -> None:
    if len(inputs) > 1 or any(not item.is_image for item in inputs):
        shapes = ", ".join(f"{item.name} {item.measured}" for item in inputs)
        raise DataError(f"the model takes {shapes}; photos feed models with one input of images")
    if spec.shape[0] not in (1, 3):
        raise DataError(f"images have 1 or 3 channels; the model takes {spec.shape[0]}, so it cannot be given photos")


def _open_photos(
    path: str, spec: InputSpec, num_classes: int | None, split: tuple[float, float, float], seed: int
) -> DataSplits:
    sources, parts = open_sources(path, is_classifier=num_classes is not None)
    notes = settle_labels_(path, sources, num_classes)
    photos = {name: _PhotoPool(source, spec) for name, source in sources.items()}
    for pool in photos.values():
        pool.check_all()
    pools: dict[str, Pool] = dict(photos)
    members = {part: (pools[name], indices[pools[name].readable[indices]]) for part, (name, indices) in parts.items()}
    if not sum(len(indices) for _, indices in members.values()):
        raise DataError(f"'{path}' holds no image that can be read")
    return _divide(path, members, split, seed, notes)


def noise_of(spec: InputSpec, inputs: Sequence[ModelInput] = (), count: int = 8, seed: int = 0) -> Array:
    """Return `count` inputs of standard normal noise, whole numbers as zeros and ones, the same for the same seed.

    Images are (count, C, H, W) or (count, H, W, C). A network with several `inputs` gets a structured array.
    """
    generator = np.random.default_rng(seed)
    if len(inputs) < 2 and (not inputs or inputs[0].is_image):
        return generator.standard_normal((count, *spec.array_shape), dtype=np.float32)
    arrays = {item.name: _noise(item, count, generator) for item in inputs}
    if len(arrays) == 1:
        return arrays[inputs[0].name]
    batch = np.empty(count, [(name, array.dtype, array.shape[1:]) for name, array in arrays.items()])
    for name, array in arrays.items():
        batch[name] = array
    return batch


def _noise(item: ModelInput, count: int, generator: np.random.Generator) -> Array:
    shape = (count, *item.measured[1:])
    if np.dtype(item.dtype).kind != "f":
        return generator.integers(0, 2, shape).astype(item.dtype)
    return generator.standard_normal(shape, dtype=np.float32)


def _check_split(split: tuple[float, float, float]) -> None:
    if len(split) != 3 or any(not 0 <= fraction <= 1 for fraction in split) or not 0 < sum(split) <= 1 + 1e-9:
        given = ",".join(f"{fraction:g}" for fraction in split)
        raise DataError(f"--split {given} must be three fractions from 0 to 1 with a sum above 0 and at most 1")


# ---- dividing

_Members = tuple[Pool, npt.NDArray[np.intp]]


def _divide(
    path: str,
    members: dict[str, _Members],
    split: tuple[float, float, float],
    seed: int,
    notes: tuple[str, ...],
) -> DataSplits:
    generator = np.random.default_rng(seed)
    if "pool" in members:
        pool, indices = members["pool"]
        sets = [(pool, cut) for cut in _cut(pool, indices, split, generator)]
        how = f"{','.join(f'{fraction:g}' for fraction in split)} of one pool by seed"
    else:
        sets = _assign(members, split, generator)
        how = f"by the parts it has: {', '.join(members)}"
    made = [
        ImageSet(pool, generator.permutation(indices if keep else indices[:0]))
        for (pool, indices), keep in zip(sets, split, strict=True)
    ]
    notes += tuple(
        f"the {name} split is empty: '{path}' holds too few images for it"
        for name, images, fraction in zip(SPLITS, made, split, strict=True)
        if fraction and not len(images)
    )
    classes = made[0]._pool.source.classes
    return DataSplits(path, classes, made[0], made[1], made[2], how, seed, notes)


def _assign(
    members: dict[str, _Members], split: tuple[float, float, float], generator: np.random.Generator
) -> list[_Members]:
    """Give each split its own part; a split without one shares the nearest part, by the fractions of the sharers."""
    calibration, validation, test = split
    nearest = [("train", "val", "test"), ("val", "train", "test"), ("test", "val", "train")]
    chosen = [next(part for part in order if part in members) for order in nearest]
    sets: list[_Members | None] = [None, None, None]
    for part, (pool, indices) in members.items():
        sharers = [position for position in range(3) if chosen[position] == part]
        weights = [(calibration, validation, test)[position] for position in sharers]
        total = sum(weights)
        fractions = [weight / total for weight in weights] if total else [0.0] * len(sharers)
        for position, cut in zip(sharers, _cut(pool, indices, fractions, generator), strict=True):
            sets[position] = (pool, cut)
    return [entry for entry in sets if entry is not None]


def _cut(
    pool: Pool, indices: npt.NDArray[np.intp], fractions: Sequence[float], generator: np.random.Generator
) -> list[npt.NDArray[np.intp]]:
    """Cut `indices` at the cumulative `fractions`, stratified by class (see the top of the file)."""
    labels = pool.source.labels[indices]
    position = np.empty(len(indices))
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        ranks = generator.permutation(len(of_class))
        position[of_class] = (ranks + generator.random()) / len(of_class)
    order = indices[np.argsort(position, kind="stable")]
    ends = np.rint(np.cumsum([0.0, *fractions]) * len(indices)).astype(int)
    return [order[start:end] for start, end in itertools.pairwise(ends)]
