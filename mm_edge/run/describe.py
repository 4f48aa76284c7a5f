"""What the report says about a finished job: the layers of the chosen network, and the command that runs it again."""

from __future__ import annotations

import shlex

import numpy as np
import safetensors.numpy

from mm_edge.plan.ranges import apply_constraints, rule_ranges
from mm_edge.records import Candidate, LayerPicture
from mm_edge.run.job import Job
from mm_edge.run.networks import Network
from mm_edge.run.options import Flag, Flags, InputShapes, Option, Patterns, list_options
from mm_edge.run.request import Request

# The share of its channels that a layer loses where its sensitivity is stated.
STATED_RATIO = 0.25
RULES = "rules"


def describe_layers(job: Job, dense: Network, chosen: Candidate) -> tuple[LayerPicture, ...]:
    """Return what became of every prunable layer in the chosen network; empty where its weights were not stored.

    Args:
        job: the job.
        dense: the dense network.
        chosen: the chosen candidate; its masked weights say what was removed.
    """
    if chosen.masked_state_dict is None:
        return ()
    weights = safetensors.numpy.load_file(job.folder / chosen.masked_state_dict)
    structured = chosen.kind == "structured"
    ranges = {}
    if job.request.ranges == RULES:
        ranges = apply_constraints(dense.layers, rule_ranges(dense.layers, job.model.family), structured=structured)
    sensitivities = _layer_sensitivities(dense)
    pictures = []
    for layer in dense.layers:
        weight = weights.get(layer.fqn)
        if weight is None or not weight.ndim:
            continue
        rows = weight.reshape(len(weight), -1) != 0
        bounds = ranges.get(layer.fqn)
        pictures.append(
            LayerPicture(
                fqn=layer.fqn,
                role=layer.role,
                width=len(rows),
                kept=int(rows.any(axis=1).sum()),
                sparsity=float(1 - np.count_nonzero(rows) / max(1, rows.size)),
                lo=None if bounds is None else bounds.lo,
                hi=None if bounds is None else bounds.hi,
                sensitivity=sensitivities.get(layer.fqn),
            )
        )
    return tuple(pictures)


def _layer_sensitivities(dense: Network) -> dict[str, float]:
    """Return the divergence of every layer whose output channels are a group that was measured."""
    names = {layer.fqn for layer in dense.layers}
    found = {}
    for group in dense.structure.groups:
        measured = dense.sensitivities.get(group.leaf)
        if measured is None:
            continue
        divergence = measured.kl(max(1, round(group.size * (1 - STATED_RATIO))))
        found.update({item.tensor: divergence for item in group.slices if item.axis == 0 and item.tensor in names})
    return found


def write_command(request: Request, source: str) -> str:
    """Return the command line that runs `request` again.

    Args:
        request: the options; those with their default are left out.
        source: the model as it was given, or a word for it.
    """
    words = ["mm-edge", "prune-export", source]
    for name, item in list_options(Request).items():
        value = getattr(request, name)
        default = item.default if item.default_by is None else item.default_by(vars(request))
        if value is not None and value != default:
            words += _words(item, value)
    return shlex.join(words)


def _words(item: Option, value: object) -> list[str]:
    if isinstance(item.kind, Flag):
        return [item.flag]
    if isinstance(item.kind, Flags):
        assert isinstance(value, tuple)
        return [f"--{name}" for name in value]
    if isinstance(item.kind, Patterns):
        assert isinstance(value, tuple)
        return [word for pattern in value for word in (item.flag, pattern)]
    if isinstance(item.kind, InputShapes):
        assert isinstance(value, tuple)
        shapes = (f"{name}={','.join(map(str, shape))}" for name, shape in value)
        return [word for shape in shapes for word in (item.flag, shape)]
    return [item.flag, ",".join(map(_word, value)) if isinstance(value, tuple) else _word(value)]


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
