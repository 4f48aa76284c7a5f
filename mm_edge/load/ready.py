"""Inputs that are ready for the network: .npz and .npy files of arrays, and batches that the user's own code yields.

An array holds examples along its first axis. A file's headers are checked before any array is read: pickled objects are
refused, and so is what would take more than READY_BYTES. The user's code is called once; its first examples up to
READY_EXAMPLES and READY_BYTES are kept in memory.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mm_edge.arrays import BoolArray, IntArray, in_order_of_fields
from mm_edge.errors import DataError, first_line
from mm_edge.load.network import ModelInput
from mm_edge.load.sources import NO_LABEL
from mm_edge.load.user_code import USER_CODE, import_callable
from mm_edge.records import InputSpec

READY_BYTES = 1536 * 2**20
READY_EXAMPLES = 10_000
# The array of a .npz that holds class indices, where no input has this name.
LABELS = "labels"

Array = npt.NDArray[Any]
# What damaged archives and headers raise.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Wanted:
    """What the arrays are checked against.

    Attributes:
        name: the name of the network's input; None where any name is taken, because a module's inputs have none.
        shape: the shape of one example.
        num_classes: how many classes the network has; None for one that is no classifier.
        dtype: NumPy's name of the input's type.
        several: the inputs of a network with more than one; `name`, `shape` and `dtype` are then those of the first.
    """

    name: str | None
    shape: tuple[int, ...]
    num_classes: int | None
    dtype: str = "float32"
    several: tuple[ModelInput, ...] = ()


@dataclass
class Ready:
    """Inputs that were read and checked; without labels `classes` is empty and every label is NO_LABEL."""

    where: str
    inputs: Array
    labels: IntArray
    classes: tuple[str, ...]

    def name(self, index: int) -> str:
        """Return the name of an example for messages."""
        return f"{self.where}[{index}]"

    def identity(self) -> str:
        """Return a digest of the inputs and labels."""
        digest = hashlib.sha256(repr((self.inputs.shape, self.labels.tolist())).encode())
        for array in in_order_of_fields(self.inputs):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class ReadyPool:
    """Ready inputs as the pool that splits are cut from."""

    def __init__(self, source: Ready, spec: InputSpec) -> None:
        """Take the inputs and the specification of the network's input."""
        self.source = source
        self.spec = spec
        self.readable: BoolArray = np.ones(len(source.labels), dtype=bool)
        self.unreadable: list[str] = []

    @property
    def holds_photos(self) -> bool:
        """False: they cannot be made again for another input."""
        return False

    def read(self, index: int) -> Array:
        """Return one example."""
        return np.asarray(self.source.inputs[index])

    def stack(self, pieces: Sequence[Any]) -> Array:
        """Return examples as one batch."""
        return np.stack(pieces)

    def decode(self, index: int) -> Image.Image | None:
        """Return None: an example is no photo."""
        return None

    def prepared_for(self, spec: InputSpec) -> ReadyPool:
        """Refuse another input.

        Raises:
            DataError: always.
        """
        raise DataError(f"'{self.source.where}' holds inputs for one size; give photos for other input sizes")


def open_ready(
    path: str, spec: InputSpec, num_classes: int | None, inputs: Sequence[ModelInput] = ()
) -> tuple[Ready, tuple[str, ...]] | None:
    """Return the ready inputs that `path` names, and notes for the user; None where it names something else.

    `inputs` are those of an .onnx or of a module with several; without them the network is a module with one input of
    any name.

    Raises:
        DataError: they cannot be read, or do not fit the network.
        ModelError: the user's code cannot be imported.
    """
    is_code, is_file = USER_CODE.match(path) is not None, Path(path).is_file()
    suffix = Path(path).suffix.lower()
    if not is_code and not (is_file and suffix in (".npz", ".npy")):
        return None
    shape = inputs[0].measured[1:] if inputs else spec.array_shape
    dtype = inputs[0].dtype if inputs else "float32"
    several = tuple(inputs) if len(inputs) > 1 else ()
    wanted = Wanted(inputs[0].name if inputs else None, shape, num_classes, dtype, several)
    if is_code:
        return _read_code(path, wanted)
    arrays = _read_archive(Path(path)) if suffix == ".npz" else {wanted.name or "inputs": _read_array(Path(path))}
    return _check(path, arrays, wanted)


