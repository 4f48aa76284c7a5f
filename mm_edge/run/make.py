"""One candidate: from an assignment to a verified artifact with its accuracy.

    assignment -> masks -> (recover) -> compact graph -> file -> parity -> accuracy

`make_candidate` is a pure function of a `Workbench`, which holds what all candidates share, and a `Plan`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import safetensors
import safetensors.numpy
import torch
from torch import nn

from mm_edge.arrays import Array, Arrays, BoolArray, Float32Array, IntArray
from mm_edge.errors import ParityError
from mm_edge.formats.device_files import add_metadata_, write_model
from mm_edge.formats.sparse_file import store_smallest
from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.compact import AxisMask, apply_mask, mask_tensors, masked_model, materialise
from mm_edge.graph.depth import dead_tensors
from mm_edge.graph.export import RawGraph, deploy
from mm_edge.graph.groups import Structure
from mm_edge.graph.widths import sparsity_of
from mm_edge.plan.counts import count_macs, count_parameters
from mm_edge.plan.masks import measure_sparsity
from mm_edge.plan.n_m import reduced_axes, require_pattern
from mm_edge.plan.plans import PATTERN, ChannelPlan, Plan, WeightPlan
from mm_edge.quality.evaluation import Judgement, Reference, judge, run_onnx
from mm_edge.quality.parity import Run, compare, onnx_runner, require, torch_runner
from mm_edge.records import Candidate, InputSpec, Layer, Parity, candidate_id, file_name
from mm_edge.recover.closed_form.batchnorm import has_batch_norm, reestimate_batch_norm_
from mm_edge.recover.closed_form.context import RecoveryContext
from mm_edge.recover.closed_form.pattern import recover_pattern
from mm_edge.recover.closed_form.recovery import Recovered, recover_closed_form
from mm_edge.recover.closed_form.sensitivity import Sensitivity
from mm_edge.runtime import release_memory
from mm_edge.store import write_atomically


@dataclass(frozen=True)
class Images:
    """The images a candidate is judged on.

    Attributes:
        parity: inputs of the parity check (N, C, H, W) and their kind, "images" or "noise".
        recovery: yields batches of calibration images for recovery; None without data.
        validation: (images, labels) read in batches; None without data.
        labels: labels of the validation images; None without data.
        dense_logits: the dense model's answers on the validation images.
    """

    parity: Float32Array
    parity_kind: str
    recovery: Callable[[], Iterator[Float32Array]] | None = None
    validation: Callable[[], Iterator[tuple[Float32Array, IntArray]]] | None = None
    labels: IntArray | None = None
    dense_logits: Float32Array | None = None


@dataclass(frozen=True)
class Workbench:
    """What all candidates of a run share.

    `module` is the dense network, None for an .onnx; `recovery` what the closed form works from, None without it;
    `held_out` says that held-back images judge what comes after the closed form, so that it may not solve for them;
    `spec`, `labels` and `provenance` are written into every artifact.
    """

    module: nn.Module | None
    raw: RawGraph
    structure: Structure
    layers: tuple[Layer, ...]
    images: Images
    recover: str
    folder: Path
    dense_accuracy: float | None
    threads: int
    spec: InputSpec
    labels: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    recovery: RecoveryContext | None = None
    held_out: bool = False
    select: str = "signal"
    sensitivities: Mapping[Axis, Sensitivity] = field(default_factory=dict)


# Workbenches by the side of their input, the dense one first.
Benches = Mapping[int, Workbench]


def bench_of(benches: Benches, side: int | None) -> Workbench:
    """Return the workbench of a plan's size: the first is the dense one."""
    return next(iter(benches.values())) if side is None else benches[side]


def dense_candidate(bench: Workbench, name: str, artifact: Path) -> Candidate:
    """Return the dense network of `bench` as the row `name`, not judged yet."""
    return Candidate(
        id=name,
        signal="none",
        strategy="dense",
        kind="dense",
        precision="fp32",
        sparsity=0.0,
        params=count_parameters(bench.raw),
        macs=round(bench.structure.macs()),
        input_shape=tuple(bench.images.parity.shape[1:]),
        artifact=artifact.relative_to(bench.folder).as_posix(),
    )


def make_control(bench: Workbench, side: int) -> Candidate:
    """Make, save, verify and evaluate the dense network on pictures of another size.

    Raises:
        ParityError: the artifact does not agree with the network; nothing is kept of it.
    """
    assert bench.module is not None
    parts = ("none", "dense", "dense", "fp32", side)
    name = candidate_id(*parts)
    artifact = bench.folder / "candidates" / f"{file_name(*parts)}.onnx"
    _write(bench, ir.to_proto(deploy(bench.raw.model.clone())), artifact, candidate=name)
    try:
        parity = _check(bench, artifact, torch_runner(copy.deepcopy(bench.module)), name)
    except ParityError:
        artifact.unlink()
        raise
    row = dense_candidate(bench, name, artifact)
    return replace(row, file_bytes=artifact.stat().st_size, parity=parity, **evaluate_artifact(bench, artifact))


