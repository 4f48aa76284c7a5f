"""Images, split into calibration, validation and test, preprocessed as the network expects.

Images in class folders are labelled. Those that lie in one folder are not, and where the network is no classifier
labels are left out.

Images come through timm's readers, so the order of classes is timm's: the natural sort of folder names. Every image is
decoded and resized at most once per run while memory allows (see CACHE_BYTES), and one that cannot be read is left out
with a warning, never replaced.

One pool is split by a stratified cut: with r the random rank of an image among the n of its class and u one random
number per class, images sorted by (r + u) / n are cut at the cumulative fractions. Each split has its exact size, and
the number of images of each class in it is within one of the class's share.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import IterableDataset

from mm_edge.arrays import BoolArray, Float32Array, IntArray
from mm_edge.errors import DataError, first_line
from mm_edge.load.photos import Bytes, normalise, pixels_of, with_channels
from mm_edge.records import InputSpec, to_json

SPLITS = ("calibration", "validation", "test")
# Preprocessed images kept in memory per data source: 10,000 images of 224 x 224, or 500,000 of 32 x 32.
CACHE_BYTES = 1536 * 2**20
# A stream can be read once only, so its images are kept in memory: this many at most.
STREAM_LIMIT = 10_000

_FOLDER_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval"),
    "test": ("test", "testing"),
}
_DATASET_SPEC = re.compile(r"(?:hfds|hfids|tfds|wds|torch)/", re.IGNORECASE)
# Pillow raises OSError for most damaged files and these for some.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_JPEG_END = b"\xff\xd9"
_JPEG_TAIL = 1024  # cameras and editors leave some bytes after the marker
# What `batches` yields for an image without a label.
NO_LABEL = -1


class Source(Protocol):
    """Images by index. `decode` raises one of Pillow's errors for an image that cannot be read.

    Without labels `classes` is empty and every label is NO_LABEL.
    """

    classes: tuple[str, ...]
    labels: IntArray

    def decode(self, index: int) -> Image.Image:
        """Return the decoded image."""

    def check(self, index: int) -> None:
        """Raise one of Pillow's errors when a look at the file, short of decoding it, shows it cannot be read."""

    def name(self, index: int) -> str:
        """Return the name of the image for messages: its file, or its number in the data set."""

    def identity(self) -> str:
        """Return a text that changes when the images do, without reading them."""


class _ReaderSource:
    """A folder or tar of class folders, through timm's readers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = _open_reader(path)
        folder = isinstance(self._reader, ReaderImageFolder)
        to_index = self._reader.class_to_idx if folder else self._reader.class_name_to_idx
        targets = [target for _, target in self._reader.samples] if folder else self._reader.targets
        self.classes = tuple(sorted(to_index, key=to_index.__getitem__))
        self.labels = np.asarray(targets, dtype=np.int64)

    def _read(self, index: int) -> io.BytesIO:
        if isinstance(self._reader, ReaderImageFolder):
            with self._reader[index][0] as file:
                return io.BytesIO(file.read())
        # The same bytes as timm's reader gives, without the open tar it keeps.
        member, _, inner_tar = self._reader.samples[index]
        with self._path.open("rb") as file:
            file.seek(member.offset_data + (inner_tar.offset_data if inner_tar is not None else 0))
            return io.BytesIO(file.read(member.size))

    def decode(self, index: int) -> Image.Image:
        image = Image.open(self._read(index))
        image.load()
        return image

    def check(self, index: int) -> None:
        file = self._read(index)
        image = Image.open(file)
        # Pillow verifies PNG's checksums but nothing of a JPEG: one without its end marker is decoded to be sure.
        if image.format == "JPEG" and _JPEG_END not in file.getvalue()[-_JPEG_TAIL:]:
            image.load()
        else:
            image.verify()

    def name(self, index: int) -> str:
        return str(self._reader.filename(index))

    def identity(self) -> str:
        folder = isinstance(self._reader, ReaderImageFolder)
        files = [Path(name) for name, _ in self._reader.samples] if folder else [self._path]
        stamps = [(stat.st_size, stat.st_mtime_ns) for stat in map(Path.stat, files)]
        return repr((self.labels.tolist(), [str(file) for file in files], stamps))


class _DatasetSource:
    """A data set that timm opens by its specification; one without an index is kept in memory."""

    def __init__(self, dataset: Any, classes: Sequence[str], spec: str) -> None:
        self._spec = spec
        if isinstance(dataset, IterableDataset):
            dataset = [sample for sample, _ in zip(dataset, range(STREAM_LIMIT), strict=False)]
        self._dataset = dataset
        self.files = getattr(dataset, "samples", None)
        targets = getattr(dataset, "targets", None)
        if targets is None and hasattr(getattr(dataset, "reader", None), "iter_targets"):
            targets = list(dataset.reader.iter_targets())
        if targets is None:
            targets = [dataset[index][1] for index in range(len(dataset))]
        self.labels = np.asarray(targets, dtype=np.int64)
        count = int(self.labels.max()) + 1 if len(self.labels) else 0
        self.classes = tuple(classes) or tuple(str(index) for index in range(count))

    def decode(self, index: int) -> Image.Image:
        image: Image.Image = self._dataset[index][0]
        image.load()
        return image

    def check(self, index: int) -> None:
        """Do nothing: timm's data sets offer no check other than decoding."""

    def name(self, index: int) -> str:
        return f"{self._spec}[{index}]"

    def identity(self) -> str:
        return repr((self._spec, self.labels.tolist()))