# ---- files


def _read_archive(path: Path) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            total = 0
            for name in names:
                with archive.open(name) as file:
                    total += _declared_bytes(f"'{path}': {name.removesuffix('.npy')}", file)
            _check_bytes(path, total)
        with np.load(path, allow_pickle=False) as loaded:
            return {name.removesuffix(".npy"): loaded[name.removesuffix(".npy")] for name in names}
    except _DAMAGED as error:
        raise DataError(f"'{path}' cannot be read as an .npz of arrays: {first_line(error)}") from error


def _read_array(path: Path) -> Array:
    try:
        with path.open("rb") as file:
            _check_bytes(path, _declared_bytes(f"'{path}'", file))
        return np.asarray(np.load(path, allow_pickle=False))
    except _DAMAGED as error:
        raise DataError(f"'{path}' cannot be read as an .npy array: {first_line(error)}") from error


def _declared_bytes(what: str, file: IO[bytes]) -> int:
    """Return how many bytes the array takes that a .npy file begins with the header of."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise DataError(f"{what} holds Python objects, which are not read; save arrays of numbers")
    return math.prod(shape) * dtype.itemsize


def _check_bytes(path: Path, total: int) -> None:
    if not 0 <= total <= READY_BYTES:
        raise DataError(
            f"'{path}' holds {_megabytes(total)} MB of arrays, and at most {READY_BYTES / 2**20:,.0f} MB are kept in "
            "memory; give fewer examples"
        )


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f}" if count < 1 << 80 else "over 10^18"


# ---- the user's code


def _read_code(path: str, wanted: Wanted) -> tuple[Ready, tuple[str, ...]]:
    function = import_callable(path, "--data")
    batches: list[dict[str, Array]] = []
    count = size = 0
    cut = False
    for batch in _yielded(path, function):
        batches.append(batch)
        first = next(iter(batch.values()))
        count += len(first) if first.ndim else 0
        size += sum(array.nbytes for array in batch.values())
        if count >= READY_EXAMPLES or size >= READY_BYTES:
            cut = True
            break
    if not batches:
        raise DataError(f"--data {path} yields nothing; yield batches of inputs")
    try:
        joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    except (KeyError, ValueError) as error:
        raise DataError(f"--data {path} yields batches that differ in names or shapes: {first_line(error)}") from error
    ready, notes = _check(path, joined, wanted)
    return ready, (*notes, f"only the first {count} examples of '{path}' are used") if cut else notes


def _yielded(path: str, function: Any) -> Iterator[dict[str, Array]]:
    """Yield each batch of the user's code by name, its labels under LABELS."""
    number = 0
    try:
        for batch in function():
            number += 1
            yield _named(batch)
    except DataError as error:
        raise DataError(f"--data {path}: batch {number} {error}") from error
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"--data {path} failed after {number} batches: {first_line(error)}") from error


def _named(batch: Any) -> dict[str, Array]:
    inputs, labels = batch, None
    if isinstance(batch, (tuple, list)):
        if not 1 <= len(batch) <= 2:
            raise DataError(f"has {len(batch)} parts; yield inputs, or (inputs, labels)")
        inputs, labels = batch[0], batch[1] if len(batch) == 2 else None
    named = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    if labels is not None:
        named[LABELS] = labels
    return {str(name): _as_array(value) for name, value in named.items()}


def _as_array(value: Any) -> Array:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise DataError(f"holds {type(value).__name__}; yield arrays of numbers")
    return array


# ---- checks


