"""What `mm-edge inspect` shows: layers, roles, ranges, coupled groups, and what is pinned and why."""

from __future__ import annotations

from typing import Any

from mm_edge.graph.answers import find_answers
from mm_edge.graph.groups import read_structure
from mm_edge.graph.layers import ROLES, read_layers
from mm_edge.graph.onnx_graph import read_raw
from mm_edge.load.models import LoadedModel
from mm_edge.plan.ranges import apply_constraints, rule_ranges
from mm_edge.records import to_json


def describe_model(model: LoadedModel, keep: tuple[str, ...], judge: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the document `inspect --json` prints; `judge` names what is compared with the dense network.

    Raises:
        UsageError: a name in `keep` or `judge` is not there.
    """
    raw = read_raw(model)
    structure = read_structure(raw, keep)
    layers = tuple(layer for layer in read_layers(raw) if layer.fqn in raw.weights)
    ranges = apply_constraints(layers, rule_ranges(layers, model.family), structured=True)
    return {
        "model": {**to_json(model.info), "macs": round(structure.macs())},
        "inputs": [
            {"name": i.name, "shape": list(i.shape), "measured": list(i.measured), "dtype": i.dtype}
            for i in model.inputs
        ],
        "warnings": list(model.warnings),
        "compared": [
            [
                {
                    "values": [part.value for part in kind.parts],
                    "channels": [kind.parts[0].start, kind.parts[0].stop],
                    "divergence": kind.divergence or ("kl" if len(kind.shape) == 2 else "channels"),
                }
                for kind in view
            ]
            for view in find_answers(raw, structure, judge).views
        ],
        "layers": [
            {
                **to_json(layer),
                "lo": ranges[layer.fqn].lo,
                "hi": ranges[layer.fqn].hi,
                "range": ranges[layer.fqn].reason,
                "recognised": ROLES[layer.role],
            }
            for layer in layers
        ],
        "groups": [{"id": g.id, "size": g.size, "tensors": list(g.tensors)} for g in structure.groups],
        "pinned": [
            {"id": p.id, "size": p.size, "tensors": list(p.tensors), "reason": p.reason} for p in structure.pinned
        ],
    }
