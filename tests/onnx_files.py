"""Small .onnx files written as text, and the check that artifacts made from one are exact at every size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from tiny_graphs import random_keep

from mm_edge.arrays import Array
from mm_edge.graph.compact import mask_tensors, masked_model, materialise_artifact
from mm_edge.graph.deploy import deploy
from mm_edge.graph.export import RawGraph
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.graph.onnx_graph import raw_from_onnx
from mm_edge.load.models import LoadedModel, LoadOptions, load_model
from mm_edge.load.onnx_sizes import noise
from mm_edge.runtime import open_session


@dataclass(frozen=True)
class Read:
    """A file as mm-edge reads it."""

    model: LoadedModel
    raw: RawGraph
    structure: Structure

    @property
    def pins(self) -> dict[str, str]:
        """Why each pinned group keeps its width, by its id."""
        return {group.id: group.reason for group in self.structure.pinned}

    @property
    def groups(self) -> list[str]:
        """The ids of the groups that can lose channels."""
        return [group.id for group in self.structure.groups]


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {name: rng.uniform(0.2, 1.0, shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    path: Path,
    text: str,
    weights: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, Array] | None = None,
    opset: int = 17,
    outputs: str = "float[] y",
) -> Path:
    """Write the graph of `text`, "(inputs) { nodes }", whose results are `outputs`, with random weights."""
    inputs, _, body = text.partition("{")
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{head} g ({inputs.strip().strip('()')}) => ({outputs}) {{ {body}")
    for name, array in {**random_weights(weights), **(constants or {})}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    onnx.save(proto, path)
    return path


def read(path: Path, **options: tuple[int, ...]) -> Read:
    """Read a file as inspect does; keywords are shapes of inputs."""
    model = load_model(str(path), LoadOptions(inputs=tuple(options.items()), guess_sizes=True))
    raw = raw_from_onnx(path, model.inputs)
    return Read(model, raw, read_structure(raw))


def artifact(found: Read, seed: int = 0) -> onnx.ModelProto:
    """Return an artifact that keeps a random half of every group."""
    keep = random_keep(found.structure, 0.5, seed)
    return ir.to_proto(deploy(materialise_artifact(found.raw, found.structure, keep), keep_names=True))


def assert_exact_at_every_size(found: Read, *shapes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Compare an artifact with its masked model at the measured sizes, at the other ones, and at `shapes`."""
    keep = random_keep(found.structure, 0.5)
    proto = artifact(found)
    compact = open_session(proto.SerializeToString())
    masked = masked_model(found.raw, mask_tensors(found.structure, keep))
    reference = open_session(ir.to_proto(masked).SerializeToString())
    dense = open_session(ir.to_proto(found.raw.given or found.raw.model).SerializeToString())
    inputs = found.model.inputs
    sizes = [{item.name: item.measured for item in inputs}, {item.name: item.other for item in inputs}, *shapes]
    for chosen in sizes:
        feeds = {item.name: noise(chosen[item.name], item.dtype, seed=1) for item in inputs}
        expected, got = reference.run(None, feeds), compact.run(None, feeds)
        assert [item.shape for item in got] == [item.shape for item in expected]
        for a, b in zip(got, expected, strict=True):
            assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 1e-30)
        changed = [np.abs(a - b).max() for a, b in zip(dense.run(None, feeds), expected, strict=True)]
        assert max(changed) > 0, "the masks change nothing: a void test"
    return proto
