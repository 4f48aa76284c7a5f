"""The bundle: files for the device, made of the chosen artifact, beside the plain .onnx."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mm_edge.formats.context import FormatContext
from mm_edge.formats.registry import FORMATS
from mm_edge.plan.n_m import parse_pattern, runtime_instructions
from mm_edge.records import Candidate, to_json
from mm_edge.store import write_atomically

FOLDER = "bundle"
ARCHIVE = "bundle.tar.gz"


def write_bundle(folder: Path, chosen: Candidate, context: FormatContext, formats: Sequence[str]) -> list[Path]:
    """Write what was asked for into `folder`/bundle and return the files.

    A candidate of kind n:m gets a runtime.json as well, which says how a runtime is told to use the pattern.

    Args:
        folder: the run directory.
        chosen: the candidate whose artifact they are made of.
        context: what formats are written with.
        formats: names of FORMATS; they are written in the registry's order.

    Raises:
        ParityError: a converted model does not agree with the .onnx.
    """
    assert chosen.artifact is not None
    source = folder / chosen.artifact
    bundle = folder / FOLDER
    bundle.mkdir(exist_ok=True)
    made: list[Path] = []
    for name, written in FORMATS.items():
        if name in formats:
            made += written.write(source, bundle, context)
    if chosen.kind == "n:m":
        path = bundle / "runtime.json"
        target = context.target
        text = json.dumps(to_json(runtime_instructions(target, parse_pattern(target.n_m[0]), source.name)), indent=2)
        write_atomically(path, text.encode() + b"\n")
        made.append(path)
    return made
