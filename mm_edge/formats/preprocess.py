"""Preprocessing inside the model (--bake-preprocess): uint8 (H, W, C) of any size in, as a camera or decoder gives it.

The same steps as the evaluation pipeline takes with Pillow, in the same 8-bit arithmetic:

    crop      short side -> floor(S / crop_pct), long side in proportion (rounded down), antialiased bicubic or bilinear
              centre crop to S x S, offset (size - S) / 2 rounded half to even
    stretch   both sides -> (H, W), antialiased in the same manner
    channels reversed where the network takes BGR
    (x * scale - mean) / std
    channels last where the network takes them so
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from mm_edge.errors import UsageError
from mm_edge.formats.context import FormatContext
from mm_edge.formats.device_files import write_model
from mm_edge.records import InputSpec

INPUT_NAME = "image"
PREPROCESS_OPSET = 18  # the first whose Resize can antialias
MODES = {"bicubic": "cubic", "bilinear": "linear"}
RESIZED = ("crop", "stretch")
_PREFIX = "preprocess_"


def bake_preprocess(model: onnx.ModelProto, spec: InputSpec) -> onnx.ModelProto:
    """Return a copy of `model` whose input is "image", uint8 (height, width, C), of any size.

    Raises:
        UsageError: the model's input is not one image of `spec`, or the interpolation has no ONNX equivalent.
    """
    _check(model, spec)
    baked = onnx.ModelProto()
    baked.CopyFrom(model)
    if next(entry.version for entry in baked.opset_import if entry.domain in ("", "ai.onnx")) < PREPROCESS_OPSET:
        baked = onnx.version_converter.convert_version(baked, PREPROCESS_OPSET)
    graph = baked.graph
    feed = _feed(baked)
    steps = _Steps()
    _add_steps(steps, spec)
    steps.nodes[-1].output[0] = feed.name
    shape: list[str | int | None] = ["height", "width", spec.shape[0]]
    image = helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, shape)
    nodes = [*steps.nodes, *graph.node]
    inputs = [image, *(item for item in graph.input if item.name != feed.name)]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    graph.initializer.extend(steps.constants)
    return baked


def write_baked(source: Path, folder: Path, context: FormatContext) -> list[Path]:
    """Write the model in `source` with its preprocessing inside into `folder`; see bake_preprocess."""
    path = folder / f"{source.stem}-raw-images.onnx"
    write_model(bake_preprocess(onnx.load(source), context.input), path)
    return [path]


class _Steps:
    """Collects nodes; each method returns the name of what it makes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: npt.ArrayLike, dtype: type) -> str:
        name = f"{_PREFIX}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{_PREFIX}{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name


def _add_steps(steps: _Steps, spec: InputSpec) -> None:
    planes = steps.add("Transpose", INPUT_NAME, perm=[2, 0, 1])
    batch = steps.add("Unsqueeze", planes, steps.constant([0], np.int64))
    fitted = _crop(steps, spec, batch) if spec.resize == "crop" else _stretch(steps, spec, batch)
    if spec.colours == "BGR" and spec.shape[0] == 3:
        fitted = steps.add("Gather", fitted, steps.constant([2, 1, 0], np.int64), axis=1)
    numbers = steps.add("Cast", fitted, to=TensorProto.FLOAT)
    unit = steps.add("Div", numbers, steps.constant(1 / spec.scale, np.float32))
    mean, std = (np.reshape(values, (1, -1, 1, 1)) for values in (spec.mean, spec.std))
    centred = steps.add("Sub", unit, steps.constant(mean, np.float32))
    made = steps.add("Div", centred, steps.constant(std, np.float32))
    if spec.layout == "NHWC":
        steps.add("Transpose", made, perm=[0, 2, 3, 1])


def _stretch(steps: _Steps, spec: InputSpec, batch: str) -> str:
    return _resize(steps, spec, batch, steps.constant([1, *spec.shape], np.int64))


def _crop(steps: _Steps, spec: InputSpec, batch: str) -> str:
    channels, side, _ = spec.shape
    scaled = math.floor(side / spec.crop_pct)
    size = steps.add("Shape", INPUT_NAME, start=0, end=2)
    short = steps.add("ReduceMin", size, keepdims=1)
    wanted = steps.add("Div", steps.add("Mul", size, steps.constant([scaled], np.int64)), short)
    whole = steps.add("Concat", steps.constant([1, channels], np.int64), wanted, axis=0)
    resized = _resize(steps, spec, batch, whole)
    rest = steps.add("Cast", steps.add("Sub", wanted, steps.constant([side], np.int64)), to=TensorProto.FLOAT)
    half = steps.add("Round", steps.add("Mul", rest, steps.constant([0.5], np.float32)))
    start = steps.add("Cast", half, to=TensorProto.INT64)
    end = steps.add("Add", start, steps.constant([side], np.int64))
    return steps.add("Slice", resized, start, end, steps.constant([2, 3], np.int64))


def _resize(steps: _Steps, spec: InputSpec, batch: str, size: str) -> str:
    return steps.add(
        "Resize",
        batch,
        "",
        "",
        size,
        mode=MODES[spec.interpolation],
        antialias=1,
        exclude_outside=1,
        cubic_coeff_a=-0.5,
        coordinate_transformation_mode="half_pixel",
    )


def _feed(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    constants = {tensor.name for tensor in model.graph.initializer}
    feeds: list[onnx.ValueInfoProto] = [item for item in model.graph.input if item.name not in constants]
    if len(feeds) != 1:
        raise UsageError(f"--bake-preprocess needs a model with one input; this one has {len(feeds)}")
    return feeds[0]


def _check(model: onnx.ModelProto, spec: InputSpec) -> None:
    tensor = _feed(model).type.tensor_type
    shape = [size.dim_value for size in tensor.shape.dim]
    wanted = [1, *spec.array_shape]
    if tensor.elem_type != TensorProto.FLOAT or shape != wanted:
        raise UsageError(f"--bake-preprocess needs an fp32 input of shape {wanted}; this model has {shape}")
    require_bakeable(spec)


def require_bakeable(spec: InputSpec) -> None:
    """Refuse preprocessing that has no equivalent in ONNX operators.

    Raises:
        UsageError: the interpolation, the resizing or the shape of `spec` is not among those that are written.
    """
    if spec.resize not in RESIZED:
        raise UsageError(
            f"--bake-preprocess writes the resizings {' and '.join(RESIZED)}; this network's is {spec.resize}"
        )
    if spec.interpolation not in MODES:
        raise UsageError(
            f"--bake-preprocess knows {' and '.join(MODES)}; this network was trained with {spec.interpolation}"
        )
    if spec.resize == "crop" and spec.shape[1] != spec.shape[2]:
        raise UsageError(
            "--bake-preprocess with --resize crop needs a square input; "
            f"this network takes {spec.shape[1]} x {spec.shape[2]}"
        )