def make_candidate(bench: Workbench, plan: Plan, *, walk_again: bool = False) -> Candidate:
    """Make, save, verify and evaluate one candidate.

    The closed form starts from the dense network's moments; with `walk_again` it goes on through the pruned network.

    Raises:
        ParityError: the artifact does not agree with its masked model; nothing is kept of it.
    """
    plan, changes, recovered = _solve(bench, plan, walk_again)
    tensors, reference, recovered = _masked_weights(bench, plan, changes, recovered)
    name = f"{plan.file_name}-walked" if walk_again else plan.file_name
    return save_candidate(bench, plan, tensors, reference, recovered, name)


def _write(bench: Workbench, proto: onnx.ModelProto, artifact: Path, **provenance: Any) -> None:
    """Write a model with its metadata."""
    add_metadata_(proto, bench.spec, bench.labels, {**bench.provenance, **provenance})
    write_model(proto, artifact)


def save_trained(bench: Workbench, plan: Plan, tensors: Arrays, recovered: str, name: str) -> Candidate:
    """Save `tensors` that were trained in PyTorch, verified against the module that holds them; see save_candidate."""
    module = copy.deepcopy(bench.module)
    assert module is not None
    module.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    return save_candidate(bench, plan, tensors, torch_runner(module), recovered, name)


def save_candidate(
    bench: Workbench, plan: Plan, tensors: Arrays, reference: Run, recovered: str | None, name: str
) -> Candidate:
    """Save the compact model of the masked `tensors` as `name`, verify it against `reference`, and evaluate it.

    Raises:
        ParityError: the artifact does not agree with its masked model; nothing is kept of it.
    """
    keep = kept_channels(plan)
    artifact = bench.folder / "candidates" / f"{name}.onnx"
    # Nothing of the graph stays in memory beside what is then loaded to verify it.
    _write(bench, ir.to_proto(compact_model(bench, plan, tensors)), artifact, candidate=plan.id, recovered_by=recovered)
    release_memory()
    try:
        parity = _check(bench, artifact, reference, plan.id)
    except ParityError:
        artifact.unlink()
        raise
    if isinstance(plan, WeightPlan) and plan.kind == "n:m":
        require_pattern(artifact, plan.masks, reduced_axes(bench.raw.model), PATTERN)
    stored = artifact
    if plan.kind == "unstructured":
        stored = store_smallest(artifact, bench.folder / "dense.onnx", artifact.parent / "stored").path
    state = bench.folder / "candidates" / f"{name}.safetensors"
    write_atomically(state, safetensors.numpy.save(tensors, metadata=_write_kept(bench.structure, plan)))
    return Candidate(
        id=plan.id,
        signal=plan.assignment.signal,
        strategy=plan.assignment.strategy,
        kind=plan.kind,
        precision="fp32",
        sparsity=_sparsity(bench, plan, tensors),
        params=_parameter_count(bench, tensors, plan, keep),
        macs=round(count_macs(bench.raw, bench.structure, keep)),
        input_shape=tuple(bench.images.parity.shape[1:]),
        file_bytes=stored.stat().st_size,
        stored_file=None if stored is artifact else stored.relative_to(bench.folder).as_posix(),
        parity=parity,
        recovered_by=recovered,
        artifact=artifact.relative_to(bench.folder).as_posix(),
        masked_state_dict=state.relative_to(bench.folder).as_posix(),
        also_named=plan.assignment.names[1:],
        removed_blocks=plan.removed if isinstance(plan, ChannelPlan) else (),
        **evaluate_artifact(bench, artifact),
    )


def compact_model(bench: Workbench, plan: Plan, tensors: Arrays) -> ir.Model:
    """Return the deployable model of masked, dense-shaped `tensors`."""
    return deploy(materialise(bench.raw, bench.structure, kept_channels(plan), tensors))


def kept_channels(plan: Plan) -> Keep:
    """Return the channels a plan keeps; a plan of single weights keeps them all."""
    return plan.keep if isinstance(plan, ChannelPlan) else {}


def _write_kept(structure: Structure, plan: Plan) -> dict[str, str] | None:
    """Return what the file of a structured candidate says beside its weights: the indices each group keeps, as bits."""
    if not isinstance(plan, ChannelPlan):
        return None
    bits = {group.id: np.packbits(plan.keep[group.leaf]) for group in structure.groups if group.leaf in plan.keep}
    return {"kept": json.dumps({name: packed.tobytes().hex() for name, packed in bits.items()})}


def read_masked_state(structure: Structure, plan: Plan, path: Path) -> tuple[Plan, Arrays]:
    """Return the masked weights `save_candidate` wrote, and the plan with the indices the recovery chose to keep."""
    with safetensors.safe_open(path, framework="numpy") as file:
        kept = json.loads((file.metadata() or {}).get("kept", "{}"))
        tensors: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if not isinstance(plan, ChannelPlan):
        return plan, tensors
    keep = {
        group.leaf: np.unpackbits(np.frombuffer(bytes.fromhex(kept[group.id]), np.uint8), count=group.size) > 0
        for group in structure.groups
        if group.id in kept
    }
    return replace(plan, keep=keep), tensors


