"""One candidate: from an assignment to a verified artifact with its accuracy.

    assignment -> masks -> (recover) -> compact graph -> file -> parity -> accuracy

`make_candidate` is a pure function of a `Workbench`, which holds what all candidates share, and a `Plan`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import onnx
import onnx_ir as ir
import safetensors
import safetensors.numpy
import torch
from torch import nn

from mm_edge.arrays import Array, Arrays, BoolArray, Float32Array, Float64Array, IntArray
from mm_edge.bench.target import Target
from mm_edge.errors import ParityError, UsageError
from mm_edge.formats.device_files import add_metadata_, write_model
from mm_edge.formats.sparse_file import store_smallest
from mm_edge.graph.axes import Axis, Keep
from mm_edge.graph.compact import AxisMask, apply_mask, mask_tensors, masked_model, materialise
from mm_edge.graph.costs import Cost
from mm_edge.graph.depth import dead_tensors, live_nodes
from mm_edge.graph.export import RawGraph, deploy
from mm_edge.graph.groups import Group, Structure
from mm_edge.graph.reading import Work
from mm_edge.graph.widths import (
    Counts,
    Ladder,
    group_scores,
    ladder,
    meet_budget,
    round_widths,
    select_indices,
    solve_widths,
    sparsity_of,
)
from mm_edge.plan.masks import build_masks, measure_sparsity, rank_scores
from mm_edge.plan.n_m import parse_pattern, project, reduced_axes, require_pattern
from mm_edge.plan.scores import Scores
from mm_edge.quality.evaluation import compare_logits, run_onnx
from mm_edge.quality.parity import Run, compare, onnx_runner, require, torch_runner
from mm_edge.records import Assignment, Candidate, InputSpec, Layer, Parity, SparsityRange
from mm_edge.recover.closed_form.batchnorm import has_batch_norm, reestimate_batch_norm_
from mm_edge.recover.closed_form.context import RecoveryContext
from mm_edge.recover.closed_form.pattern import recover_pattern
from mm_edge.recover.closed_form.sensitivity import Sensitivity
from mm_edge.recover.closed_form.structured import Recovered, recover_closed_form
from mm_edge.runtime import release_memory
from mm_edge.store import write_atomically

# How far below its budget a candidate may stay before the target's channel multiples are given up for it.
BUDGET_SLACK = 0.03
PATTERN = parse_pattern("2:4")


@dataclass(frozen=True)
class Plan:
    """What to prune for one candidate.

    Exactly one of `keep` (structured: indices per group) and `masks` (unstructured: one bool array per layer) is set.
    `side` is that of the input where it is another than the dense network's; `keep` is then by the groups there.
    `removed` names the residual branches whose groups keep nothing, `planned_by` says how it came to meet its budget.
    """

    assignment: Assignment
    kind: str
    keep: Keep | None = None
    masks: Mapping[str, BoolArray] | None = None
    side: int | None = None
    removed: tuple[str, ...] = ()
    planned_by: str | None = None

    @property
    def id(self) -> str:
        """The candidate's id in the report."""
        size = "" if self.side is None else f"@{self.side}"
        return f"{self.assignment.signal}/{self.assignment.strategy}/{self.kind}/fp32{size}"

    @property
    def file_name(self) -> str:
        """The name its files carry."""
        return file_name(self.id)

    def digest(self) -> str:
        """Return a hash of what is pruned."""
        names = ",".join(self.assignment.names)
        return hashlib.sha256(f"{self.id} {names} {_hash_masks(self.keep or self.masks or {})}".encode()).hexdigest()


def file_name(candidate: str) -> str:
    """Return the name that the files of the candidate with this id carry, without suffix."""
    name, _, side = candidate.replace("/", "-").replace(":", "_").partition("@")
    return f"{name}-{side}px" if side else name


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


def channel_multiple(group: Group, layers: Sequence[Layer], target: Target, precisions: Sequence[str]) -> int:
    """Return the channel multiple `target` wants for a group: the largest any of its layers wants in any precision."""
    reached = set(group.tensors)
    classes = {operator_class(layer) for layer in layers if layer.fqn in reached}
    return max((target.multiple(kind, precision) for kind in classes for precision in precisions), default=1)


def operator_class(layer: Layer) -> str:
    """Return the class of operator under which a target lists its channel multiples."""
    if layer.kind == "linear":
        return "matmul"
    if layer.kind == "depthwise":
        return "depthwise"
    return "pointwise" if all(size == 1 for size in layer.shape[2:]) else "conv"