def _check(where: str, arrays: Mapping[str, Array], wanted: Wanted) -> tuple[Ready, tuple[str, ...]]:
    rest = dict(arrays)
    taken = {wanted.name, *(item.name for item in wanted.several)}
    labels = rest.pop(LABELS, None) if LABELS not in taken else None
    if wanted.several:
        inputs = _join(where, rest, wanted)
    else:
        name = _input_name(where, list(rest), wanted)
        inputs = _check_inputs(f"'{where}': {name}", rest[name], wanted)
    if labels is None:
        note = f"'{where}' has no labels: its inputs count as unlabelled, so no accuracy is measured"
    elif wanted.num_classes is None:
        note = f"the model is no classifier: the labels in '{where}' are not used"
    else:
        classes = tuple(str(index) for index in range(wanted.num_classes))
        return Ready(where, inputs, _check_labels(where, labels, len(inputs), wanted.num_classes), classes), ()
    return Ready(where, inputs, np.full(len(inputs), NO_LABEL), ()), (note,)


def _join(where: str, arrays: Mapping[str, Array], wanted: Wanted) -> Array:
    """Return the arrays of a network with several inputs as one structured array, see mm_edge/arrays.py."""
    names = [item.name for item in wanted.several]
    if set(arrays) != set(names):
        raise DataError(
            f"'{where}' holds {', '.join(arrays) or 'no arrays'}; the model takes {', '.join(names)}: give one array "
            "of each name in an .npz"
        )
    checked = {
        item.name: _check_inputs(
            f"'{where}': {item.name}", arrays[item.name], Wanted(item.name, item.measured[1:], None, item.dtype)
        )
        for item in wanted.several
    }
    counts = {name: len(array) for name, array in checked.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"'{where}' holds different numbers of examples: {listed}; give one of each input per example")
    joined = np.empty(len(checked[names[0]]), [(name, array.dtype, array.shape[1:]) for name, array in checked.items()])
    for name, array in checked.items():
        joined[name] = array
    return joined


def _input_name(where: str, names: Iterable[str], wanted: Wanted) -> str:
    found = list(names)
    unnamed = found == ["inputs"]  # a .npy, or a batch that is an array
    if len(found) == 1 and (wanted.name is None or unnamed or found[0] == wanted.name):
        return found[0]
    listed = ", ".join(found) or "no arrays"
    expected = f"the input '{wanted.name}'" if wanted.name is not None else "one input"
    raise DataError(f"'{where}' holds {listed}; the model takes {expected}: give one array of that name")


def _check_inputs(what: str, array: Array, wanted: Wanted) -> Array:
    if array.ndim == 0 or array.shape[1:] != wanted.shape:
        needed = ", ".join(map(str, wanted.shape))
        raise DataError(f"{what} has shape {array.shape}; the model takes (examples, {needed})")
    if not len(array):
        raise DataError(f"{what} holds no examples")
    kind = np.dtype(wanted.dtype).kind
    if array.dtype.kind != kind and not (kind == "i" and array.dtype.kind == "u"):
        hint = "float32, scaled and normalised already" if kind == "f" else wanted.dtype
        raise DataError(f"{what} holds {array.dtype} values; the model takes {hint}: convert them")
    with np.errstate(over="ignore"):
        values = np.asarray(array, dtype=np.float32 if kind == "f" else wanted.dtype)
    bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if bad.any():
        raise DataError(
            f"{what} holds NaN or infinite values in {int(bad.sum())} of {len(values)} examples, the first in number "
            f"{int(bad.argmax())}"
        )
    return values


def _check_labels(where: str, labels: Array, count: int, num_classes: int) -> IntArray:
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"'{where}': {LABELS} has shape {labels.shape} and type {labels.dtype}; give one whole number for each of "
            f"the {count} examples"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"'{where}': {LABELS} are from {low} to {high}; the model has classes 0 to {num_classes - 1}")
    return np.asarray(labels, dtype=np.int64)
