"""What makes the bundle a folder that somebody else can use: the model, what it needs, and a check of itself.

NAME.onnx        the chosen model, and NAME.onnx.data where its weights lie beside it
manifest.json    what it is: hashes, figures with their intervals, where the weights came from, versions
preprocess.json  how a photo becomes an input, and which of it nobody stated
labels.txt       the names of the classes, one a line; absent where nobody gave them
verify.npz       a few inputs and what the model answers
run.py           answers one photo;  verify.py checks and times the model on the device;  README.md says how
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mm_edge.arrays import Array, Float32Array
from mm_edge.formats.bundle.readme import write_readme
from mm_edge.formats.context import FormatContext
from mm_edge.quality.heads import find_head
from mm_edge.records import Candidate, DenseFigures, ModelInfo, to_json
from mm_edge.runtime import open_session
from mm_edge.store import hash_file, write_atomically

BUNDLE_VERSION = 1
MANIFEST = "manifest.json"
SCRIPTS = ("run.py", "verify.py")
TEXTS = (MANIFEST, "preprocess.json", "labels.txt", "verify.npz", *SCRIPTS, "README.md")
STORED_INPUTS = 4
STORED_BYTES = 5_000_000
STORED_VALUES = 4096  # of one output for one input
# The largest difference from the stored answers, as a share of the largest value: kernels of other devices round in
# another order, and int8 kernels saturate in another.
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "int8": 1e-1}
NUMBERS = (
    "accuracy_top1 accuracy_ci accuracy_drop drop_ci agreement_top1 kl_to_dense metric fidelity latency_ms speedup "
    "speedup_ci peak_memory_bytes file_bytes params macs sparsity parity"
).split()


@dataclass(frozen=True)
class Facts:
    """What the bundle says about the model beside the candidate itself.

    Attributes:
        model: the model as it was given.
        dense: the figures of the dense network, measured as the candidate was.
        labels: the names of the classes; empty where nobody gave them.
        reason: why the candidate was chosen.
        accuracy_top1_test: its accuracy on test images.
        provenance: where the weights came from, the target and versions, as in the model's own metadata.
    """

    model: ModelInfo
    dense: DenseFigures
    labels: tuple[str, ...]
    reason: str
    accuracy_top1_test: float | None
    provenance: Mapping[str, Any]


def names_of(chosen: Candidate) -> tuple[str, ...]:
    """Return the names of the files that `write_contents` may write, relative to the bundle."""
    assert chosen.artifact is not None
    name = Path(chosen.artifact).name
    return (name, f"{name}.data", *TEXTS)


def write_contents(
    folder: Path, bundle: Path, chosen: Candidate, context: FormatContext, facts: Facts, others: Sequence[Path] = ()
) -> list[Path]:
    """Write everything but the files of formats into `bundle`, and return the files.

    Args:
        folder: the run directory.
        bundle: the folder to write in, which is there.
        chosen: the candidate.
        context: its input and images.
        facts: what the bundle says about it.
        others: files of formats that lie in the bundle already, for the list of hashes.
    """
    assert chosen.artifact is not None
    made = [_copy(source, bundle) for source in _model_files(folder / chosen.artifact)]
    model = made[0]
    _write_json(bundle / "preprocess.json", describe_input(context))
    made.append(bundle / "preprocess.json")
    if facts.labels:
        made.append(bundle / "labels.txt")
        write_atomically(made[-1], "".join(f"{_one_line(label)}\n" for label in facts.labels).encode())
    stored = _store_answers(model, bundle / "verify.npz", context.inputs, chosen.precision, context.kind)
    if stored is not None:
        made.append(bundle / "verify.npz")
    for name in SCRIPTS:
        made.append(bundle / name)
        write_atomically(made[-1], (files("mm_edge.formats.bundle") / name).read_bytes())
    manifest = _describe(chosen, model, context, facts, stored)
    made.append(bundle / "README.md")
    write_atomically(made[-1], write_readme(manifest, [path.name for path in (*made, *others)]).encode())
    hashes = {path.name: hash_file(path) for path in sorted((*made, *others))}
    _write_json(bundle / MANIFEST, {**manifest, "files": hashes})
    return [*made, bundle / MANIFEST]


def describe_input(context: FormatContext) -> dict[str, Any]:
    """Return preprocess.json: the fields of records.InputSpec."""
    described: dict[str, Any] = to_json(context.input)
    return described


def write_archive(bundle: Path, path: Path, names: Sequence[str]) -> None:
    """Write the named files of `bundle` into the .tar.gz at `path`; the same files give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in sorted(names):
            entry = tarfile.TarInfo(f"{bundle.name}/{name}")
            entry.size = (bundle / name).stat().st_size
            entry.mode = 0o644
            with (bundle / name).open("rb") as content:
                archive.addfile(entry, content)
    write_atomically(path, gzip.compress(buffer.getvalue(), mtime=0))