def make_ladders(
    structure: Structure, layers: Sequence[Layer], target: Target, precisions: Sequence[str] = ("fp32",)
) -> tuple[Ladder, ...]:
    """Return the widths each group may have on `target` when its candidates run in `precisions`."""
    return tuple(ladder(group, channel_multiple(group, layers, target, precisions)) for group in structure.groups)


def plan_structured(
    structure: Structure,
    layers: Sequence[Layer],
    ladders: Sequence[Ladder],
    assignment: Assignment,
    scores: Mapping[Axis, Float64Array],
) -> Plan:
    """Return the plan of one strategy: E7's widths on the target's ladders, the highest scores kept."""
    counts = round_widths(structure, layers, assignment.sparsity, ladders)
    return Plan(assignment, "structured", keep=select_indices(counts, scores))


def plan_budget(
    structure: Structure,
    layers: Sequence[Layer],
    ladders: Sequence[Ladder],
    ranges: Mapping[str, SparsityRange],
    fraction: float,
    cost: Cost | None = None,
) -> tuple[dict[str, float], Counts]:
    """Return sparsities and widths whose cost is at most `fraction` of dense, and as near as widths allow.

    The cost is that of multiply-adds unless another is given.

    The ranges are scaled as a whole, rho(a) = lo + a (hi - lo), `a` found by bisection, beyond 1 where the budget asks.
    Where the steps of the `ladders` miss the budget by more than BUDGET_SLACK they are halved, down to single indices.
    """
    cost = structure.mac_cost if cost is None else cost
    budget = fraction * cost.total()
    sizes = {item.leaf: item.widths[-1] for item in ladders}

    def sparsity(a: float) -> dict[str, float]:
        return {fqn: min(max(r.lo + a * (r.hi - r.lo), 0.0), 0.99) for fqn, r in ranges.items()}

    def wanted(a: float) -> dict[Axis, float]:
        return {leaf: part * sizes[leaf] for leaf, part in solve_widths(structure, layers, sparsity(a)).items()}

    low, high = _lowest_share(ranges), _highest_share(ranges)
    for _ in range(20):
        middle = (low + high) / 2
        if cost.total(wanted(middle)) > budget:
            low = middle
        else:
            high = middle
    goal = wanted(high)
    while True:
        counts = {item.leaf: item.nearest(goal[item.leaf]) for item in ladders}
        counts = meet_budget(cost, ladders, counts, goal, budget, strict=True)
        spent = cost.total(counts)
        finer = tuple(item.halved() for item in ladders)
        if budget * (1 - BUDGET_SLACK) <= spent <= budget or finer == tuple(ladders):
            return sparsity(high), counts
        ladders = finer


def _lowest_share(ranges: Mapping[str, SparsityRange]) -> float:
    """Return the `a` at which the last range reaches zero sparsity."""
    return min((-r.lo / (r.hi - r.lo) for r in ranges.values() if r.hi > r.lo), default=0.0)


def _highest_share(ranges: Mapping[str, SparsityRange]) -> float:
    """Return an `a` at which every range with a width is at full sparsity."""
    return max(((1 - r.lo) / (r.hi - r.lo) for r in ranges.values() if r.hi > r.lo), default=1.0)


def count_parameters(raw: RawGraph) -> int:
    """Count the parameters of the dense network."""
    shapes = [raw.model.graph.initializers[name].shape for name in raw.parameters]
    return sum(int(np.prod(shape.numpy())) for shape in shapes if shape is not None)


def parameter_cost(raw: RawGraph, structure: Structure) -> Cost:
    """Return the parameters as a cost of widths."""
    known = sorted(raw.parameters & structure.tensor_axes.keys())
    items = tuple(Work(name, structure.tensor_axes[name]) for name in known)
    cost = Cost(structure.table, items)
    return replace(cost, fixed=count_parameters(raw) - cost.total())


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
    name = f"dense@{side}"
    artifact = bench.folder / "candidates" / f"{file_name(name)}.onnx"
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
    keep = plan.keep or {}
    artifact = bench.folder / "candidates" / f"{name}.onnx"
    # Nothing of the graph stays in memory beside what is then loaded to verify it.
    _write(bench, ir.to_proto(compact_model(bench, plan, tensors)), artifact, candidate=plan.id, recovered_by=recovered)
    release_memory()
    try:
        parity = _check(bench, artifact, reference, plan.id)
    except ParityError:
        artifact.unlink()
        raise
    if plan.kind == "n:m" and plan.masks is not None:
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
        removed_blocks=plan.removed,
        **evaluate_artifact(bench, artifact),
    )


