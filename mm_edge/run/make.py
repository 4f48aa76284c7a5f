"""Makes one candidate from a plan: a verified artifact, judged on the validation images.

    plan -> recovered weights -> masks -> compact graph -> file -> parity -> accuracy

`make_candidate` depends only on a network, a plan and the settings of the run; besides its result it writes files.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import safetensors
import safetensors.numpy
import torch

from mm_edge.arrays import Array, Arrays
from mm_edge.errors import ParityError
from mm_edge.formats.device_files import add_metadata_, write_model
from mm_edge.formats.sparse_file import store_smallest
from mm_edge.graph.axes import Keep
from mm_edge.graph.compact import AxisMask, apply_mask, mask_tensors, masked_model, materialise_artifact
from mm_edge.graph.deploy import deploy
from mm_edge.graph.depth import dead_tensors
from mm_edge.graph.groups import Structure
from mm_edge.graph.widths import sparsity_of
from mm_edge.plan.counts import count_macs, count_parameters
from mm_edge.plan.masks import measure_sparsity
from mm_edge.plan.n_m import reduced_axes, require_pattern
from mm_edge.plan.plans import PATTERN, ChannelPlan, Plan, WeightPlan
from mm_edge.quality.evaluation import NOT_JUDGED, Judgement, Reference, judge_model
from mm_edge.quality.parity import Run, compare, onnx_runner, require, torch_runner
from mm_edge.records import Candidate, Parity, candidate_id, file_name, parse_json
from mm_edge.run.job import DENSE_FILE
from mm_edge.run.networks import Network
from mm_edge.run.recoveries import RECOVERIES, Recovery
from mm_edge.runtime import release_memory
from mm_edge.store import write_atomically


@dataclass(frozen=True)
class MakeSettings:
    """How the candidates of a run are made, written and judged.

    Attributes:
        folder: the run directory.
        recovery: name of the recovery that every candidate gets when it is made.
        select: which channels stay: by the "signal", by optimal brain surgeon ("obs"), or the better ("auto").
        held_out: whether held-back images judge a later recovery, so that weights must not be solved on them.
        threads: how many images are run at a time.
        labels: names of the classes, written into every artifact.
        provenance: model, target and versions, written into every artifact.
        reference: what the dense network answers on the validation images.
    """

    folder: Path
    recovery: str
    select: str
    held_out: bool
    threads: int
    labels: tuple[str, ...]
    provenance: Mapping[str, Any]
    reference: Reference

    @property
    def recovery_entry(self) -> Recovery:
        """The registry's entry of the recovery."""
        return RECOVERIES[self.recovery]


@dataclass(frozen=True)
class Solved:
    """The result of a recovery before masks are applied.

    Attributes:
        plan: the plan, with other channels kept where the recovery chose others.
        tensors: the weights it changed, by name, dense-shaped.
        name: what the report calls the recovery; None where it changed nothing.
    """

    plan: Plan
    tensors: Mapping[str, Array] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True)
class MaskedWeights:
    """The masked weights of a candidate, after recovery.

    Attributes:
        tensors: the weights by name, dense-shaped.
        run: runs the masked network, which the artifact is verified against.
        recovered_by: what the report calls the recovery; None where it changed nothing.
    """

    tensors: Arrays
    run: Run
    recovered_by: str | None


def make_candidate(network: Network, plan: Plan, settings: MakeSettings, *, walked: bool = False) -> Candidate:
    """Make, save, verify and judge one candidate.

    With `walked` the recovery takes its second, slower step as well, from input to output of the pruned network.

    Raises:
        ParityError: the artifact does not agree with its masked model; nothing is kept of it.
    """
    solve = settings.recovery_entry.solve
    solved: Solved = Solved(plan) if solve is None else solve(network, plan, settings, walked)
    weights = _masked_weights(network, solved, settings)
    name = f"{plan.file_name}-walked" if walked else plan.file_name
    return save_candidate(network, solved.plan, settings, weights, name)


def make_control(network: Network, settings: MakeSettings) -> Candidate:
    """Make, save, verify and judge the dense network at another size.

    Raises:
        ParityError: the artifact does not agree with the network; nothing is kept of it.
    """
    assert network.model.module is not None
    control = control_id(network)
    artifact = settings.folder / "candidates" / f"{control_file_name(network)}.onnx"
    _write(network, settings, deploy(network.raw.model.clone()), artifact, candidate=control)
    parity = _check(network, settings, artifact, torch_runner(copy.deepcopy(network.model.module)), control)
    candidate = dense_candidate(network, settings, artifact, control)
    judged = judge_artifact(network, settings, artifact)
    return replace(candidate, file_bytes=artifact.stat().st_size, parity=parity, **judged)


