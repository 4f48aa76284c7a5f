"""The user's labels of photos: boxes in a file of COCO's format, or masks in PNG files.

Boxes belong to a photo by its `file_name`, masks by the photo's name without its ending: the whole path inside the data
first, else the last part of it where only one file has it. A photo without labels is left out of what is measured.

Labels lie in the photo, and a network answers in its input. A mask is resized as its photo is, by the nearest pixel.
For boxes, a picture of the photo's coordinates is resized in the same way. It shows where the photo lies in the input:

    x in the input = a x in the photo + b,   least squares over the columns that show the photo; rows alike
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from mm_edge.arrays import Array, Float64Array, IntArray
from mm_edge.errors import DataError, first_line, reading
from mm_edge.load.photos import Fit, pixels_of
from mm_edge.records import InputSpec, parse_json

# The boxes of COCO's 118,000 training photos take 470 MB.
MOST_BYTES = 512 << 20
MOST_SIDE = 1 << 16
# Marks pixels of a mask without a class, in the file and in what is returned.
NO_CLASS_IN_FILE, NO_CLASS = 255, -1
_MASK_MODES = ("1", "L", "P")
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

T = TypeVar("T")


@dataclass(frozen=True)
class PhotoBoxes:
    """The boxes of one photo.

    Attributes:
        size: height and width of the photo in pixels.
        boxes: left, top, right and bottom in pixels of the photo, (n, 4).
        categories: their categories as numbered in the file, (n,).
    """

    size: tuple[int, int]
    boxes: Float64Array
    categories: IntArray


@dataclass(frozen=True)
class BoxLabels:
    """Boxes by the name of their photo, and the numbers and names of all categories in rising order."""

    photos: Mapping[str, PhotoBoxes]
    categories: Mapping[int, str]

    @property
    def identity(self) -> str:
        """A digest of the labels."""
        listed = [
            (name, item.size, item.boxes.tolist(), item.categories.tolist()) for name, item in self.photos.items()
        ]
        return hashlib.sha256(repr((listed, list(self.categories))).encode()).hexdigest()

    @cached_property
    def _by_last_part(self) -> dict[str, PhotoBoxes]:
        return _by_last_part(self.photos)

    def find(self, photo: str) -> PhotoBoxes | None:
        """Return the boxes of a photo, None where the file does not name it."""
        return self.photos.get(photo) or self._by_last_part.get(PurePosixPath(photo).name)

    def in_input(self, photo: str, spec: InputSpec) -> tuple[Float64Array, IntArray] | None:
        """Return the boxes (n, 4) of a photo in pixels of the input, and their categories; None without labels.

        What a box has outside of the input is cut off; a box that is wholly outside is left out.
        """
        found = self.find(photo)
        if found is None:
            return None
        factors, shifts = _placement(replace(spec, assumed=()), found.size)
        corners = found.boxes.reshape(-1, 2, 2) * factors + shifts
        boxes = np.clip(corners, 0, [spec.shape[2], spec.shape[1]]).reshape(-1, 4)
        inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return boxes[inside], found.categories[inside]


@dataclass(frozen=True)
class MaskLabels:
    """The PNG files of masks by their path inside the folder, without its ending."""

    masks: Mapping[str, Path]

    @property
    def identity(self) -> str:
        """A digest that changes when the masks do: of their names, sizes and times."""
        stamps = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in sorted(self.masks.items())]
        return hashlib.sha256(repr(stamps).encode()).hexdigest()

    @cached_property
    def _by_last_part(self) -> dict[str, Path]:
        return _by_last_part(self.masks)

    def find(self, photo: str) -> Path | None:
        """Return the mask of a photo, None where the folder has none."""
        name = PurePosixPath(photo)
        return self.masks.get(str(name.with_suffix(""))) or self._by_last_part.get(name.stem)

    def in_input(self, photo: str, spec: InputSpec) -> IntArray | None:
        """Return the class of every pixel (H, W) of the input; None without a mask.

        NO_CLASS stands where the file says 255 and where the input shows no part of the photo. In a mask of 0 and 255
        alone, which is black and white, 255 is class 1.

        Raises:
            DataError: the mask cannot be read, or does not hold one class index per pixel.
        """
        file = self.find(photo)
        if file is None:
            return None
        classes = _read_mask(file)
        pixels = _fit_nearest(spec, pad=NO_CLASS_IN_FILE)(Image.fromarray(classes))[0].astype(np.int64)
        return np.where(pixels == NO_CLASS_IN_FILE, NO_CLASS, pixels)


Labels = BoxLabels | MaskLabels


def open_labels(path: str | Path) -> Labels:
    """Read boxes from a .json file of COCO's format, or list the masks of a folder.

    Raises:
        DataError: there is no such file or folder, or it does not hold labels.
    """
    path = Path(path)
    with reading(f"--labels '{path}'", DataError):
        return _open(path)


def _open(path: Path) -> Labels:
    if path.is_dir():
        masks = {str(PurePosixPath(file.relative_to(path).with_suffix(""))): file for file in path.rglob("*.png")}
        if not masks:
            raise DataError(f"--labels '{path}' holds no .png masks; give the folder with one mask for each photo")
        return MaskLabels(masks)
    if not path.is_file():
        raise DataError(f"--labels '{path}' does not exist; give a .json file of COCO's format or a folder of masks")
    return _read_boxes(path)


def require_photos(labels: Labels, path: str | Path, photos: Iterable[str]) -> int:
    """Return how many of the photos have labels.

    Raises:
        DataError: none has; the message shows a name of either side.
    """
    names = list(photos)
    count = sum(labels.find(name) is not None for name in names)
    if count == 0:
        own = next(iter(labels.photos if isinstance(labels, BoxLabels) else labels.masks), "none")
        example = names[0] if names else "none"
        raise DataError(
            f"--labels '{path}' has labels for none of the photos: it names '{own}', the photos '{example}'; "
            "give the labels of these photos"
        )
    return count


def _by_last_part(entries: Mapping[str, T]) -> dict[str, T]:
    """Return the entries by the last part of their path, without those that share it."""
    found: dict[str, T] = {}
    twice = set()
    for name, entry in entries.items():
        last = PurePosixPath(name).name
        if last in found:
            twice.add(last)
        found[last] = entry
    return {name: entry for name, entry in found.items() if name not in twice}


# ---- boxes


def _read_boxes(path: Path) -> BoxLabels:
    content = _read_json(path)
    names = {
        _number(path, f"categories[{i}]", entry, "id"): entry.get("name")
        for i, entry in _entries(path, content, "categories")
    }
    categories = {number: str(names[number] or number) for number in sorted(names)}
    images = _read_images(path, content)
    boxes: dict[int, list[tuple[list[float], int]]] = {number: [] for number in images}
    for i, entry in _entries(path, content, "annotations"):
        where = f"annotations[{i}]"
        image, category = (_number(path, where, entry, key) for key in ("image_id", "category_id"))
        if image not in images:
            raise _bad(path, f"{where} belongs to image {image}, which is not among its images")
        if category not in categories:
            raise _bad(path, f"{where} has the category {category}, which is not among its categories")
        box = _box(path, where, entry, images[image][1])
        # A crowd is no single object, and a box without an area can never be found.
        if not entry.get("iscrowd") and box[2] > box[0] and box[3] > box[1]:
            boxes[image].append((box, category))
    photos = {name: _photo_boxes(size, boxes[number]) for number, (name, size) in images.items()}
    return BoxLabels(photos, categories)


def _read_images(path: Path, content: Any) -> dict[int, tuple[str, tuple[int, int]]]:
    """Return the file name and the height and width of every image by its id."""
    images: dict[int, tuple[str, tuple[int, int]]] = {}
    for i, entry in _entries(path, content, "images"):
        where = f"images[{i}]"
        number, name = _number(path, where, entry, "id"), entry.get("file_name")
        if number in images:
            raise _bad(path, f"{where} has the id {number} of another image")
        if not isinstance(name, str) or not name:
            raise _bad(path, f"{where} has no file_name")
        images[number] = name, (_side(path, where, entry, "height"), _side(path, where, entry, "width"))
    return images


def _photo_boxes(size: tuple[int, int], boxes: list[tuple[list[float], int]]) -> PhotoBoxes:
    corners = np.asarray([box for box, _ in boxes], np.float64).reshape(-1, 4)
    return PhotoBoxes(size, corners, np.asarray([category for _, category in boxes], np.int64))


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"--labels '{path}' is larger than {MOST_BYTES >> 20} MiB; leave out photos not in --data")
        return parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"--labels '{path}' cannot be read: {first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"--labels '{path}' is not JSON: {first_line(error)}") from error


def _entries(path: Path, content: Any, key: str) -> Iterable[tuple[int, dict[str, Any]]]:
    """Yield the entries of one of the lists of the file with their index."""
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise _bad(path, f"it has no list '{key}'")
    for index, entry in enumerate(found):
        if not isinstance(entry, dict):
            raise _bad(path, f"{key}[{index}] is no object")
        yield index, entry


def _number(path: Path, where: str, entry: Mapping[str, Any], key: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 1 << 62:
        raise _bad(path, f"{where} has no whole number '{key}'")
    return value


def _side(path: Path, where: str, entry: Mapping[str, Any], key: str) -> int:
    side = _number(path, where, entry, key)
    if not 1 <= side <= MOST_SIDE:
        raise _bad(path, f"{where} has the {key} {side}; it must be from 1 to {MOST_SIDE} pixels")
    return side


def _box(path: Path, where: str, entry: Mapping[str, Any], size: tuple[int, int]) -> list[float]:
    """Return the corners of an entry's box, cut at the edges of its photo."""
    box = entry.get("bbox")
    numbers = box if isinstance(box, list) and len(box) == 4 else []
    good = [value for value in numbers if isinstance(value, (int, float)) and not isinstance(value, bool)]
    # A whole number of any length is allowed in JSON, and one beyond the range of floats cannot be compared.
    if len(good) != 4 or not all(abs(value) <= 1e9 and math.isfinite(value) for value in good) or min(good[2:]) < 0:
        shown = json.dumps(box)[:60]
        raise _bad(path, f"{where} has the bbox {shown}; it must be [x, y, width, height], finite and not negative")
    left, top, width, height = map(float, good)
    rows, columns = size
    if left >= columns or top >= rows or left + width <= 0 > left or top + height <= 0 > top:
        raise _bad(path, f"{where} has a bbox outside of its photo, which is {columns} x {rows}")
    return [max(0, left), max(0, top), min(columns, left + width), min(rows, top + height)]


