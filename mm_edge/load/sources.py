"""Sources of images: folders and tars through timm's readers, and data sets that timm opens by name.

The order of classes is timm's: the natural sort of folder names. Images in class folders are labelled. Those that lie
in one folder are not, and where the network is no classifier labels are left out.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import IterableDataset

from mm_edge.arrays import IntArray
from mm_edge.errors import DataError, first_line

# A stream can be read once only, so its images are kept in memory: this many at most.
STREAM_LIMIT = 10_000

_FOLDER_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval"),
    "test": ("test", "testing"),
}
_DATASET_SPEC = re.compile(r"(?:hfds|hfids|tfds|wds|torch)/", re.IGNORECASE)
# Pillow raises OSError for most damaged files and these for some.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_JPEG_END = b"\xff\xd9"
_JPEG_TAIL = 1024  # cameras and editors leave some bytes after the marker
# A larger file is no photo.
MOST_PHOTO_BYTES = 256 << 20
# Bounds of a folder of photos, which is listed before it is read.
MOST_FILES = 5_000_000
LISTING_S = 20.0
DEEPEST_TAR = 3  # tars inside tars
# What `batches` yields for an image without a label.
NO_LABEL = -1

# For each part found ("train", "val", "test" or "pool"): the name of its source and its images there.
Parts = dict[str, tuple[str, npt.NDArray[np.intp]]]


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
            _check_photo_file(Path(self._reader.samples[index][0]).stat())
            with self._reader[index][0] as file:
                return io.BytesIO(file.read())
        # The same bytes as timm's reader gives, without the open tar it keeps.
        member, _, inner_tar = self._reader.samples[index]
        if not member.isreg() or member.size > MOST_PHOTO_BYTES:
            raise OSError("no photo: a link, a device, or too large")
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


def _check_photo_file(status: os.stat_result) -> None:
    """Raise OSError for what must not be opened: a device or a pipe would never end."""
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_PHOTO_BYTES:
        raise OSError("no photo: a device, a pipe, or too large")


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


# ---- opening


def open_sources(path: str, is_classifier: bool) -> tuple[dict[str, Source], Parts]:
    """Open what `path` names: its sources by name, and which images belong to which part.

    Raises:
        DataError: there is nothing there, or it holds no images.
    """
    if not Path(path).exists():
        if _DATASET_SPEC.match(path):
            return _open_specification(path)
        raise DataError(
            f"data '{path}' does not exist; give a folder or tar of photos or class folders, an .npz of inputs, "
            "FILE.py:CALLABLE, or a data set as timm names them (hfds/NAME, wds/NAME, torch/NAME:ROOT)"
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
        raise DataError(f"'{path}' is no folder, .tar, .npz or .npy; unpack it, or give a folder of photos")
    if path.is_dir():
        _check_extent(path)
    elif not path.is_file():
        raise DataError(f"'{path}' is neither a file nor a folder; give a folder or tar of photos")
    try:
        if path.is_file():
            _check_tar(path)
        return ReaderImageFolder(str(path)) if path.is_dir() else ReaderImageInTar(str(path), cache_tarinfo=False)
    except tarfile.TarError as error:
        raise DataError(f"'{path}' is not a tar, or it is cut short: {first_line(error)}") from error
    except (RuntimeError, ValueError) as error:  # how timm's readers say that they found nothing
        raise DataError(f"'{path}' holds no images (.png, .jpg, .jpeg)") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {first_line(error)}") from error


def _check_extent(path: Path) -> None:
    """Refuse a folder that takes too long to list, such as the root of a disk; links are followed, as timm does.

    Raises:
        DataError: it holds more than MOST_FILES, or is not listed within LISTING_S.
    """
    count, deadline = 0, time.monotonic() + LISTING_S
    for _, _, files in os.walk(path, followlinks=True):
        count += len(files)
        if count > MOST_FILES or time.monotonic() > deadline:
            raise DataError(
                f"'{path}' is too large to be a folder of photos: {count:,} files were found and there are more; give "
                "the folder that holds the photos"
            )


def _check_tar(path: Path) -> None:
    """Refuse a tar whose headers promise more than its file holds: timm would read on for as long as they say.

    Raises:
        DataError: a member ends behind the end of the file, or there are more than MOST_FILES.
        tarfile.TarError: it is no tar.
    """
    with tarfile.open(path, "r:") as archive:
        _check_members(path, archive, path.stat().st_size, 0)


def _check_members(path: Path, archive: tarfile.TarFile, size: int, depth: int) -> None:
    count = 0
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # else every header is kept
        count += 1
        if count > MOST_FILES or depth > DEEPEST_TAR:
            raise DataError(f"'{path}' has more members than a tar of photos; give a folder or tar of photos")
        if member.isreg() and (member.issparse() or member.offset_data + member.size > size):
            raise DataError(f"'{path}' is cut short or damaged: {member.name} ends behind the end of the file")
        if member.isreg() and member.name.lower().endswith(".tar"):
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                _check_members(path, inner, member.size, depth + 1)


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


def _open_specification(spec: str) -> tuple[dict[str, Source], Parts]:
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


def settle_labels_(path: str, sources: dict[str, Source], num_classes: int | None) -> tuple[str, ...]:
    """Take the labels away where they say nothing, and return a sentence that says why.

    Raises:
        DataError: there are other classes than the network has.
    """
    classes = next(iter(sources.values())).classes
    if len(classes) < 2:
        only = f"one class ({classes[0]})" if classes and classes[0] not in ("", ".") else "no class folders"
        note = f"'{path}' has {only}: its images count as unlabelled, so no accuracy is measured"
    elif num_classes is None:
        note = f"the model is no classifier: the {len(classes)} class folders of '{path}' are not used as labels"
    elif len(classes) != num_classes:
        raise DataError(
            f"'{path}' has {len(classes)} classes ({', '.join(classes[:3])}, ...) and the model {num_classes}; "
            "give the images the model was trained for, one folder per class"
        )
    else:
        return ()
    for source in sources.values():
        source.classes, source.labels = (), np.full(len(source.labels), NO_LABEL)
    return (note,)