def compact_model(bench: Workbench, plan: Plan, tensors: Arrays) -> ir.Model:
    """Return the deployable model of masked, dense-shaped `tensors`."""
    return deploy(materialise(bench.raw, bench.structure, plan.keep or {}, tensors))


def _write_kept(structure: Structure, plan: Plan) -> dict[str, str] | None:
    """Return what the file of a structured candidate says beside its weights: the indices each group keeps, as bits."""
    if plan.keep is None:
        return None
    bits = {group.id: np.packbits(plan.keep[group.leaf]) for group in structure.groups if group.leaf in plan.keep}
    return {"kept": json.dumps({name: packed.tobytes().hex() for name, packed in bits.items()})}


def read_masked_state(structure: Structure, plan: Plan, path: Path) -> tuple[Plan, Arrays]:
    """Return the masked weights `save_candidate` wrote, and the plan with the indices the recovery chose to keep."""
    with safetensors.safe_open(path, framework="numpy") as file:
        kept = json.loads((file.metadata() or {}).get("kept", "{}"))
        tensors: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if plan.keep is None:
        return plan, tensors
    keep = {
        group.leaf: np.unpackbits(np.frombuffer(bytes.fromhex(kept[group.id]), np.uint8), count=group.size) > 0
        for group in structure.groups
        if group.id in kept
    }
    return replace(plan, keep=keep), tensors


class Judgement(TypedDict):
    """The fields of a candidate that validation images decide."""

    accuracy_top1: float | None
    accuracy_drop: float | None
    agreement_top1: float | None
    kl_to_dense: float | None


def evaluate_artifact(bench: Workbench, artifact: Path) -> Judgement:
    """Return what the validation images say of a model file; None throughout without any."""
    if bench.images.validation is None:
        return {"accuracy_top1": None, "accuracy_drop": None, "agreement_top1": None, "kl_to_dense": None}
    logits = run_onnx(artifact, bench.images.validation(), bench.threads)
    return judge_logits(logits, bench.images.labels, bench.images.dense_logits, bench.dense_accuracy)


def judge_logits(
    logits: Float32Array, labels: IntArray | None, dense_logits: Float32Array | None, dense: float | None
) -> Judgement:
    """Return what answers (n, classes) to the validation images say; `dense` is the dense model's own accuracy."""
    found = compare_logits(logits, labels, dense_logits)
    return {
        "accuracy_top1": found.accuracy_top1,
        "accuracy_drop": _drop(dense, found.accuracy_top1),
        "agreement_top1": found.agreement_top1,
        "kl_to_dense": found.kl_to_dense,
    }


def _solve(bench: Workbench, plan: Plan, walk_again: bool) -> tuple[Plan, Arrays, str | None]:
    """Return the plan with the indices the closed form keeps (E9), the tensors it changes, and what to call it."""
    if bench.recovery is None:
        return plan, {}, None
    if plan.keep is None:
        repaired = recover_pattern(bench.recovery, plan.masks or {}) if plan.kind == "n:m" else None
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
    masks = {} if plan.keep is None else mask_tensors(bench.structure, plan.keep)

    def pruned(name: str, array: Array) -> Array:
        return changes[name].astype(array.dtype) if name in changes else _mask(array, name, masks, plan)

    if bench.module is None:
        tensors: Arrays = {}
        for name, value in bench.raw.model.graph.initializers.items():
            if name in bench.raw.parameters | bench.raw.buffers and value.const_value is not None:
                tensors[name] = pruned(name, value.const_value.numpy())
        return tensors, onnx_runner(masked_model(bench.raw, {}, tensors)), recovered
    module = copy.deepcopy(bench.module)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name in changes or name in masks or (plan.masks is not None and name in plan.masks):
                tensor.copy_(torch.from_numpy(np.ascontiguousarray(pruned(name, tensor.numpy(force=True)))))
    # The closed form has nothing to say of single weights without a pattern.
    reestimate = bench.recover == "bn" or (bench.recover != "none" and plan.kind == "unstructured")
    if reestimate and bench.images.recovery is not None and has_batch_norm(module):
        reestimate_batch_norm_(module, (torch.from_numpy(batch) for batch in bench.images.recovery()))
        recovered = "bn"
    # Views of the copy made above, which nothing changes from here on.
    state = {name: tensor.numpy(force=True) for name, tensor in module.state_dict().items()}
    return state, torch_runner(module), recovered