def _describe(
    chosen: Candidate, model: Path, context: FormatContext, facts: Facts, stored: dict[str, Any] | None
) -> dict[str, Any]:
    session = open_session(model)
    figures = to_json(chosen)
    return {
        "bundle_version": BUNDLE_VERSION,
        "name": facts.model.name,
        "candidate": chosen.id,
        "reason": facts.reason,
        "model": {
            "file": model.name,
            "inputs": [_describe_tensor(item) for item in session.get_inputs()],
            "outputs": [_describe_tensor(item) for item in session.get_outputs()],
        },
        "target": context.target.name,
        "numbers": {
            **{name: figures[name] for name in NUMBERS if name in figures},
            "accuracy_top1_test": facts.accuracy_top1_test,
        },
        "dense": to_json(facts.dense),
        "assumed": list(context.input.assumed),
        "classes": len(facts.labels) or facts.model.num_classes,
        "weights_licence": facts.model.licence,
        "provenance": to_json(dict(facts.provenance)),
        "head": _find_head(session, context),
        "verify": stored,
    }


def _describe_tensor(item: Any) -> dict[str, Any]:
    return {"name": item.name, "shape": list(item.shape), "type": item.type}


def _find_head(session: Any, context: FormatContext) -> dict[str, Any] | None:
    """Return the layout of a detector's outputs and their names; None for other networks and for several inputs."""
    feeds = session.get_inputs()
    if len(feeds) != 1 or feeds[0].type != "tensor(float)" or feeds[0].shape[0] not in (1, None, "N", "batch"):
        return None
    names = [item.name for item in session.get_outputs()]
    answers = [session.run(None, {feeds[0].name: one[None]}) for one in context.inputs]
    outputs = {name: np.concatenate([answer[at] for answer in answers]) for at, name in enumerate(names)}
    head = find_head(outputs, context.input.shape[1:])
    return None if head is None else {"layout": head.layout, "outputs": list(head.outputs)}


def _store_answers(model: Path, path: Path, inputs: Float32Array, precision: str, kind: str) -> dict[str, Any] | None:
    """Store some inputs with the model's answers, and return how verify.py reads them.

    None where the model has several inputs, takes no single one, or one input is too large to be stored.
    """
    session = open_session(model)
    feeds = session.get_inputs()
    count = min(STORED_INPUTS, len(inputs), STORED_BYTES // max(1, inputs[:1].nbytes))
    takes_one = len(feeds) == 1 and (feeds[0].shape[:1] == [1] or not isinstance(feeds[0].shape[0], int))
    if not takes_one or count < 1:
        return None
    answers = [session.run(None, {feeds[0].name: one[None]}) for one in inputs[:count]]
    arrays: dict[str, Array] = {"inputs": np.asarray(inputs[:count])}
    outputs = []
    for index, item in enumerate(session.get_outputs()):
        flat = np.stack([np.asarray(answer[index]).reshape(-1) for answer in answers])
        stride = -(-flat.shape[1] // STORED_VALUES)
        arrays[f"expected_{index}"] = flat[:, ::stride]
        outputs.append({"name": item.name, "stride": stride})
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # arrays by name
    write_atomically(path, buffer.getvalue())
    return {
        "file": path.name,
        "input": feeds[0].name,
        "outputs": outputs,
        "count": count,
        "kind": kind,
        "tolerance": TOLERANCES.get(precision, max(TOLERANCES.values())),
    }


def _model_files(model: Path) -> list[Path]:
    data = model.with_name(f"{model.name}.data")
    return [model, data] if data.is_file() else [model]


def _copy(source: Path, folder: Path) -> Path:
    """Copy a file into `folder`; a large one is not read into memory."""
    target = folder / source.name
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    return target


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _one_line(text: str) -> str:
    return " ".join(text.split())