@dataclass
class _Holdings:
    """What pools of one source share, at whatever size they prepare its images.

    `readable` says per image whether it can be read, `unreadable` names those that cannot, `cached_bytes` is what the
    prepared images kept in memory take.
    """

    readable: BoolArray
    unreadable: list[str] = field(default_factory=list)
    cached_bytes: int = 0


class _Pool:
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

    def prepared_for(self, spec: InputSpec) -> _Pool:
        """Return a pool of the same images for another input."""
        return _Pool(self.source, spec, self._holdings)

    def check_all(self) -> None:
        """Leave out files that a quick check finds unreadable; other damage is found when a file is decoded."""
        for index in range(len(self.readable)):
            try:
                self.source.check(index)
            except _UNREADABLE:
                self._leave_out(index)

    def _leave_out(self, index: int) -> None:
        self.readable[index] = False
        self.unreadable.append(self.source.name(index))

    def decode(self, index: int) -> Image.Image | None:
        """Return image `index` with the channels the model takes; None, and left out from then on, if unreadable."""
        try:
            return with_channels(self.source.decode(index), self.spec.shape[0])
        except _UNREADABLE:
            if self.readable[index]:
                self._leave_out(index)
            return None

    def pixels(self, index: int) -> Bytes | None:
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


@dataclass(frozen=True)
class ImageSet:
    """Some images of a pool, in a fixed order; reading it twice gives the same.

    An image found unreadable while decoding is left out, of `labels` and `len` as well, from then on.
    """

    _pool: _Pool
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

    def batches(self, batch_size: int) -> Iterator[tuple[Float32Array, IntArray]]:
        """Yield inputs (n, C, H, W), or (n, H, W, C) where the network takes these, with their labels (n,).

        Every n but the last is `batch_size`. The label of an image without one is NO_LABEL.
        """
        images: list[Bytes] = []
        labels: list[int] = []
        for index in self._indices:
            pixels = self._pool.pixels(int(index))
            if pixels is None:
                continue
            images.append(pixels)
            labels.append(int(self._pool.source.labels[index]))
            if len(images) == batch_size:
                yield normalise(np.stack(images), self._pool.spec), np.asarray(labels, dtype=np.int64)
                images, labels = [], []
        if images:
            yield normalise(np.stack(images), self._pool.spec), np.asarray(labels, dtype=np.int64)

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

    def raw(self, index: int) -> Bytes:
        """Return image `index` decoded, before any preprocessing: uint8 (H, W, 3).

        Raises:
            DataError: the image cannot be read.
        """
        position = int(self._indices[index])
        try:
            return np.array(self._pool.source.decode(position).convert("RGB"))
        except _UNREADABLE as error:
            raise DataError(f"image {self._pool.source.name(position)} cannot be read") from error


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
    def _pools(self) -> tuple[_Pool, ...]:
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
            "preprocessing": to_json(self.spec),
        }