def evaluate_artifact(bench: Workbench, artifact: Path) -> Judgement:
    """Return what the validation images say of a model file; None throughout without any."""
    if bench.images.validation is None:
        return {"accuracy_top1": None, "accuracy_drop": None, "agreement_top1": None, "kl_to_dense": None}
    logits = run_onnx(artifact, bench.images.validation(), bench.threads)
    return judge(logits, Reference(bench.images.labels, bench.images.dense_logits, bench.dense_accuracy))


def _solve(bench: Workbench, plan: Plan, walk_again: bool) -> tuple[Plan, Arrays, str | None]:
    """Return the plan with the indices the closed form keeps (E9), the tensors it changes, and what to call it."""
    if bench.recovery is None:
        return plan, {}, None
    if not isinstance(plan, ChannelPlan):
        masks = plan.masks if isinstance(plan, WeightPlan) and plan.kind == "n:m" else None
        repaired = None if masks is None else recover_pattern(bench.recovery, masks)
        return plan, dict(repaired.tensors) if repaired else {}, "closed-form" if repaired and repaired.layers else None
    found = recover_keep(bench.recovery, plan.keep, bench.select, bench.sensitivities, walked=walk_again)
    name = "closed-form" if walk_again else "closed-form (screened)"
    # Images that judge the tuning must not have been solved for.
    tensors = found.fitted if bench.held_out else found.tensors
    return replace(plan, keep={**plan.keep, **found.keep}), dict(tensors), name


def recover_keep(
    context: RecoveryContext, keep: Keep, select: str, sensitivities: Mapping[Axis, Sensitivity], *, walked: bool
) -> Recovered:
    """Recover what `keep` leaves by the closed form; emptied groups have nothing to select."""
    counts = {leaf: int(kept.sum()) for leaf, kept in keep.items() if kept.any()}
    measured = {leaf: item for leaf, item in sensitivities.items() if leaf in counts}
    return recover_closed_form(context, keep, counts, select=select, sensitivities=measured, walked=walked)


def _masked_weights(
    bench: Workbench, plan: Plan, changes: Arrays, recovered: str | None
) -> tuple[Arrays, Run, str | None]:
    """Return the masked (and recovered) weights by name, a way to run the masked model, and what recovered it."""
    masks = mask_tensors(bench.structure, plan.keep) if isinstance(plan, ChannelPlan) else {}
    weight_masks = plan.masks if isinstance(plan, WeightPlan) else {}

    def pruned(name: str, array: Array) -> Array:
        return changes[name].astype(array.dtype) if name in changes else _mask(array, name, masks, weight_masks)

    if bench.module is None:
        tensors: Arrays = {}
        for name, value in bench.raw.model.graph.initializers.items():
            if name in bench.raw.parameters | bench.raw.buffers and value.const_value is not None:
                tensors[name] = pruned(name, value.const_value.numpy())
        return tensors, onnx_runner(masked_model(bench.raw, {}, tensors)), recovered
    module = copy.deepcopy(bench.module)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name in changes or name in masks or name in weight_masks:
                tensor.copy_(torch.from_numpy(np.ascontiguousarray(pruned(name, tensor.numpy(force=True)))))
    # The closed form has nothing to say of single weights without a pattern.
    reestimate = bench.recover == "bn" or (bench.recover != "none" and plan.kind == "unstructured")
    if reestimate and bench.images.recovery is not None and has_batch_norm(module):
        reestimate_batch_norm_(module, (torch.from_numpy(batch) for batch in bench.images.recovery()))
        recovered = "bn"
    # Views of the copy made above, which nothing changes from here on.
    state = {name: tensor.numpy(force=True) for name, tensor in module.state_dict().items()}
    return state, torch_runner(module), recovered


def _mask(array: Array, name: str, masks: Mapping[str, AxisMask], weight_masks: Mapping[str, BoolArray]) -> Array:
    if name in weight_masks:
        return np.where(weight_masks[name], array, np.zeros((), array.dtype))
    return apply_mask(array, masks.get(name))


def _check(bench: Workbench, artifact: Path, reference: Run, what: str) -> Parity:
    parity = compare(onnx_runner(artifact, bench.threads), reference, bench.images.parity, bench.images.parity_kind)
    require(parity, what)
    return parity


def _sparsity(bench: Workbench, plan: Plan, tensors: Arrays) -> float:
    """Structured: 1 - kept / dense weights. Unstructured: zeros counted on the exported weights."""
    if isinstance(plan, ChannelPlan):
        return sparsity_of(bench.structure, bench.layers, plan.keep)
    return measure_sparsity(tensors, bench.layers)


def _parameter_count(bench: Workbench, tensors: Arrays, plan: Plan, keep: Keep) -> int:
    """Count what is left of the parameters; zeros inside kept tensors count, they are stored."""
    total = 0
    for name in bench.raw.parameters - dead_tensors(bench.raw.model, bench.structure, keep):
        if name in bench.structure.tensor_axes:
            total += int(np.prod([int(axis.sum()) for axis in bench.structure.kept(name, keep)]))
        elif name in tensors:
            total += tensors[name].size
    return total