def _mask(array: Array, name: str, masks: Mapping[str, AxisMask], plan: Plan) -> Array:
    if plan.masks is not None:
        return np.where(plan.masks[name], array, np.zeros((), array.dtype)) if name in plan.masks else array
    return apply_mask(array, masks.get(name))


def _check(bench: Workbench, artifact: Path, reference: Run, what: str) -> Parity:
    parity = compare(onnx_runner(artifact, bench.threads), reference, bench.images.parity, bench.images.parity_kind)
    require(parity, what)
    return parity


def _sparsity(bench: Workbench, plan: Plan, tensors: Arrays) -> float:
    """Structured: 1 - kept / dense weights. Unstructured: zeros counted on the exported weights."""
    if plan.keep is not None:
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


def count_macs(raw: RawGraph, structure: Structure, keep: Keep) -> float:
    """Return the multiply-adds of the compact graph; what an emptied group makes dead costs nothing."""
    counts = {leaf: float(kept.sum()) for leaf, kept in keep.items()}
    if all(counts.values()):
        return structure.macs(counts)
    alive = live_nodes(raw.model, structure, keep)
    return replace(structure, work=tuple(item for item in structure.work if item.node in alive)).macs(counts)


def _drop(dense: float | None, accuracy: float | None) -> float | None:
    return None if dense is None or accuracy is None else 100 * (dense - accuracy)


def plan_all(
    bench_structure: Structure,
    layers: Sequence[Layer],
    ladders: Sequence[Ladder],
    scores: Scores,
    assignments: Sequence[Assignment],
    kinds: Sequence[str],
) -> list[Plan]:
    """Return one plan per assignment and kind, in that order. Channel scores and rankings are made once per signal."""
    plans: list[Plan] = []
    channel_scores = {signal: group_scores(bench_structure, scores[signal]) for signal in scores}
    for assignment in assignments:
        if "structured" in kinds:
            by_group = channel_scores[assignment.signal]
            plans.append(plan_structured(bench_structure, layers, ladders, assignment, by_group))
    if "unstructured" in kinds:
        for signal in scores:
            rankings = rank_scores(layers, scores[signal])
            for assignment in assignments:
                if assignment.signal == signal:
                    plans.append(Plan(assignment, "unstructured", masks=build_masks(rankings, assignment)))
    return plans


def plan_n_m(
    raw: RawGraph, layers: Sequence[Layer], scores: Scores, assignments: Sequence[Assignment]
) -> tuple[list[Plan], dict[str, str]]:
    """Return one n:m plan per different set of masks, and why the layers that none of them touches stay dense.

    The pattern takes the same share whatever the strategy's rho, so most strategies of a signal come to the same masks:
    one plan carries all their names.

    Raises:
        UsageError: no layer is large enough to gain from the pattern.
    """
    axes = reduced_axes(raw.model)
    plans: dict[tuple[str, str], Plan] = {}
    dense: dict[str, str] = {}
    for assignment in assignments:
        found = project(layers, scores[assignment.signal], assignment.sparsity, axes, PATTERN)
        dense = {fqn: reason for fqn, reason in found.dense.items() if fqn in dense or not plans}
        if found.masks:
            key = (assignment.signal, _hash_masks(found.masks))
            first = plans.get(key, Plan(replace(assignment, names=()), "n:m", masks=found.masks))
            names = (*first.assignment.names, *assignment.names)
            plans[key] = replace(first, assignment=replace(first.assignment, names=names))
    if not plans:
        reason = next(iter(dense.values()), "it has no layer of that kind")
        raise UsageError(f"--kinds n:m: no layer of this network takes {PATTERN}: {reason}; use --kinds structured")
    return list(plans.values()), dense


def _hash_masks(masks: Mapping[Any, BoolArray]) -> str:
    state = hashlib.sha256()
    for name, mask in sorted(masks.items(), key=lambda item: str(item[0])):
        state.update(f"{name}".encode())
        state.update(np.packbits(mask).tobytes())
    return state.hexdigest()