def open_data(
    path: str,
    spec: InputSpec,
    num_classes: int | None,
    split: tuple[float, float, float] = (0.5, 0.25, 0.25),
    seed: int = 0,
) -> DataSplits:
    """Open a folder or tar of photos or class folders, or a data set as timm names it (`hfds/NAME`, `torch/NAME:ROOT`).

    With train/ val/ test/ inside, or `-train` `-val` `-test` files or folders beside the one given: calibration from
    train, validation from val, test from test; what is missing is cut from the nearest, and a fraction of 0 in `split`
    empties a set. Otherwise the images are one pool, split by the fractions.

    Without class folders the images have no labels. `num_classes` is None for a network that is no classifier: labels
    are left out.

    Raises:
        DataError: the path, the images or the fractions cannot be used as given.
    """
    _check_split(split)
    if spec.shape[0] not in (1, 3):
        raise DataError(f"images have 1 or 3 channels; the model takes {spec.shape[0]}, so it cannot be given --data")
    sources, parts = _open_sources(path, is_classifier=num_classes is not None)
    classes = next(iter(sources.values())).classes
    note = _why_unlabelled(path, classes, num_classes)
    if note is None:
        _check_classes(path, classes, num_classes)
    else:
        classes = ()
        for source in sources.values():
            source.classes, source.labels = (), np.full(len(source.labels), NO_LABEL)
    pools = {name: _Pool(source, spec) for name, source in sources.items()}
    for pool in pools.values():
        pool.check_all()
    members = {part: (pools[name], indices[pools[name].readable[indices]]) for part, (name, indices) in parts.items()}
    if not sum(len(indices) for _, indices in members.values()):
        raise DataError(f"'{path}' holds no image that can be read")
    splits = _divide(path, classes, members, split, seed)
    return splits if note is None else replace(splits, notes=(note, *splits.notes))


