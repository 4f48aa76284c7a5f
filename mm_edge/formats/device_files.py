"""Files a device loads: the model with what it needs to be used, ONNX Runtime's own format, weights beside the model.

Metadata lies in the model's own key-value store under "mm_edge.", each value JSON, so that a device needs no second
file:  labels, input (shape, mean, std, interpolation, crop_pct), opset, provenance.

The .ort file holds the graph as ONNX Runtime's optimiser leaves it. With it comes the list of operators and types it
uses, which is what a reduced build of ONNX Runtime is configured with. Optimisations for one CPU (blocked layouts) go
into it only when the target is this machine: a file with them may run nowhere else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from mm_edge.arrays import Float32Array
from mm_edge.bench.target import Target, matches_this_machine
from mm_edge.errors import JobError, ModelError
from mm_edge.quality.parity import Run, compare, onnx_runner, require
from mm_edge.records import InputSpec, Parity, to_json
from mm_edge.runtime import open_session
from mm_edge.store import disk_errors, write_atomically

KEY_PREFIX = "mm_edge."
# Protocol buffers end at 2 GiB; weights move out well before.
EXTERNAL_OVER = 1536 * 2**20
EXTERNAL_TENSOR_BYTES = 1024


@dataclass(frozen=True)
class OrtFiles:
    """The converted model, the operators it uses, and its agreement with the .onnx."""

    ort: Path
    operators: Path
    parity: Parity
    file_bytes: int


def add_metadata_(
    model: onnx.ModelProto, spec: InputSpec, labels: Sequence[str], provenance: Mapping[str, Any]
) -> None:
    """Write labels, preprocessing, opset and provenance into `model`; what was there under these keys is replaced.

    `provenance` holds JSON values: where the weights came from, what was pruned, versions.
    """
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=None)
    values = {"labels": list(labels), "input": to_json(spec), "opset": opset, "provenance": to_json(dict(provenance))}
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
            key.removeprefix(KEY_PREFIX): json.loads(value)
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
    with disk_errors(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
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


def convert_to_ort(model: Path, folder: Path, target: Target, inputs: Float32Array, kind: str) -> OrtFiles:
    """Write `model` in ONNX Runtime's format for `target` into `folder`, and check it against the .onnx.

    `inputs` (N, C, H, W) and their `kind` are those of the parity check.

    Raises:
        JobError: the conversion fails.
        ParityError: the .ort does not answer as the .onnx does; nothing is kept.
    """
    here = target.isa == "x86_64" and matches_this_machine(target)
    with disk_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as name:
        made = _convert(model, Path(name), "amd64" if here else "arm")
        parity = compare(onnx_runner(made[0]), onnx_runner(model), inputs, kind)
        require(parity, made[0].name)
        ort, operators = (path.replace(folder / path.name) for path in made)
    return OrtFiles(ort, operators, parity, ort.stat().st_size)


def _convert(model: Path, folder: Path, platform: str) -> tuple[Path, Path]:
    """Run ONNX Runtime's converter, in a process of its own: importing it sets up logging for the whole process."""
    command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(model)]
    command += ["--output_dir", str(folder), "--optimization_style", "Fixed", "--target_platform", platform]
    done = subprocess.run([*command, "--enable_type_reduction"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise JobError(f"ONNX Runtime cannot convert '{model}' to .ort: {_last_line(done.stderr)}")
    operators = folder / f"{model.stem}.required_operators_and_types.config"
    lines = operators.read_text(encoding="utf-8").splitlines(keepends=True)
    # The comments hold paths of this machine.
    operators.write_text("".join(line for line in lines if not line.startswith("#")), encoding="utf-8")
    return folder / f"{model.stem}.ort", operators


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it says nothing"


def run_images(model: Path) -> Run:
    """Return a function that runs a model with baked preprocessing on one uint8 image (H, W, C)."""
    session = open_session(model)
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})
