"""Each layer's share of the time, in the dense network and in the chosen one, from the profile of ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from mm_edge.bench.audit import CONVOLUTIONS, PRODUCTS, KernelUse, audit_model
from mm_edge.errors import BenchError
from mm_edge.records import Candidate, LayerPicture
from mm_edge.run.job import Job


def add_shares(
    job: Job, candidate: Candidate, layers: Sequence[LayerPicture], environment: Mapping[str, Any]
) -> tuple[LayerPicture, ...]:
    """Return the layers with their shares of the time; unchanged where no time is measured.

    A layer whose kernel is not found again in the graph that ran, as in an int8 file, keeps None.
    """
    transport = job.transport
    if not layers or transport is None or transport.source == "emulated":
        return tuple(layers)
    before, after = dict[str, float](), dict[str, float]()
    with job.stages.stage("shares of time"), contextlib.suppress(BenchError):
        for file, shares in ((job.dense_file, before), (job.artifact(candidate), after)):
            shares |= shares_of(file, audit_model(file, job.target, environment, transport=transport).kernels)
    return tuple(replace(item, time_before=before.get(item.fqn), time_after=after.get(item.fqn)) for item in layers)


def shares_of(file: Path, kernels: Sequence[KernelUse]) -> dict[str, float]:
    """Return the share of the time of each weight tensor in `file`, by its name.

    ONNX Runtime merges a convolution with what follows it and names the result by the last of these. A kernel whose
    output is that of a node with a weight is this node's. For the others the nodes before the output are searched, up
    to the nearest node with a weight that no other kernel was found for; where there are several, none is taken.
    """
    graph = onnx.load(file, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    weights = {item.name for item in graph.initializer}
    found: dict[str, float] = {}
    merged: list[KernelUse] = []
    for use in kernels:
        name = _weight_of(makers.get(use.output), weights)
        if name is None:
            merged.append(use)
        else:
            found[name] = use.share
    for use in merged:
        nearest = {name for name in _weights_before(use.output, makers, weights) if name not in found}
        if len(nearest) == 1:
            found[nearest.pop()] = use.share
    return found


def _weight_of(node: onnx.NodeProto | None, weights: set[str]) -> str | None:
    """Return the name of a convolution's or product's weight; None for other nodes."""
    if node is None or node.op_type not in CONVOLUTIONS + PRODUCTS:
        return None
    return next((name for name in node.input[1:] if name in weights), None)


def _weights_before(output: str, makers: Mapping[str, onnx.NodeProto], weights: set[str]) -> Iterator[str]:
    """Yield the weights of the nearest nodes with one before a value."""
    todo, seen = [output], set[str]()
    while todo:
        node = makers.get(todo.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        name = _weight_of(node, weights)
        if name is None:
            todo += node.input
        else:
            yield name
