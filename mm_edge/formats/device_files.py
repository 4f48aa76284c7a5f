"""Model files: written with what a device needs to use them, weights beside the model where they are large.

Metadata lies in the model's own key-value store under "mm_edge.", each value JSON, so that a device needs no second
file:  labels, input (the fields of records.InputSpec, with those that were assumed), opset, provenance.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from mm_edge.errors import ModelError
from mm_edge.quality.parity import Run
from mm_edge.records import InputSpec, parse_json, to_json
from mm_edge.runtime import open_session
from mm_edge.store import WRITING_PREFIX, disk_errors, refuse_link, write_atomically

KEY_PREFIX = "mm_edge."
# Protocol buffers end at 2 GiB; weights move out well before.
EXTERNAL_OVER = 1536 * 2**20
EXTERNAL_TENSOR_BYTES = 1024


def add_metadata_(
    model: onnx.ModelProto,
    spec: InputSpec,
    labels: Sequence[str],
    provenance: Mapping[str, Any],
    measured: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write labels, preprocessing, opset and provenance into `model`; what was there under these keys is replaced.

    Args:
        model: the model, changed in place.
        spec: what it expects of its input.
        labels: names of the classes.
        provenance: JSON values: where the weights came from, what was pruned, versions.
        measured: the shape that each input is measured at, for a model that leaves sizes open.
    """
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=None)
    values = {"labels": list(labels), "input": to_json(spec), "opset": opset, "provenance": to_json(dict(provenance))}
    if measured:
        values["measured"] = {name: list(shape) for name, shape in measured.items()}
    kept = [(entry.key, entry.value) for entry in model.metadata_props if not entry.key.startswith(KEY_PREFIX)]
    del model.metadata_props[:]
    for key, value in kept:
        model.metadata_props.add(key=key, value=value)
    for key, value in values.items():
        model.metadata_props.add(key=KEY_PREFIX + key, value=json.dumps(value, sort_keys=True, ensure_ascii=False))


def read_metadata(model: Path) -> dict[str, Any]:
    """Return what `add_metadata_` wrote, from an .onnx or .ort file; empty when there is none.

    Raises:
        ModelError: ONNX Runtime cannot load the file, or a value is not JSON.
    """
    found = open_session(model).get_modelmeta().custom_metadata_map
    try:
        return {
            key.removeprefix(KEY_PREFIX): parse_json(value)
            for key, value in found.items()
            if key.startswith(KEY_PREFIX)
        }
    except json.JSONDecodeError as error:
        raise ModelError(f"{model}: its mm_edge metadata is not JSON ({error})") from error


def write_model(model: onnx.ModelProto, path: Path, external_over: int = EXTERNAL_OVER) -> int:
    """Write `model` to `path` and return the bytes on disk; above `external_over` bytes the weights go to `path`.data.

    The .data file comes first and the model that names it last, so that a model that is there is whole.
    """
    if model.ByteSize() <= external_over:
        content = model.SerializeToString()
        write_atomically(path, content)
        return len(content)
    data = path.with_name(path.name + ".data")
    for written in (path, data):
        refuse_link(written)
    with disk_errors(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=WRITING_PREFIX) as folder:
        staged = Path(folder) / path.name
        onnx.save_model(
            model,
            staged,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=data.name,
            size_threshold=EXTERNAL_TENSOR_BYTES,
        )
        (Path(folder) / data.name).replace(data)
        staged.replace(path)
    return stored_bytes(path)


def stored_bytes(path: Path) -> int:
    """Return the bytes of a model file and of the weights beside it."""
    data = path.with_name(path.name + ".data")
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def run_images(model: Path) -> Run:
    """Return a function that runs a model with baked preprocessing on one uint8 image (H, W, C)."""
    session = open_session(model)
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})
