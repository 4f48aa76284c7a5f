"""Reads what mm-edge needs to know of an .onnx file, after checking that it is one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from mm_edge.errors import ModelError, first_line
from mm_edge.load.weights import check_file

# Metadata entry in which mm-edge's own artifacts carry their InputSpec as JSON.
INPUT_METADATA_KEY = "mm_edge.input"


@dataclass(frozen=True)
class OnnxFile:
    """What is read from an .onnx.

    Attributes:
        path: the file.
        input_shape: channels, height and width of its input; None where the file leaves one open.
        num_classes: size of the last axis of the first output where it is (batch, classes), else None.
        params: number of floating-point values in its weights.
        config: mean, std, interpolation and crop_pct where the file carries them.
    """

    path: Path
    input_shape: tuple[int | None, ...]
    num_classes: int | None
    params: int
    config: dict[str, Any] = field(default_factory=dict)


def read_onnx(path: Path) -> OnnxFile:
    """Check an .onnx (external data beside it included) and read its input, output and size.

    Raises:
        ModelError: not an ONNX model, weights missing or not finite, or an input that is not one batch of NCHW images.
    """
    check_file(path)
    try:
        proto = onnx.load(str(path), load_external_data=False)
        _require_external_data(path, proto)
        onnx.checker.check_model(str(path))
        model = ir.load(path)
    except ModelError:
        raise
    except (DecodeError, onnx.checker.ValidationError, ValueError, TypeError, OSError, RuntimeError) as error:
        raise ModelError(f"'{path}' is not a valid ONNX model: {first_line(error)}") from error
    graph = model.graph
    if len(graph) == 0:
        raise ModelError(f"'{path}' is not a valid ONNX model: it has no operators")
    params = _count_weights(path, model)
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    shapes = [_dimensions(value) for value in inputs]
    if len(inputs) != 1 or len(shapes[0]) != 4:
        raise ModelError(
            f"'{path}' takes {', '.join(f'{v.name} {s}' for v, s in zip(inputs, shapes, strict=True)) or 'no input'}; "
            "one input of shape (N, C, H, W) is needed"
        )
    if shapes[0][3] in (1, 3) and shapes[0][1] not in (1, 3):
        raise ModelError(f"'{path}' takes images with channels last {shapes[0]}; export it with (N, C, H, W)")
    output = _dimensions(graph.outputs[0]) if graph.outputs else ()
    classes = output[1] if len(output) == 2 else None
    return OnnxFile(path, tuple(shapes[0][1:]), classes, params, _own_metadata(model))


def _require_external_data(path: Path, proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and not (path.parent / entry.value).is_file():
                raise ModelError(f"'{path}' keeps its weights in '{entry.value}', which is not beside it")


def _count_weights(path: Path, model: ir.Model) -> int:
    params = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        values = tensor.numpy().astype(np.float32)
        bad = values.size - int(np.isfinite(values).sum())
        # Single values may be limits such as -inf for a mask; they are constants, not weights.
        if bad and values.size > 1:
            raise ModelError(f"'{path}': {bad} of {values.size} values of {name} are NaN or infinite; export it again")
        params += values.size
    return params


def _dimensions(value: ir.Value) -> tuple[int | None, ...]:
    if value.shape is None:
        return ()
    return tuple(size if isinstance(size, int) and size > 0 else None for size in value.shape)


def _own_metadata(model: ir.Model) -> dict[str, Any]:
    text = model.metadata_props.get(INPUT_METADATA_KEY)
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}