def _bad(path: Path, reason: str) -> DataError:
    return DataError(f"--labels '{path}' is not of COCO's format: {reason}")


# ---- where a photo lies in the input


def _fit_nearest(spec: InputSpec, pad: int) -> Fit:
    """Return the resizing of `spec` for one channel by the nearest pixel, with another border."""
    return pixels_of(
        replace(spec, shape=(1, *spec.shape[1:]), mean=(0.0,), std=(1.0,), interpolation="nearest", pad=pad)
    )


@lru_cache(maxsize=1024)
def _placement(spec: InputSpec, size: tuple[int, int]) -> tuple[Float64Array, Float64Array]:
    """Return by what x and y in a photo of this size are multiplied, and what is added, (2,) each."""
    fit = _fit_nearest(spec, pad=0)

    def resize(values: Array) -> Array:
        spread = np.broadcast_to(values, size).astype(np.uint8)
        return np.asarray(fit(Image.fromarray(spread))[0], np.int64)

    shown = resize(np.array(255)) > 0
    factors, shifts = [], []
    for axis, numbers in ((1, np.arange(size[1])[None]), (0, np.arange(size[0])[:, None])):
        inside = np.flatnonzero(shown.any(axis=1 - axis))
        other = int(np.flatnonzero(shown.any(axis=axis))[0])
        high, low = resize(numbers // 256), resize(numbers % 256)
        positions = (256 * high + low).take(other, axis=1 - axis)[inside]
        factor, shift = _line(positions + 0.5, inside + 0.5)
        factors.append(factor)
        shifts.append(shift)
    return np.array(factors), np.array(shifts)


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Return a and b of the line y = a x + b through points, by least squares; the points may share one x."""
    spread = float(((x - x.mean()) ** 2).sum())
    a = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else float(len(y))
    return a, float(y.mean() - a * x.mean())


# ---- masks


def _read_mask(file: Path) -> Array:
    try:
        with Image.open(file) as image:
            mode = image.mode
            values = np.asarray(image) if mode in _MASK_MODES else None
    except _UNREADABLE as error:
        raise DataError(f"mask '{file}' cannot be read: {first_line(error)}") from error
    if values is None:
        raise DataError(
            f"mask '{file}' has the mode {mode}; a mask has one class index from 0 to 254 for each pixel, "
            "in 8 bits or by a palette, and 255 where there is no class"
        )
    classes = values.astype(np.uint8)
    return classes // NO_CLASS_IN_FILE if np.array_equal(np.unique(classes), [0, NO_CLASS_IN_FILE]) else classes