def control_id(network: Network) -> str:
    """Return the id of the dense network at the shape of `network`."""
    return candidate_id("none", "dense", "dense", "fp32", network.side)


def control_file_name(network: Network) -> str:
    """Return the name of its files, without suffix."""
    return file_name("none", "dense", "dense", "fp32", network.side)


def dense_candidate(network: Network, settings: MakeSettings, artifact: Path, name: str) -> Candidate:
    """Return the dense network as the candidate `name`, not judged yet."""
    return Candidate(
        id=name,
        signal="none",
        strategy="dense",
        kind="dense",
        precision="fp32",
        sparsity=0.0,
        params=count_parameters(network.raw),
        macs=round(network.structure.macs()),
        input_shape=tuple(network.spec.shape),
        artifact=artifact.relative_to(settings.folder).as_posix(),
    )


def save_trained(
    network: Network, plan: Plan, settings: MakeSettings, tensors: Arrays, recovered_by: str, name: str
) -> Candidate:
    """Save `tensors` that were trained in PyTorch, verified against the module that holds them; see save_candidate."""
    module = copy.deepcopy(network.model.module)
    assert module is not None
    module.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    return save_candidate(network, plan, settings, MaskedWeights(tensors, torch_runner(module), recovered_by), name)


def save_candidate(
    network: Network, plan: Plan, settings: MakeSettings, weights: MaskedWeights, name: str
) -> Candidate:
    """Save the compact model of masked weights as `name`, verify it against the masked network, and judge it.

    Raises:
        ParityError: the artifact does not agree with its masked model; nothing is kept of it.
    """
    folder = settings.folder / "candidates"
    artifact = folder / f"{name}.onnx"
    # The graph is freed before the artifact is loaded to be verified.
    model = compact_model(network, plan, weights.tensors)
    _write(network, settings, model, artifact, candidate=plan.id, recovered_by=weights.recovered_by)
    del model
    release_memory()
    parity = _check(network, settings, artifact, weights.run, plan.id)
    stored = _check_and_store_masks(network, plan, settings, artifact) if isinstance(plan, WeightPlan) else artifact
    state = folder / f"{name}.safetensors"
    write_atomically(state, safetensors.numpy.save(weights.tensors, metadata=_describe_kept(network.structure, plan)))
    return Candidate(
        id=plan.id,
        signal=plan.assignment.signal,
        strategy=plan.assignment.strategy,
        kind=plan.kind,
        precision="fp32",
        sparsity=_sparsity(network, plan, weights.tensors),
        params=_count_kept_parameters(network, weights.tensors, _keep(plan)),
        macs=round(count_macs(network.raw, network.structure, _keep(plan))),
        input_shape=tuple(network.spec.shape),
        file_bytes=stored.stat().st_size,
        stored_file=None if stored is artifact else stored.relative_to(settings.folder).as_posix(),
        parity=parity,
        recovered_by=weights.recovered_by,
        artifact=artifact.relative_to(settings.folder).as_posix(),
        masked_state_dict=state.relative_to(settings.folder).as_posix(),
        also_named=plan.assignment.names[1:],
        removed_blocks=plan.removed if isinstance(plan, ChannelPlan) else (),
        **judge_artifact(network, settings, artifact),
    )


def _check_and_store_masks(network: Network, plan: WeightPlan, settings: MakeSettings, artifact: Path) -> Path:
    """Check the pattern of an n:m candidate; return the file of an unstructured one that is stored without zeros."""
    if plan.kind == "n:m":
        require_pattern(artifact, plan.masks, reduced_axes(network.raw.model), PATTERN)
        return artifact
    return store_smallest(artifact, settings.folder / DENSE_FILE, artifact.parent / "stored").path


def compact_model(network: Network, plan: Plan, tensors: Arrays) -> ir.Model:
    """Return the deployable model of masked, dense-shaped `tensors`."""
    model = materialise_artifact(network.raw, network.structure, _keep(plan), tensors)
    return deploy(model, keep_names=network.raw.keeps_names)


def _keep(plan: Plan) -> Keep:
    return plan.keep if isinstance(plan, ChannelPlan) else {}


def _write(network: Network, settings: MakeSettings, model: ir.Model, artifact: Path, **provenance: Any) -> None:
    """Write a model with its metadata."""
    proto: onnx.ModelProto = ir.to_proto(model)
    whole = {**settings.provenance, "model": network.model.info, **provenance}
    add_metadata_(proto, network.spec, settings.labels, whole, network.model.open_shapes)
    write_model(proto, artifact)


