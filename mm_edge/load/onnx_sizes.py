"""Decides at which sizes the inputs of an .onnx are read and measured.

A size comes from the first of these that states it: --input, --input-size, mm-edge's metadata, another dimension of the
same symbol, the file. An open batch is 1. Every other open size is refused, or guessed where only the structure is
wanted. The network is run once at these sizes, and at other ones if it leaves some open: what ONNX Runtime does not
accept is refused here, before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mm_edge.errors import ModelError, cause_line, first_line
from mm_edge.load.arguments import MAX_INPUT_VALUES
from mm_edge.load.network import COLOURS, LoadOptions, ModelInput, parse_shape
from mm_edge.runtime import FATAL, open_session

OPTION = "--input"
# Sides that a guess tries for open dimensions, in this order.
GUESSES = (224, 320, 256, 640, 512, 576, 128, 64, 48, 32, 16, 8, 4, 2, 1)
# What is added to each open size for the second verification, the first that runs; a later dimension gets twice it.
STEPS = (32, 64, 16, 8, 4, 1)
# A serialised model cannot be larger.
PROTOBUF_LIMIT = 2**31 - 1

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Declared:
    """An input as the file declares it.

    Attributes:
        name: its name.
        shape: its sizes, None where open; None for an unknown rank.
        symbols: the names of its open sizes, "" where one has none.
        dtype: NumPy's name of its type.
    """

    name: str
    shape: tuple[int | None, ...] | None
    symbols: tuple[str, ...]
    dtype: str


def resolve_inputs(
    path: Path,
    proto: onnx.ModelProto,
    declared: Sequence[Declared],
    options: LoadOptions,
    own: Any = None,
    *,
    converted: bool = False,
) -> tuple[tuple[ModelInput, ...], tuple[str, ...]]:
    """Return the inputs with the sizes they are measured at, and warnings for the user.

    `own` is the shape of the images that mm-edge wrote into an artifact of its own. `converted` says that `proto` is
    not what the file holds.

    Raises:
        ModelError: a size is open and nothing states it, an option does not fit, or ONNX Runtime refuses the network.
    """
    given = {**_own_shape(path, declared, own), **_given(path, declared, options)}
    declared, replaced = _replace_baked(declared, given)
    run = _open(path, proto if converted or replaced else None, declared if replaced else ())
    found = _bind(declared, given)
    missing = [item for item, shape in zip(declared, found, strict=True) if shape is None or None in shape]
    if missing and not options.guess_sizes:
        raise ModelError(_say_open(path, declared, missing))
    inputs, error = _first_accepted(declared, _guesses(declared, found), run)
    if error is not None:
        shown = " ".join(f"{item.name}={_text(item.measured)}" for item in inputs)
        raise ModelError(f"'{path}' does not run at {shown}: {error}; give other sizes with {OPTION} NAME=SHAPE")
    return _with_others(path, declared, inputs, run)


def _given(path: Path, declared: Sequence[Declared], options: LoadOptions) -> dict[str, Shape]:
    """Return the shapes that options state, by input."""
    known = {item.name: item for item in declared}
    given: dict[str, Shape] = {}
    for name, shape in options.inputs:
        if name not in known:
            raise ModelError(f"{OPTION} {name}: '{path}' takes {', '.join(known)}")
        rank = known[name].shape
        if rank is not None and len(rank) != len(shape):
            raise ModelError(
                f"{OPTION} {name}={_text(shape)} has {len(shape)} sizes; '{path}' takes {name} {_show(known[name])}"
            )
        given[name] = shape
    if options.input_size is not None:
        given = {**_from_image_size(path, declared, options.input_size), **given}
    return given


def _own_shape(path: Path, declared: Sequence[Declared], own: Any) -> dict[str, Shape]:
    """Return the shape that the file's own metadata states; nothing where it does not fit."""
    shape = parse_shape(own)
    try:
        return {} if shape is None else _from_image_size(path, declared, shape)
    except ModelError:
        return {}


def _from_image_size(path: Path, declared: Sequence[Declared], size: tuple[int, int, int]) -> dict[str, Shape]:
    """Return the shape that --input-size gives to the first input of images.

    Raises:
        ModelError: there is none, or it has other sizes.
    """
    for item in declared:
        if item.shape is not None and len(item.shape) == 4:
            last = item.shape[3] in COLOURS and item.shape[1] not in COLOURS
            sizes = (*size[1:], size[0]) if last else size
            own = item.shape[1:]
            if any(fixed not in (None, wanted) for fixed, wanted in zip(own, sizes, strict=True)):
                shown = tuple(own[-1:] + own[:-1]) if last else own
                raise ModelError(f"--input-size {size} is not the input of '{path}', {shown}")
            return {item.name: (item.shape[0] or 1, *sizes)}
    raise ModelError(f"--input-size {size} is for images; '{path}' takes {_show_all(declared)}: give {OPTION}")


