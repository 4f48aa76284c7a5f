"""ONNX Runtime's own format, .ort.

The file holds the graph as ONNX Runtime's optimiser leaves it. With it comes the list of operators and types it uses,
from which a reduced build of ONNX Runtime is configured. Optimisations for one CPU (blocked layouts) go into it only
when the target is this machine: a file with them may run nowhere else.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mm_edge.arrays import Float32Array
from mm_edge.bench.target import Target, matches_this_machine
from mm_edge.errors import JobError
from mm_edge.formats.context import FormatContext
from mm_edge.quality.parity import compare, onnx_runner, require
from mm_edge.records import Parity
from mm_edge.store import WRITING_PREFIX, disk_errors, refuse_link


@dataclass(frozen=True)
class OrtFiles:
    """The converted model, the operators it uses, and its agreement with the .onnx."""

    ort: Path
    operators: Path
    parity: Parity
    file_bytes: int


def write_ort(source: Path, folder: Path, context: FormatContext) -> list[Path]:
    """Write the model in `source` in ONNX Runtime's format into `folder`, with its list of operators."""
    files = convert_to_ort(source, folder, context.target, context.inputs, context.kind)
    return [files.ort, files.operators]


def convert_to_ort(model: Path, folder: Path, target: Target, inputs: Float32Array, kind: str) -> OrtFiles:
    """Write `model` in ONNX Runtime's format for `target` into `folder`, and check it against the .onnx.

    `inputs` (N, C, H, W) and their `kind` are those of the parity check.

    Raises:
        JobError: the conversion fails.
        ParityError: the .ort does not answer as the .onnx does; nothing is kept.
    """
    here = target.isa == "x86_64" and matches_this_machine(target)
    with disk_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix=WRITING_PREFIX) as name:
        made = _convert(model, Path(name), "amd64" if here else "arm")
        parity = compare(onnx_runner(made[0]), onnx_runner(model), inputs, kind)
        require(parity, made[0].name)
        for path in made:
            refuse_link(folder / path.name)
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