def _check(network: Network, settings: MakeSettings, artifact: Path, reference: Run, what: str) -> Parity:
    """Compare an artifact with the model it stands for; remove it and raise ParityError where they differ."""
    images = network.images
    try:
        run = onnx_runner(artifact, settings.threads)
        parity = compare(run, reference, images.parity, images.parity_kind)
        require(parity, what)
        if images.other_sizes is not None:
            other = images.other_sizes
            require(compare(run, reference, other, "noise", batch=len(other)), f"{what} at other input sizes")
    except ParityError:
        artifact.unlink()
        raise
    return parity


def judge_artifact(network: Network, settings: MakeSettings, artifact: Path) -> Judgement:
    """Return how a model file answers on validation images, beside the labels and dense; None without images."""
    if network.images.validation is None:
        return NOT_JUDGED
    return judge_model(artifact, network.images.validation(), settings.reference, settings.threads)


# ---- the masked state, kept beside the artifact


def _describe_kept(structure: Structure, plan: Plan) -> dict[str, str] | None:
    """Return the metadata of a structured candidate's weights: the indices that each group keeps, as bits."""
    if not isinstance(plan, ChannelPlan):
        return None
    bits = {group.id: np.packbits(plan.keep[group.leaf]) for group in structure.groups if group.leaf in plan.keep}
    return {"kept": json.dumps({name: packed.tobytes().hex() for name, packed in bits.items()})}


def read_masked_state(structure: Structure, plan: Plan, path: Path) -> tuple[Plan, Arrays]:
    """Return the plan with the indices the recovery chose to keep, and the masked weights `save_candidate` wrote."""
    with safetensors.safe_open(path, framework="numpy") as file:
        kept = parse_json((file.metadata() or {}).get("kept", "{}"))
        tensors: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if not isinstance(plan, ChannelPlan):
        return plan, tensors
    keep = {
        group.leaf: np.unpackbits(np.frombuffer(bytes.fromhex(kept[group.id]), np.uint8), count=group.size) > 0
        for group in structure.groups
        if group.id in kept
    }
    return replace(plan, keep=keep), tensors


# ---- masks


def _masked_weights(network: Network, solved: Solved, settings: MakeSettings) -> MaskedWeights:
    """Return the masked and recovered weights."""
    plan, changes = solved.plan, solved.tensors
    masks = mask_tensors(network.structure, plan.keep) if isinstance(plan, ChannelPlan) else {}

    def masked(name: str, array: Array) -> Array:
        return changes[name].astype(array.dtype) if name in changes else _mask(array, name, masks, plan)

    module = copy.deepcopy(network.model.module)
    if module is None:
        tensors: Arrays = {}
        for name, value in network.raw.model.graph.initializers.items():
            if name in network.raw.parameters | network.raw.buffers and value.const_value is not None:
                tensors[name] = masked(name, value.const_value.numpy())
        return MaskedWeights(tensors, onnx_runner(masked_model(network.raw, {}, tensors)), solved.name)
    changed = changes.keys() | masks.keys() | (plan.masks.keys() if isinstance(plan, WeightPlan) else set())
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name in changed:
                tensor.copy_(torch.from_numpy(np.ascontiguousarray(masked(name, tensor.numpy(force=True)))))
    adjust = settings.recovery_entry.adjust
    adjusted_by: str | None = adjust(module, network, plan) if adjust is not None else None
    # These are views of the copy made above, which is not changed any more.
    state = {name: tensor.numpy(force=True) for name, tensor in module.state_dict().items()}
    return MaskedWeights(state, torch_runner(module), adjusted_by or solved.name)


def _mask(array: Array, name: str, masks: Mapping[str, AxisMask], plan: Plan) -> Array:
    if isinstance(plan, WeightPlan):
        return np.where(plan.masks[name], array, np.zeros((), array.dtype)) if name in plan.masks else array
    return apply_mask(array, masks.get(name))


# ---- counts


def _sparsity(network: Network, plan: Plan, tensors: Arrays) -> float:
    """Structured: 1 - kept / dense weights. Masks: zeros counted on the exported weights."""
    if isinstance(plan, ChannelPlan):
        return sparsity_of(network.structure, network.layers, plan.keep)
    return measure_sparsity(tensors, network.layers)


def _count_kept_parameters(network: Network, tensors: Arrays, keep: Keep) -> int:
    """Count the parameters that are left, zeros inside kept tensors included."""
    structure = network.structure
    total = 0
    for name in network.raw.parameters - dead_tensors(network.raw.model, structure, keep):
        if name in structure.tensor_axes:
            total += int(np.prod([int(axis.sum()) for axis in structure.kept(name, keep)]))
        elif name in tensors:
            total += tensors[name].size
    return total
