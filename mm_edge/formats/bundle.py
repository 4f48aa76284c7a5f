"""Files for the device, made of the chosen artifact: what a runtime other than plain ONNX needs."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from mm_edge.arrays import Float32Array
from mm_edge.bench.target import Target
from mm_edge.formats.device_files import convert_to_ort, write_model
from mm_edge.formats.preprocess import bake_preprocess
from mm_edge.plan.n_m import parse_pattern, runtime_instructions
from mm_edge.records import Candidate, InputSpec, to_json
from mm_edge.store import write_atomically

FOLDER = "bundle"


def write_bundle(
    folder: Path,
    chosen: Candidate,
    spec: InputSpec,
    target: Target,
    inputs: Float32Array,
    kind: str,
    *,
    formats: tuple[str, ...],
) -> list[Path]:
    """Write what was asked for into `folder`/bundle and return the files.

    Args:
        folder: the run directory.
        chosen: the row whose artifact they are made of.
        spec: preprocessing to put inside the model.
        target: the device.
        inputs: images (N, C, H, W) on which the .ort must agree with the .onnx; `kind` says what they are.
        kind: "images" or "noise".
        ort: ONNX Runtime's own format, with the operators a reduced build needs.
        baked: a model that takes uint8 (height, width, channels) images of any size.

    Raises:
        ParityError: the .ort does not agree with the .onnx.
    """
    assert chosen.artifact is not None
    source = folder / chosen.artifact
    target_folder = folder / FOLDER
    target_folder.mkdir(exist_ok=True)
    made: list[Path] = []
    if "ort" in formats:
        files = convert_to_ort(source, target_folder, target, inputs, kind)
        made += [files.ort, files.operators]
    if "bake-preprocess" in formats:
        path = target_folder / f"{source.stem}-raw-images.onnx"
        write_model(bake_preprocess(onnx.load(source), spec), path)
        made.append(path)
    if chosen.kind == "n:m":
        path = target_folder / "runtime.json"
        text = json.dumps(to_json(runtime_instructions(target, parse_pattern(target.n_m[0]), source.name)), indent=2)
        write_atomically(path, text.encode() + b"\n")
        made.append(path)
    return made