def _replace_baked(declared: Sequence[Declared], given: Mapping[str, Shape]) -> tuple[tuple[Declared, ...], bool]:
    """Return the inputs with the fixed sizes that `given` states otherwise, and whether there were such sizes."""
    found: list[Declared] = []
    for item in declared:
        wanted = given.get(item.name)
        if wanted is not None and item.shape is None:
            item = replace(item, shape=(None,) * len(wanted), symbols=("",) * len(wanted))
        elif wanted is not None and item.shape is not None:
            own = tuple(None if size is None else new for size, new in zip(item.shape, wanted, strict=True))
            item = replace(item, shape=own)
        found.append(item)
    before = [item.shape for item in declared if item.shape is not None]
    after = [new.shape for old, new in zip(declared, found, strict=True) if old.shape is not None]
    return tuple(found), before != after


def _bind(declared: Sequence[Declared], given: Mapping[str, Shape]) -> list[tuple[int | None, ...] | None]:
    """Return the sizes that are stated; None where one is not, and None for an unknown rank."""
    bound: dict[str, int] = {}
    batches = {item.symbols[0] for item in declared if item.symbols} - {""}
    for item in declared:
        for symbol, size in zip(item.symbols, given.get(item.name, ()), strict=False):
            if symbol:
                bound.setdefault(symbol, size)
    for symbol in batches:
        bound.setdefault(symbol, 1)
    found: list[tuple[int | None, ...] | None] = []
    for item in declared:
        if item.shape is None or item.name in given:
            found.append(given.get(item.name))
            continue
        sizes = [
            bound.get(symbol) if size is None else size for size, symbol in zip(item.shape, item.symbols, strict=True)
        ]
        if sizes and sizes[0] is None:
            sizes[0] = 1
        found.append(tuple(sizes))
    return found


def _guesses(declared: Sequence[Declared], found: Sequence[tuple[int | None, ...] | None]) -> Iterator[list[Shape]]:
    """Yield shapes with every size stated; where some are not, one after the other of the guesses."""
    complete = [shape for shape in found if shape is not None and None not in shape]
    if len(complete) == len(found):
        yield [tuple(size for size in shape if size is not None) for shape in complete]
        return
    for side in GUESSES:
        guess: list[Shape] = []
        for shape in found:
            sizes = (1, None, None, None) if shape is None else shape
            image = len(sizes) == 4
            guess.append(
                tuple(
                    size if size is not None else 3 if image and index == 1 and sizes[3] not in COLOURS else side
                    for index, size in enumerate(sizes)
                )
            )
        yield guess