def noise_batches(spec: InputSpec, count: int = 8, seed: int = 0) -> Iterator[Float32Array]:
    """Yield `count` inputs of standard normal noise, (1, C, H, W) or (1, H, W, C), the same for the same seed."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield generator.standard_normal((1, *spec.array_shape), dtype=np.float32)


# ---- opening

# For each part found ("train", "val", "test" or "pool"): the name of its source and its images there.
_Parts = dict[str, tuple[str, npt.NDArray[np.intp]]]


def _open_sources(path: str, is_classifier: bool) -> tuple[dict[str, Source], _Parts]:
    if not Path(path).exists():
        if _DATASET_SPEC.match(path):
            return _open_specification(path)
        raise DataError(
            f"data '{path}' does not exist; give a folder or tar of photos or class folders, or a data set as timm "
            "names them (hfds/NAME, wds/NAME, torch/NAME:ROOT)"
        )
    beside = _siblings(Path(path))
    if beside:
        sources: dict[str, Source] = {part: _ReaderSource(found) for part, found in beside.items()}
        for part, source in sources.items():
            _check_same_classes(beside[part], source, sources["train"])
        return sources, {part: (part, np.arange(len(source.labels))) for part, source in sources.items()}
    source = _ReaderSource(Path(path))
    parts = _parts_inside(source, is_classifier)
    return {"pool": source}, {part: ("pool", indices) for part, indices in parts.items()}


def _open_reader(path: Path) -> Any:
    if path.is_file() and path.suffix.lower() != ".tar":
        raise DataError(f"'{path}' is neither a folder nor a .tar; unpack it, or give a folder of photos")
    try:
        return ReaderImageFolder(str(path)) if path.is_dir() else ReaderImageInTar(str(path), cache_tarinfo=False)
    except tarfile.TarError as error:
        raise DataError(f"'{path}' is not a tar, or it is cut short: {first_line(error)}") from error
    except (RuntimeError, ValueError) as error:  # how timm's readers say that they found nothing
        raise DataError(f"'{path}' holds no images (.png, .jpg, .jpeg)") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {first_line(error)}") from error


def _siblings(path: Path) -> dict[str, Path]:
    """Return the train, val and test files or folders of one data set, if `path` is named as its train part."""
    found: dict[str, Path] = {}
    marked = re.compile(r"(?<![a-zA-Z])train(?:ing)?(?![a-zA-Z])")
    if not marked.search(path.name):
        return {}
    for part in ("val", "test"):
        for name in _FOLDER_NAMES[part]:
            candidate = path.with_name(marked.sub(name, path.name))
            if part not in found and candidate.exists():
                found[part] = candidate
    return {"train": path, **found} if found else {}


def _parts_inside(source: _ReaderSource, is_classifier: bool) -> dict[str, npt.NDArray[np.intp]]:
    """Return the images by the split folder above their class folder; one pool where there is no such folder.

    The photos of a network that is no classifier may lie in the split folder itself.
    """
    classes = 1 if is_classifier else 0
    named = {name: part for part, names in _FOLDER_NAMES.items() for name in names}
    part_of = []
    for index in range(len(source.labels)):
        above = Path(source.name(index)).parts[: -1 - classes]
        part_of.append(next((named[folder.lower()] for folder in above if folder.lower() in named), "pool"))
    parts = {part: np.flatnonzero(np.asarray(part_of) == part) for part in dict.fromkeys(part_of)}
    split = {part: indices for part, indices in parts.items() if part != "pool"}
    return split if len(split) > 1 else {"pool": np.arange(len(source.labels))}


def _check_same_classes(path: Path, source: Source, train: Source) -> None:
    if source.classes != train.classes:
        odd = sorted(set(source.classes) ^ set(train.classes))
        raise DataError(f"'{path}' and its train part differ in their classes: {', '.join(odd[:3])}")


def _open_specification(spec: str) -> tuple[dict[str, Source], _Parts]:
    name, _, root = spec.partition(":")
    sources: dict[str, Source] = {}
    reason = ""
    # torchvision's own data sets have one part beside train, which timm finds under this name.
    parts = {"train": "train", "val": "validation", "test": "test"}
    if name.lower().startswith("torch/"):
        parts = {"train": "train", "test": "validation"}
    for part, split in parts.items():
        try:
            dataset = create_dataset(name, root=root or None, split=split)
            sources[part] = _DatasetSource(dataset, _class_names(dataset), f"{name} {split}")
        except (Exception, SystemExit) as error:  # each kind of data set fails in its own way
            reason = reason or first_line(error)
    if not sources:
        raise DataError(f"data set '{spec}' cannot be opened: {reason}")
    if len(sources) == 1 or _are_one(list(sources.values())):
        sources = {"pool": next(iter(sources.values()))}
    return sources, {part: (part, np.arange(len(source.labels))) for part, source in sources.items()}


def _are_one(sources: list[Source]) -> bool:
    """Return whether all parts hold the same files, as those of a folder without parts do."""
    first = sources[0]
    same_labels = all(np.array_equal(source.labels, first.labels) for source in sources)
    listings = [getattr(source, "files", None) for source in sources]
    return same_labels and listings[0] is not None and all(listing == listings[0] for listing in listings)


def _class_names(dataset: Any) -> Sequence[str]:
    to_index = getattr(dataset, "class_to_idx", None) or getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return tuple(sorted(to_index, key=to_index.__getitem__)) if to_index else ()


def _why_unlabelled(path: str, classes: tuple[str, ...], num_classes: int | None) -> str | None:
    """Return the sentence that says why the images count as unlabelled; None where they are labelled."""
    if len(classes) < 2:
        only = f"one class ({classes[0]})" if classes and classes[0] not in ("", ".") else "no class folders"
        return f"'{path}' has {only}: its images count as unlabelled, so no accuracy is measured"
    if num_classes is None:
        return f"the model is no classifier: the {len(classes)} class folders of '{path}' are not used as labels"
    return None


def _check_classes(path: str, classes: tuple[str, ...], num_classes: int | None) -> None:
    if len(classes) != num_classes:
        raise DataError(
            f"'{path}' has {len(classes)} classes ({', '.join(classes[:3])}, ...) and the model {num_classes}; "
            "give the images the model was trained for, one folder per class"
        )


def _check_split(split: tuple[float, float, float]) -> None:
    if len(split) != 3 or any(not 0 <= fraction <= 1 for fraction in split) or not 0 < sum(split) <= 1 + 1e-9:
        given = ",".join(f"{fraction:g}" for fraction in split)
        raise DataError(f"--split {given} must be three fractions from 0 to 1 with a sum above 0 and at most 1")


# ---- dividing

_Members = tuple[_Pool, npt.NDArray[np.intp]]


def _divide(
    path: str,
    classes: tuple[str, ...],
    members: dict[str, _Members],
    split: tuple[float, float, float],
    seed: int,
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
    notes = tuple(
        f"the {name} split is empty: '{path}' holds too few images for it"
        for name, images, fraction in zip(SPLITS, made, split, strict=True)
        if fraction and not len(images)
    )
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
    pool: _Pool, indices: npt.NDArray[np.intp], fractions: Sequence[float], generator: np.random.Generator
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