class _Runner:
    """Runs the network on noise; `error` says why it cannot."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def error(self, inputs: Sequence[ModelInput], shapes: Sequence[Shape]) -> str | None:
        """Return why the network does not run at `shapes`, None where it does."""
        for item, shape in zip(inputs, shapes, strict=True):
            if math.prod(shape) > MAX_INPUT_VALUES:
                return f"{item.name} is too large: an input has at most {MAX_INPUT_VALUES} values"
        feeds = {item.name: noise(shape, item.dtype) for item, shape in zip(inputs, shapes, strict=True)}
        try:
            self._session.run(None, feeds)
        except Exception as error:  # ONNX Runtime's own exception types have no common base
            return first_line(error)
        return None


def noise(shape: Shape, dtype: str, seed: int = 0) -> np.ndarray:
    """Return an input of `shape`: standard normal numbers, or zeros where it takes integers or truth values."""
    if not dtype.startswith("float"):
        return np.zeros(shape, dtype=dtype)
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), dtype=dtype)


def _open(path: Path, proto: onnx.ModelProto | None, replaced: Sequence[Declared]) -> _Runner:
    """Open the file, or `proto`; with `replaced` inputs its own shapes are forgotten and theirs put in.

    Raises:
        ModelError: ONNX Runtime cannot run it.
    """
    source: Path | bytes = path
    if proto is not None and proto.ByteSize() < PROTOBUF_LIMIT:
        twin = onnx.ModelProto()
        twin.CopyFrom(proto)
        if replaced:
            set_input_shapes_(twin, {item.name: item.shape for item in replaced if item.shape is not None})
        source = twin.SerializeToString()
    try:
        return _Runner(open_session(source, 0, severity=FATAL))
    except ModelError as error:
        shown = " ".join(f"{item.name}={_text(item.shape)}" for item in replaced if item.shape is not None)
        where = f"'{path}' with the shapes {shown}" if replaced else f"'{path}'"
        raise ModelError(f"ONNX Runtime cannot run {where}: {cause_line(error)}") from error


def set_input_shapes_(proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int | None]]) -> None:
    """Give inputs other shapes, None leaves a size as it is; the shapes of all other values are forgotten."""
    for value in proto.graph.input:
        for dimension, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            if size is not None:
                dimension.dim_value = size
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        for dimension in value.type.tensor_type.shape.dim:
            dimension.Clear()


def _first_accepted(
    declared: Sequence[Declared], guesses: Iterator[list[Shape]], runner: _Runner
) -> tuple[tuple[ModelInput, ...], str | None]:
    """Return the inputs at the first shapes that the network accepts, or at the first of all and why it does not."""
    first: tuple[tuple[ModelInput, ...], str] | None = None
    for shapes in guesses:
        inputs = tuple(_make_input(item, shape) for item, shape in zip(declared, shapes, strict=True))
        error = runner.error(inputs, shapes)
        if error is None:
            return inputs, None
        first = first or (inputs, error)
    assert first is not None
    return first


def _make_input(item: Declared, shape: Shape) -> ModelInput:
    """Return an input measured at `shape`; the number of channels of images is never open."""
    own = (None,) * len(shape) if item.shape is None else item.shape
    last = len(shape) == 4 and shape[3] in COLOURS and shape[1] not in COLOURS
    channels = None if len(shape) != 4 else 3 if last else 1
    fixed = tuple(new if index == channels else size for index, (size, new) in enumerate(zip(own, shape, strict=True)))
    return ModelInput(item.name, fixed, shape, shape, item.dtype)


def _with_others(
    path: Path, declared: Sequence[Declared], inputs: tuple[ModelInput, ...], runner: _Runner
) -> tuple[tuple[ModelInput, ...], tuple[str, ...]]:
    """Give the inputs other sizes that the network accepts, where some are open."""
    if all(None not in item.shape for item in inputs):
        return inputs, ()
    for shapes in _others(declared, inputs):
        if runner.error(inputs, shapes) is None:
            return tuple(replace(item, other=shape) for item, shape in zip(inputs, shapes, strict=True)), ()
    shown = " ".join(f"{item.name}={_text(item.measured)}" for item in inputs)
    return inputs, (f"{path.name} leaves sizes open, but no others than {shown} were found that it accepts",)


def _others(declared: Sequence[Declared], inputs: Sequence[ModelInput]) -> Iterator[list[Shape]]:
    """Yield shapes that differ from the measured ones in every open size, then in the sizes or the batch alone.

    Dimensions of one symbol change together. Other sizes get different steps, so that no ratio between them stays.
    """
    keys = [
        [symbol or f"{item.name}:{index}" for index, symbol in enumerate(item.symbols or ("",) * len(own.shape))]
        for item, own in zip(declared, inputs, strict=True)
    ]
    batches = {names[0] for names in keys if names}
    open_names = [
        name
        for names, item in zip(keys, inputs, strict=True)
        for name, size in zip(names, item.shape, strict=True)
        if size is None
    ]
    rest = [name for name in dict.fromkeys(open_names) if name not in batches]
    for sizes, batch in ((True, True), (True, False), (False, True)):
        for step in STEPS if sizes else STEPS[:1]:
            more = {**dict.fromkeys(batches, int(batch))}
            more |= {name: sizes * step * (1 + rest.index(name) % 2) for name in rest}
            yield [
                tuple(
                    size if fixed is not None else size + more[name]
                    for fixed, size, name in zip(item.shape, item.measured, names, strict=True)
                )
                for item, names in zip(inputs, keys, strict=True)
            ]


def _say_open(path: Path, declared: Sequence[Declared], missing: Sequence[Declared]) -> str:
    """Return the refusal of open sizes, with the options to give."""
    advice = " ".join(f"{OPTION} {item.name}={_letters(item)}" for item in missing)
    return f"'{path}' leaves sizes of its input open: {_show_all(declared)}; add {advice}"


def _letters(item: Declared) -> str:
    if item.shape is None:
        return "SHAPE"
    letters = "NHWC" if len(item.shape) == 4 and item.shape[3] in COLOURS else "NCHW"
    names = letters if len(item.shape) == 4 else ["N", *(f"D{index}" for index in range(1, len(item.shape)))]
    return ",".join(
        str(size) if size is not None else "1" if index == 0 else name
        for index, (size, name) in enumerate(zip(item.shape, names, strict=True))
    )


def _show(item: Declared) -> str:
    if item.shape is None:
        return "of unknown rank"
    return "(" + ", ".join("?" if size is None else str(size) for size in item.shape) + ")"


def _show_all(declared: Sequence[Declared]) -> str:
    return ", ".join(f"{item.name} {_show(item)}" for item in declared)


def _text(shape: Sequence[int | None]) -> str:
    return ",".join("?" if size is None else str(size) for size in shape)
