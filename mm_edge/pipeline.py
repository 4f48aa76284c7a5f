"""The whole job, stage by stage.

    load -> score -> ranges -> strategies -> masks -> structure -> export -> bench -> report

Every stage is stored under the hash of what it depends on, so that a run that was killed goes on where it stopped and
a changed flag redoes only what it touches.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from mm_edge.bench.session import (
    MINIMUM_PAIRS,
    Measurement,
    compare_outputs,
    environment,
    evaluate_in_pieces,
    measure_memory,
    measure_pair,
    merge_doubts,
)
from mm_edge.bench.transport import Transport
from mm_edge.budgets import is_budget
from mm_edge.bundle import write_bundle
from mm_edge.candidates import (
    PATTERN,
    Images,
    Plan,
    Workbench,
    count_parameters,
    dense_candidate,
    file_name,
    judge_logits,
    make_candidate,
    make_control,
    make_ladders,
    plan_all,
    plan_n_m,
)
from mm_edge.data import DataSplits, noise_batches
from mm_edge.device_files import add_metadata_, write_model
from mm_edge.errors import ConstraintError, ParityError, UsageError
from mm_edge.evaluate import compare_logits, run_onnx
from mm_edge.export import RawGraph, deploy, export_raw, raw_from_onnx
from mm_edge.finetuning import finetune_candidate, worth_training
from mm_edge.graph.axes import Axis
from mm_edge.graph.depth import find_branches
from mm_edge.graph.groups import Structure, read_structure
from mm_edge.job import BATCH, CLOSED_FORM_IMAGES, FROM_MOMENTS, Job, Place, Request, recovery_images
from mm_edge.layers import read_layers
from mm_edge.layers import read_weights as read_layer_weights
from mm_edge.memory import release_memory
from mm_edge.models import LoadedModel
from mm_edge.planning import Rulers, ladders_at, model_time, plan_by_sensitivity, plan_scaled
from mm_edge.precision import (
    CALIBRATION_IMAGES,
    HELD_BACK_IMAGES,
    CalibrationImages,
    check_precisions,
    convert_candidate,
)
from mm_edge.progress import Advance
from mm_edge.ranges import apply_constraints, observed_ranges, rule_ranges
from mm_edge.records import (
    Candidate,
    Chosen,
    DenseRow,
    Latency,
    Layer,
    Report,
    SkippedGroup,
    SparsityRange,
    from_json,
    to_json,
)
from mm_edge.recover.branches import MeasuredBranch, measure_branches
from mm_edge.recover.context import RecoveryContext, build_context
from mm_edge.recover.finetune import Checkpoints, Settings
from mm_edge.recover.sensitivity import Sensitivity, from_arrays, measure_sensitivities, to_arrays
from mm_edge.report import write_report
from mm_edge.scores import GRASP_IMAGES, Scores, gradients, hessian_gradient_products, score_weights
from mm_edge.select import choose, judge_budget, mark_pareto
from mm_edge.semi_structured import reduced_axes, require_support
from mm_edge.sizes import SizedNetwork, auto_sizes, export_at, remake, square_side, total_stride
from mm_edge.store import hash_file
from mm_edge.strategies import assign
from mm_edge.target import Target, matches_this_machine
from mm_edge.timing import open_clock
from mm_edge.tuning import tune_candidate

# E2 asks for 5-10 % of the training data; beyond this many images the gradient's ranking no longer moves.
GRADIENT_IMAGES = 1024
RECOVERY_IMAGES = 128
PARITY_IMAGES = 8
# Two images of 224 x 224: at 32 of them EfficientNet-Lite0 alone keeps 2.8 GB of activations, no faster an image.
GRADIENT_PIXELS = 2 * 224 * 224
SAMPLES_FOLDER = "samples"

Array = npt.NDArray[np.float32]


def prune_export(job: Job) -> Report:
    """Run every stage and write report.json and report.md in the job's folder.

    Raises:
        UsageError: something was refused before scoring.
        JobError: the job ran and failed; what was made is kept. When no candidate meets the constraints the report is
            written all the same, with `chosen` null.
    """
    warnings = [*job.model.warnings]
    with job.stages.stage("export"):
        dense_network = _export_dense(job)
    structure = dense_network.structure
    if not structure.groups and "structured" in job.request.kinds:
        warnings.append("no group of this network can lose channels; see 'mm-edge inspect' for the reasons")
    sizes, notes = _export_sizes(job, dense_network)
    warnings += notes
    places = _places(job, dense_network, sizes)
    benches = _set_up_all(places)
    plans, notes = _plan(job, places)
    warnings += notes
    bench = _bench_of(benches, None)
    controls = _make_controls(places, benches)
    candidates, failures = _make_all(job, benches, plans)
    warnings += failures
    dense = _dense_row(job, bench)
    candidates, failures = _walk_front(job, benches, plans, candidates, dense)
    warnings += failures
    candidates, failures = _train_front(job, benches, places, plans, candidates, dense)
    warnings += failures
    candidates = [*controls, *candidates]
    smaller, failures = _convert_all(job, benches, places, dense, candidates)
    candidates += smaller
    warnings += failures
    dense, candidates, env, notes = _measure(job, benches, dense, candidates)
    warnings += notes
    env = {**env, "accuracy_on": job.request.accuracy_on}
    if job.request.accuracy_on == "device":
        dense, candidates, note = _judge_on_device(job, benches, dense, candidates, env["fingerprint"])
        warnings.append(note)
    return _finish(job, benches, places, dense, candidates, env, warnings)


Benches = Mapping[int, Workbench]


def _export_dense(job: Job) -> SizedNetwork:
    raw = read_raw(job.model)
    structure = read_structure(raw, job.request.keep, prune_norms=job.request.prune_norms)
    layers = tuple(layer for layer in read_layers(raw) if layer.fqn in raw.weights)
    leaves = {group.leaf: group.leaf for group in structure.groups}
    return SizedNetwork(job.model.input.shape[-1], job.model, raw, structure, layers, leaves)


def _export_sizes(job: Job, dense: SizedNetwork) -> tuple[list[SizedNetwork], list[str]]:
    """Make the network again at every other size: those asked for, else those that controls are taken at.

    Raises:
        UsageError: the network cannot take a size that was asked for.
    """
    asked = job.request.input_sizes
    validated = job.data is not None and len(job.data.validation) > 0
    if asked == "none" or (asked is None and not validated):
        return [], []
    found: list[SizedNetwork] = []
    try:
        if isinstance(asked, tuple):
            sides = asked
        else:
            sides = auto_sizes(square_side(job.model, "auto"), total_stride(job.model, dense.raw))
        with job.stages.stage("input sizes") as advance:
            for side in sides:
                if side != dense.side:
                    model = remake(job.model, side)
                    keep, norms = job.request.keep, job.request.prune_norms
                    found.append(export_at(model, dense.structure, keep, prune_norms=norms))
                advance(len(found), len(sides))
    except UsageError as error:
        if isinstance(asked, tuple):
            raise
        return found, [f"no other input sizes: {error}"]
    stride = total_stride(job.model, dense.raw)
    notes = [
        f"--input-sizes {item.side} is no multiple of the network's stride, {stride}: it costs more than it saves"
        for item in found
        if item.side % stride
    ]
    return found, notes


def _places(job: Job, dense: SizedNetwork, sizes: list[SizedNetwork]) -> list[Place]:
    """Lay out the input sizes, the dense one first, with what recovery needs at each."""
    asked = job.request.input_sizes
    recovery = _dense_moments(job, dense)
    sensitivities = _sensitivities(job, dense, recovery)
    wanted = asked if isinstance(asked, tuple) else (dense.side,)
    branches = _branches(job, dense, recovery)
    places = [Place(job, dense, True, dense.side in wanted, recovery, sensitivities, branches)]
    for network in sizes:
        place = Place(job.at(network), network, False, asked is not None)
        if recovery is not None and place.pruned:
            # No moment here may come from images that are held back there.
            moments = _dense_moments(place.job, network, len(recovery.images))
            if moments is not None and moments.held_back == recovery.held_back:
                # The network to come near to is the one given, not what it says of smaller pictures.
                moments = replace(moments, logits=recovery.logits)
            known = {leaf: replace(item, leaf=network.leaves[leaf]) for leaf, item in sensitivities.items()}
            place = replace(place, recovery=moments, sensitivities=network.translate(known))
        places.append(place)
    return places


def read_raw(model: LoadedModel) -> RawGraph:
    """Export the model once, or read the user's own .onnx."""
    if model.module is None:
        assert model.onnx_path is not None
        raw = raw_from_onnx(model.onnx_path)
    else:
        raw = export_raw(model.module, torch.zeros(1, *model.input.shape))
    return raw


def read_ranges(
    job_ranges: str,
    layers: tuple[Layer, ...],
    family: str,
    weights: Mapping[str, Array],
    gradient: Mapping[str, Array] | None = None,
    products: Mapping[str, Array] | None = None,
) -> dict[str, SparsityRange]:
    """Return the ranges from either source, before constraints."""
    if job_ranges == "observed":
        return observed_ranges(layers, weights, gradient, products)
    return rule_ranges(layers, family)


def _score(job: Job, raw: RawGraph, layers: tuple[Layer, ...]) -> tuple[Scores, dict[str, SparsityRange], list[str]]:
    weights = read_layer_weights(raw, layers)
    notes: list[str] = []
    gradient: dict[str, Array] = {}
    signals = job.request.signals
    if signals != ("magnitude",) or job.request.ranges == "observed":
        gradient, note = _gradients(job)
        notes += note
        if not gradient:
            signals = ("magnitude",)
    with job.stages.stage("scores"):
        scores = score_weights(weights, gradient, signals)
    products = _products(job, layers) if job.request.ranges == "observed" and gradient else None
    bounds = read_ranges(job.request.ranges, layers, job.model.family, weights, gradient or None, products)
    return scores, bounds, notes


def _gradients(job: Job) -> tuple[dict[str, Array], list[str]]:
    """One gradient pass over the calibration images, kept for the next run."""
    if job.model.module is None:
        return {}, ["a network given as .onnx has no gradients: signal magnitude only"]
    if job.data is None or not len(job.data.calibration):
        return {}, ["no calibration images: signal magnitude only; give --data PATH for the other signals"]
    key = job.key(data=job.data_key, images=GRADIENT_IMAGES)
    stored = job.store.load_arrays("gradients", key)
    if stored is None:
        images = job.data.calibration.take(GRADIENT_IMAGES)
        with job.stages.stage("gradients") as advance:
            found = gradients(job.model.module, _Batches(images, _gradient_batch(job.model)), job.request.seed, advance)
        stored = found.values
        job.store.save_arrays("gradients", key, stored)
        release_memory()
    return stored, []


def _products(job: Job, layers: tuple[Layer, ...]) -> dict[str, Array]:
    """GraSP's Hessian-gradient products, kept for the next run."""
    assert job.model.module is not None and job.data is not None
    key = job.key(data=job.data_key, images=GRASP_IMAGES)
    stored = job.store.load_arrays("hessian_gradients", key)
    if stored is None:
        images = _Batches(job.data.calibration.take(GRASP_IMAGES), _gradient_batch(job.model))
        names = [layer.fqn for layer in layers]
        with job.stages.stage("hessian-gradient products") as advance:
            stored = hessian_gradient_products(job.model.module, images, names, job.request.seed, advance)
        job.store.save_arrays("hessian_gradients", key, stored)
    return stored


class _Batches:
    """Calibration images as the batches of tensors that scoring reads."""

    def __init__(self, images: Any, size: int) -> None:
        self._images = images
        self._size = size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        for images, labels in self._images.batches(self._size):
            yield torch.from_numpy(images), torch.from_numpy(labels)

    def __len__(self) -> int:
        return -(-len(self._images) // self._size)


def _gradient_batch(model: LoadedModel) -> int:
    """Return how many images a backward pass holds at once: GRADIENT_PIXELS bounds the activations kept for it."""
    _, height, width = model.input.shape
    return max(1, min(BATCH, GRADIENT_PIXELS // (height * width)))


def _dense_moments(job: Job, network: SizedNetwork, most: int = CLOSED_FORM_IMAGES) -> RecoveryContext | None:
    """Run the dense network once over calibration images: what the closed form needs for every candidate."""
    pattern = "n:m" in job.request.kinds
    wanted_by = pattern or ("structured" in job.request.kinds and network.structure.groups)
    if job.request.recover not in FROM_MOMENTS or job.data is None or not wanted_by:
        return None
    also = tuple(reduced_axes(network.raw.model)) if pattern else ()
    images = recovery_images(job.data)[:most]
    with job.stages.stage("dense moments") as advance:
        return build_context(network.raw, network.structure, images, also=also, threads=2, progress=advance)


def _sensitivities(job: Job, network: SizedNetwork, recovery: RecoveryContext | None) -> dict[Axis, Sensitivity]:
    """Measure each group's sensitivity (recipe A, point 5): which selection suits it, and what a budget takes first."""
    if recovery is None or "structured" not in job.request.kinds:
        return {}
    structure = network.structure
    ladders = make_ladders(structure, network.layers, job.target, job.request.precisions)
    key = job.key(
        data=job.data_key,
        images=CLOSED_FORM_IMAGES,
        keep=job.request.keep,
        prune_norms=job.request.prune_norms,
        widths=[item.widths for item in ladders],
    )
    stored = job.store.load_arrays("sensitivities", key)
    if stored is not None:
        found = from_arrays(structure, stored)
        # The costly part of them; selections ask for it again.
        recovery.orders.update({leaf: item.surgeon for leaf, item in found.items()})
        return found
    with job.stages.stage("sensitivities") as advance:
        found = measure_sensitivities(recovery, ladders, advance)
    job.store.save_arrays("sensitivities", key, to_arrays(structure, found))
    return found


def _branches(job: Job, network: SizedNetwork, recovery: RecoveryContext | None) -> tuple[MeasuredBranch, ...]:
    """Measure what removing each residual branch costs, where a budget may ask for it."""
    if recovery is None or not job.budgets:
        return ()
    found = find_branches(network.raw.model, network.structure)
    key = job.key(
        data=job.data_key,
        images=CLOSED_FORM_IMAGES,
        keep=job.request.keep,
        prune_norms=job.request.prune_norms,
        branches=[item.id for item in found],
    )
    stored = job.store.load_json("branches", key)
    if stored is None:
        with job.stages.stage("blocks") as advance:
            stored = [item.kl for item in measure_branches(recovery, found, advance)]
        job.store.save_json("branches", key, stored)
    return tuple(MeasuredBranch(branch, float(kl)) for branch, kl in zip(found, stored, strict=True))


def _plan(job: Job, places: list[Place]) -> tuple[list[Plan], list[str]]:
    """Score and plan. The scores are several times the model's size, and are let go once the plans are made."""
    raw, structure, layers = places[0].network.raw, places[0].network.structure, places[0].network.layers
    pruned = [place for place in places if place.pruned]
    scores, bounds, notes = _score(job, raw, layers)
    strategies: list[Plan] = []
    with job.stages.stage("plan"):
        ladders = ladders_at(places[0])
        for kind in job.request.kinds:
            ranges = apply_constraints(layers, bounds, kind == "structured")
            assignments = [item for s in scores for item in assign(job.request.strategies, s, layers, ranges)]
            if kind == "n:m":
                found, dense = plan_n_m(raw, layers, scores, assignments)
                strategies += found
                notes += _pattern_notes(dense)
            else:
                strategies += plan_all(structure, layers, ladders, scores, assignments, (kind,))
        plans = [_move(plan, place) for place in pruned for plan in strategies]
    ranges = apply_constraints(layers, bounds, True)
    rulers, more = _rulers(job, places[0])
    notes += more
    for ruler in rulers:
        with job.stages.stage("plan budgets"):
            found, more = plan_scaled(ruler, places, ranges, scores)
        plans += found
        notes += more
    del scores
    for ruler in rulers:
        found, more = plan_by_sensitivity(ruler, job, places)
        plans += found
        notes += more
    return plans, notes


def _rulers(job: Job, dense: Place) -> tuple[list[Rulers], list[str]]:
    """Return what every budget of the job is planned with, and what cannot be planned for."""
    budgets = job.budgets
    timed = any(budget.is_time for budget in budgets)
    clock = open_clock(job.folder / "dense.onnx", job.target, job.transport, job.store) if timed else None
    able = [budget for budget in budgets if budget.kind != "latency" or clock is not None]
    unable = [budget for budget in budgets if budget not in able]
    notes = [f"{item.asked}: no time is measured here, so no candidate is planned for it" for item in unable]
    time = None
    if clock is not None and job.request.allocate_by == "latency":
        with job.stages.stage("latency table") as advance:
            time = model_time(job, dense, clock, advance)
    elif job.request.allocate_by == "latency":
        notes.append("--allocate-by latency: no time is measured here, so widths are allocated by multiply-adds")
    return [Rulers(job, dense, budget, clock, time) for budget in able], notes


def _move(plan: Plan, place: Place) -> Plan:
    """Return a plan of the dense network for the network of another size."""
    keep = None if plan.keep is None else place.network.translate(plan.keep)
    return replace(plan, keep=keep, side=place.side)


def _pattern_notes(dense: Mapping[str, str]) -> list[str]:
    """Say once per reason which layers stay dense under an n:m pattern."""
    by_reason: dict[str, list[str]] = {}
    for fqn, reason in dense.items():
        by_reason.setdefault(reason, []).append(fqn)
    return [
        f"n:m: {len(names)} layers stay dense ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}): {reason}"
        for reason, names in by_reason.items()
    ]


def _set_up_all(places: list[Place]) -> Benches:
    """Return the workbench of every size by its side, the dense one first."""
    bench = _set_up(places[0])
    benches = {places[0].network.side: bench}
    for place in places[1:]:
        network = place.network
        own = bench.images
        benches[network.side] = replace(
            bench,
            module=network.model.module,
            raw=network.raw,
            structure=network.structure,
            layers=network.layers,
            images=replace(_images(place.job), labels=own.labels, dense_logits=own.dense_logits),
            spec=network.model.input,
            provenance={**bench.provenance, "model": network.model.info},
            recovery=place.recovery,
            sensitivities=place.sensitivities,
        )
    return benches


def _make_controls(places: list[Place], benches: Benches) -> list[Candidate]:
    """Make the dense network's row at every other size, where there are images to judge it by."""
    made: list[Candidate] = []
    for place in places[1:]:
        job, side = place.job, place.network.side
        if benches[side].images.validation is None:
            continue
        with job.stages.stage("controls"):
            key = job.key(data=job.data_key, control=side)
            name = f"candidates/{file_name(f'dense@{side}')}"
            made.append(_kept(job, name, key, partial(make_control, benches[side], side)))
    return made


def _bench_of(benches: Benches, side: int | None) -> Workbench:
    """Return the workbench of a plan's size: the first is the dense one."""
    return next(iter(benches.values())) if side is None else benches[side]


def _set_up(place: Place) -> Workbench:
    """Save the dense model, take its answers on the validation images, and lay out what candidates share."""
    job, raw = place.job, place.network.raw
    threads = 2 if job.target.threads == "auto" else int(job.target.threads)
    dense = job.folder / "dense.onnx"
    with job.stages.stage("dense model") as advance:
        proto = ir.to_proto(deploy(raw.model.clone()))
        labels = job.model.labels or (job.data.classes if job.data is not None else ())
        provenance = {"model": job.model.info, "target": job.target.name, "versions": job.key()["versions"]}
        add_metadata_(proto, job.model.input, labels, {**provenance, "candidate": "dense"})
        write_model(proto, dense)
        images = _images(job)
        logits = accuracy = None
        if images.validation is not None and job.data is not None:
            total = len(job.data.validation)
            done = 0

            def count(batch: int) -> None:
                nonlocal done
                done += batch
                advance(done, total)

            logits = run_onnx(dense, images.validation(), threads, count)
            # Decoding may have left images out, so the labels are read after it.
            images = replace(images, labels=job.data.validation.labels, dense_logits=logits)
            accuracy = compare_logits(logits, images.labels, None).accuracy_top1
    return Workbench(
        module=job.model.module,
        raw=raw,
        structure=place.network.structure,
        layers=place.network.layers,
        images=images,
        # What comes before fine-tuning is the closed form, and is kept as such for the next run.
        recover="closed-form" if job.request.recover in FROM_MOMENTS else job.request.recover,
        folder=job.folder,
        dense_accuracy=accuracy,
        threads=threads,
        spec=job.model.input,
        labels=labels,
        provenance=provenance,
        recovery=place.recovery,
        select=job.request.select,
        sensitivities=place.sensitivities,
    )


def _images(job: Job) -> Images:
    spec = job.model.input
    noise = np.concatenate(list(noise_batches(spec, PARITY_IMAGES, job.request.seed)))
    if job.data is None:
        return Images(noise, "noise")
    calibration, validation = job.data.calibration, job.data.validation
    source = calibration if len(calibration) else validation
    parity = next(iter(source.batches(PARITY_IMAGES)))[0] if len(source) else noise
    recovery = calibration.take(RECOVERY_IMAGES)
    return Images(
        parity=parity,
        parity_kind="images" if len(source) else "noise",
        recovery=(lambda: (images for images, _ in recovery.batches(BATCH))) if len(recovery) else None,
        validation=(lambda: validation.batches(BATCH)) if len(validation) else None,
    )


def _make_all(job: Job, benches: Benches, plans: list[Plan]) -> tuple[list[Candidate], list[str]]:
    made: list[Candidate] = []
    failures: list[str] = []
    with job.stages.stage("candidates") as advance:
        advance(0, len(plans))
        for index, plan in enumerate(plans):
            bench = _bench_of(benches, plan.side)
            key = job.key(
                data=job.data_key,
                plan=plan.digest(),
                recover=bench.recover,
                select=bench.select,
                images=RECOVERY_IMAGES,
            )
            try:
                row = _kept(job, f"candidates/{plan.file_name}", key, partial(make_candidate, bench, plan))
                made.append(replace(row, planned_by=plan.planned_by))
            except ParityError as error:
                failures.append(str(error))
            advance(index + 1, len(plans))
    if not made:
        raise ParityError(failures[0] if failures else "no candidate was planned; give at least one strategy and kind")
    return made, failures


def _walk_front(
    job: Job, benches: Benches, plans: list[Plan], candidates: list[Candidate], dense: DenseRow
) -> tuple[list[Candidate], list[str]]:
    """Take the closed form's second, dearer step for the rows on the front and for what the budgets asked for.

    The controls are no rivals here: the step is what may bring a row past them.
    """
    if all(bench.recovery is None for bench in benches.values()):
        return candidates, []
    by_id = {plan.id: plan for plan in plans}
    marked = mark_pareto(candidates, dense)
    front = [row for row in marked if row.kind == "structured" and (row.pareto or _is_budget(row, by_id[row.id]))]

    def walk(index: int, row: Candidate, plan: Plan, screened: str) -> Candidate:
        bench = _bench_of(benches, plan.side)
        step = "walk, to be tuned" if bench.recover == "tune" else "walk"
        key = job.key(data=job.data_key, plan=plan.digest(), recover=step, select=bench.select, screened=screened)
        return _kept(job, f"walked/{plan.file_name}", key, lambda: make_candidate(bench, plan, walk_again=True))

    with job.stages.stage("walk the front") as advance:
        return _improve(job, candidates, front, by_id, walk, lambda done: advance(done, len(front)))


def _is_budget(row: Candidate, plan: Plan) -> bool:
    """Whether a row is what a budget asked for: at sizes besides the dense one, the best of them by sensitivity."""
    return is_budget(row.strategy) and (plan.side is None or row.signal == "sensitivity")


def _train_front(
    job: Job, benches: Benches, places: list[Place], plans: list[Plan], candidates: list[Candidate], dense: DenseRow
) -> tuple[list[Candidate], list[str]]:
    """Tune or fine-tune the rows that are worth it, each from what the recovery before made of it."""
    if job.request.recover not in ("tune", "finetune"):
        return candidates, []
    chosen = worth_training(candidates, dense)
    train = _finetune_one
    if job.request.recover == "tune":
        # Masks of single weights have no closed form to go on from.
        chosen, train = [row for row in chosen if row.kind == "structured"], _tune_one

    def improve(index: int, row: Candidate, plan: Plan, start: str) -> Candidate:
        own = next(place.job for place in places if place.side == plan.side)
        move = partial(_share, advance, index, len(chosen))
        return train(own, _bench_of(benches, plan.side), plan, row, start, move)

    with job.stages.stage("tune" if job.request.recover == "tune" else "fine-tune") as advance:
        return _improve(job, candidates, chosen, {plan.id: plan for plan in plans}, improve)


def _improve(
    job: Job,
    candidates: list[Candidate],
    chosen: list[Candidate],
    plans: Mapping[str, Plan],
    make: Callable[[int, Candidate, Plan, str], Candidate],
    done: Callable[[int], None] = lambda count: None,
) -> tuple[list[Candidate], list[str]]:
    """Put in place of each `chosen` row what `make` makes of (its number, it, its plan, the digest of its weights).

    Where brain surgeon chose the channels, plans of several signals have become one network: made once.
    """
    rows = {row.id: row for row in candidates}
    same: dict[str, Candidate] = {}
    failures: list[str] = []
    for index, row in enumerate(chosen):
        assert row.masked_state_dict is not None
        plan = plans[row.id]
        digest = f"{hash_file(job.folder / row.masked_state_dict)}@{plan.side}"
        if digest not in same:
            try:
                same[digest] = make(index, row, plan, digest)
            except ParityError as error:
                failures.append(str(error))
                continue
        rows[row.id] = replace(
            same[digest],
            id=row.id,
            signal=row.signal,
            strategy=row.strategy,
            also_named=row.also_named,
            planned_by=row.planned_by,
        )
        done(index + 1)
    return list(rows.values()), failures


def _kept(job: Job, name: str, key: Mapping[str, Any], make: Callable[[], Candidate]) -> Candidate:
    """Return the row an earlier run kept under `name` for this `key`; else make it and keep it with its files."""
    found = job.store.load_record(name, key, Candidate)
    if found is None:
        found = make()
        files = [job.folder / path for path in (found.artifact, found.masked_state_dict) if path]
        job.store.save_json(name, key, found, files)
    return found


def _tune_one(job: Job, bench: Workbench, plan: Plan, row: Candidate, start: str, advance: Advance) -> Candidate:
    """Tune the row whose weights have the digest `start`, or return what an earlier run made."""
    key = job.key(data=job.data_key, plan=plan.digest(), recover="tune", start=start)
    return _kept(
        job, f"tuned/{plan.file_name}", key, lambda: tune_candidate(bench, plan, row, job.request.seed, advance)
    )


def _share(advance: Advance, index: int, count: int, done: int, total: int) -> None:
    """Report the steps of one row among `count` rows that take as many each."""
    advance(index * total + done, count * total)


def _finetune_one(job: Job, bench: Workbench, plan: Plan, row: Candidate, start: str, advance: Advance) -> Candidate:
    """Fine-tune the row whose weights have the digest `start`, or return or go on with what an earlier run made."""
    assert job.data is not None
    images = job.data.calibration
    settings = Settings(epochs=job.request.epochs, seed=job.request.seed)
    name = f"finetuned/{plan.file_name}"
    unfinished = f"{name}-unfinished"
    key = job.key(data=job.data_key, plan=plan.digest(), settings=settings, start=start)
    checkpoints = Checkpoints(
        load=lambda: job.store.load_arrays(unfinished, key),
        save=lambda arrays: job.store.save_arrays(unfinished, key, arrays),
    )

    def tell(line: str) -> None:
        job.stages.tell(f"{plan.id}: {line}")

    found = _kept(
        job,
        name,
        key,
        lambda: finetune_candidate(bench, plan, row, images, settings, checkpoints, advance, tell),
    )
    job.store.remove_arrays(unfinished)
    return found


def _convert_all(
    job: Job, benches: Benches, places: list[Place], dense: DenseRow, candidates: list[Candidate]
) -> tuple[list[Candidate], list[str]]:
    """Make the smaller-number versions of the dense model and of the front of accuracy against MACs."""
    precisions = [precision for precision in job.request.precisions if precision != "fp32"]
    if not precisions:
        return [], []
    bench = _bench_of(benches, None)
    front = [row for row in mark_pareto(candidates, dense) if row.pareto or bench.images.validation is None]
    sources = [dense_candidate(bench, "dense/fp32", bench.folder / "dense.onnx"), *front]
    made: list[Candidate] = []
    notes = [
        f"{' and '.join(precisions)} versions were made of the dense model and of the {len(front)} rows on the front"
    ]
    with job.stages.stage("smaller numbers") as advance:
        images = {place.network.side: _quantising_images(place.job) for place in places}
        for index, source in enumerate(sources):
            assert source.artifact is not None
            digest = hash_file(job.folder / source.artifact)
            for precision in precisions:
                name = f"candidates/{file_name(source.id)}-{precision}"
                key = job.key(data=job.data_key, source=digest, precision=precision, target=job.target)
                side = source.input_shape[-1]
                convert = partial(convert_candidate, benches[side], source, precision, job.target, images[side])
                row = _kept(job, name, key, convert)
                made.append(replace(row, also_named=source.also_named, planned_by=source.planned_by))
            advance(index + 1, len(sources))
    return made, notes


def _quantising_images(job: Job) -> CalibrationImages | None:
    if job.data is None:
        return None
    wanted = job.data.calibration.take(CALIBRATION_IMAGES + HELD_BACK_IMAGES)
    images = np.concatenate([batch for batch, _ in wanted.batches(BATCH)])
    cut = max(1, len(images) * CALIBRATION_IMAGES // (CALIBRATION_IMAGES + HELD_BACK_IMAGES))
    return CalibrationImages(images[:cut], images[cut:] if cut < len(images) else images)


def _dense_row(job: Job, bench: Workbench) -> DenseRow:
    return DenseRow(
        accuracy_top1=bench.dense_accuracy,
        latency_ms=Latency(),
        peak_memory_bytes=None,
        file_bytes=(job.folder / "dense.onnx").stat().st_size,
        params=count_parameters(bench.raw),
        macs=round(bench.structure.macs()),
    )


def _emulate(
    job: Job, benches: Benches, transport: Transport, dense: DenseRow, candidates: list[Candidate]
) -> tuple[DenseRow, list[Candidate], dict[str, Any], list[str]]:
    """Compare outputs on the emulated core with this machine's; its times and memory are not the device's: null.

    An emulated inference takes seconds, so only the rows on the front go through.
    """
    front = [row for row in mark_pareto(candidates, dense) if row.pareto or len(candidates) == 1] or candidates[:1]
    notes = [f"{transport.name} is emulated: latency and memory are not measured"]
    with job.stages.stage("emulate") as advance, tempfile.TemporaryDirectory() as scratch:
        env = environment(job.target, transport)
        files = {side: Path(scratch) / f"images-{side}.npy" for side in benches}
        for side, file in files.items():
            np.save(file, benches[side].images.parity)
        for index, row in enumerate(front):
            assert row.artifact is not None
            artifact, side = job.folder / row.artifact, row.input_shape[-1]
            kind = benches[side].images.parity_kind
            found = compare_outputs(artifact, files[side], job.target, transport=transport, kind=kind)
            notes.append(
                f"{row.id}, emulated: top-1 agrees with this machine's on {found.top1_agreement:.0%} of "
                f"{found.inputs.count} inputs, largest difference {found.max_rel_err:.0e} of the output's scale"
            )
            advance(index + 1, len(front))
    return dense, candidates, {**env, "packages": job.key()["versions"]}, notes


def _measure(
    job: Job, benches: Benches, dense: DenseRow, candidates: list[Candidate]
) -> tuple[DenseRow, list[Candidate], dict[str, Any], list[str]]:
    """Time every candidate against the dense model, and take each one's memory in a process of its own."""
    transport = job.transport
    if transport is None:
        return dense, candidates, {"controller": job.key()["versions"]}, []
    if transport.source == "emulated":
        return _emulate(job, benches, transport, dense, candidates)
    timings: list[Measurement] = []
    measured: list[Candidate] = []
    dense_file = job.folder / "dense.onnx"
    with job.stages.stage("measure") as advance:
        env = environment(job.target, transport)
        fingerprint = env["fingerprint"]
        memory = _memory(job, dense_file, transport, fingerprint)
        dense_latencies: list[Latency] = []
        for index, candidate in enumerate(candidates):
            assert candidate.artifact is not None
            artifact = job.folder / candidate.artifact
            samples = job.folder / SAMPLES_FOLDER / f"{artifact.stem}.json"
            timing = measure_pair(
                dense_file,
                artifact,
                job.target,
                transport=transport,
                pairs=MINIMUM_PAIRS,
                raw_samples=samples,
                fingerprint=fingerprint,
            )
            timings.append(timing)
            dense_latencies.append(timing.dense_latency)
            measured.append(
                replace(
                    candidate,
                    latency_ms=timing.latency,
                    speedup=timing.speedup,
                    speedup_ci=timing.speedup_ci,
                    peak_memory_bytes=_memory(job, artifact, transport, fingerprint),
                )
            )
            advance(index + 1, len(candidates))
    # Every pair timed the dense model anew; the one in the middle stands for it, so that drift does not pick the row.
    timed = sorted((item for item in dense_latencies if item.p50 is not None), key=lambda item: item.p50 or 0.0)
    middle = timed[len(timed) // 2] if timed else Latency()
    dense = replace(dense, latency_ms=middle, peak_memory_bytes=memory)
    env = {**env, "packages": job.key()["versions"]}
    return dense, measured, env, [*(str(text) for text in env.get("doubts", [])), *merge_doubts(timings)]


def _judge_on_device(
    job: Job, benches: Benches, dense: DenseRow, candidates: list[Candidate], fingerprint: str
) -> tuple[DenseRow, list[Candidate], str]:
    """Take every accuracy from the device: its kernels, int8 ones above all, may answer otherwise than this machine's.

    Agreement and divergence are with the dense model on the device too.
    """
    bench = _bench_of(benches, None)
    assert job.transport is not None and bench.images.labels is not None
    rows: list[Candidate] = []
    moved: list[float] = []
    with job.stages.stage("accuracy on the device") as advance, tempfile.TemporaryDirectory() as scratch:
        pieces = {side: _save_images(item.images, Path(scratch), side) for side, item in benches.items()}
        reference = _device_logits(job, job.folder / "dense.onnx", pieces[bench.spec.shape[-1]], fingerprint)
        own = compare_logits(reference, bench.images.labels, None).accuracy_top1
        for index, row in enumerate(candidates):
            assert row.artifact is not None
            logits = _device_logits(job, job.folder / row.artifact, pieces[row.input_shape[-1]], fingerprint)
            rows.append(replace(row, **judge_logits(logits, bench.images.labels, reference, own)))
            moved.append(abs((rows[-1].accuracy_top1 or 0.0) - (row.accuracy_top1 or 0.0)))
            advance(index + 1, len(candidates))
    note = (
        f"accuracy was measured on {job.transport.name}, on {len(bench.images.labels)} validation images; the row that "
        f"differs most from this machine's figure differs by {100 * max(moved, default=0.0):.2f} points"
    )
    return replace(dense, accuracy_top1=own), rows, note


def _save_images(images: Images, folder: Path, side: int) -> list[Path]:
    """Write the validation images as the files that a device is sent, a batch each."""
    assert images.validation is not None
    pieces: list[Path] = []
    for number, (batch, _) in enumerate(images.validation()):
        pieces.append(folder / f"images-{side}-{number:05d}.npy")
        np.save(pieces[-1], batch)
    return pieces


def _device_logits(job: Job, model: Path, pieces: Sequence[Path], fingerprint: str) -> Array:
    """Return the device's answers for the validation images, from an earlier run where nothing has changed."""
    assert job.transport is not None
    key = job.key(data=job.data_key, artifact=hash_file(model), target=job.target, fingerprint=fingerprint)
    stored = job.store.load_arrays(f"device_logits/{model.stem}", key)
    if stored is None:
        stored = {"logits": evaluate_in_pieces(model, pieces, job.target, transport=job.transport)}
        job.store.save_arrays(f"device_logits/{model.stem}", key, stored)
    return stored["logits"]


def _memory(job: Job, model: Path, transport: Transport, fingerprint: str) -> int | None:
    key = {"model": hash_file(model), "target": job.target, "fingerprint": fingerprint}
    stored = job.store.load_json(f"memory/{model.stem}", key)
    if stored is None:
        stored = [measure_memory(model, job.target, transport=transport)]
        job.store.save_json(f"memory/{model.stem}", key, stored)
    value: int | None = stored[0]
    return value


def _finish(
    job: Job,
    benches: Benches,
    places: list[Place],
    dense: DenseRow,
    candidates: list[Candidate],
    env: dict[str, Any],
    warnings: list[str],
) -> Report:
    """Mark the front, choose, read the test images once, write the report."""
    rows = mark_pareto(_with_twins(candidates), dense)
    warnings += _twin_notes(candidates)
    missed: ConstraintError | None = None
    chosen: Chosen | None = None
    try:
        chosen = choose(dense, rows, job.request.constraints)
    except ConstraintError as error:
        missed = error
        warnings.append(str(error))
    if chosen is not None:
        row = next(row for row in rows if row.id == chosen.id)
        side = row.input_shape[-1]
        own = next(place.job for place in places if place.network.side == side)
        chosen = replace(chosen, accuracy_top1_test=_test_accuracy(own, benches[side], row))
        _bundle(own, benches[side], row)
    if job.data is not None:
        warnings += job.data.warnings
    if job.transport is None:
        warnings.append(_how_to_measure(job.target))
    report = Report(
        model=replace(job.model.info, macs=dense.macs, params=dense.params),
        target=to_json(job.target),
        environment=env,
        data={} if job.data is None else job.data.describe(),
        dense=dense,
        candidates=rows,
        chosen=chosen,
        constraints=job.request.constraints,
        skipped_groups=skipped_groups(places[0].network.structure),
        warnings=tuple(dict.fromkeys(warnings)),
        seconds=dict(job.stages.seconds),
        budgets=tuple(judge_budget(dense, rows, budget) for budget in job.budgets),
    )
    # The same records a reader gets from the file: tuples, floats and all.
    report = from_json(Report, to_json(report))
    write_report(report, job.folder)
    if missed is not None:
        raise missed
    return report


def _bundle(job: Job, bench: Workbench, row: Candidate) -> None:
    request = job.request
    if not (request.ort or request.bake_preprocess or row.kind == "n:m"):
        return
    with job.stages.stage("files for the device"):
        write_bundle(
            job.folder,
            row,
            job.model.input,
            job.target,
            bench.images.parity,
            bench.images.parity_kind,
            ort=request.ort,
            baked=request.bake_preprocess,
        )


def _twin_notes(candidates: list[Candidate]) -> list[str]:
    """Say which strategies came to the same: by formula, or because a pattern takes the same from them all."""
    sets = dict.fromkeys((row.kind, (row.strategy, *row.also_named)) for row in candidates if row.also_named)
    return [
        f"{', '.join(names[:-1])} and {names[-1]} coincide{' under the pattern' if kind == 'n:m' else ' by formula'}: "
        f"made and measured once, listed under {'both' if len(names) == 2 else 'all their'} names"
        for kind, names in sets
    ]


def _with_twins(candidates: list[Candidate]) -> list[Candidate]:
    """List a candidate under every name that coincides with its own."""
    rows: list[Candidate] = []
    for candidate in candidates:
        names = (candidate.strategy, *candidate.also_named)
        for name in names:
            others = tuple(other for other in names if other != name)
            own = candidate.id.replace(f"/{candidate.strategy}/", f"/{name}/")
            rows.append(replace(candidate, id=own, strategy=name, also_named=others))
    return rows


def _test_accuracy(job: Job, bench: Workbench, row: Candidate) -> float | None:
    if job.data is None or not len(job.data.test):
        return None
    assert row.artifact is not None
    with job.stages.stage("test"):
        logits = run_onnx(job.folder / row.artifact, job.data.test.batches(BATCH), bench.threads)
        return compare_logits(logits, job.data.test.labels, None).accuracy_top1


def _how_to_measure(target: Target) -> str:
    if matches_this_machine(target):
        return "latency is not measured: --no-bench was given; run the same command without it to measure"
    return (
        f"latency is not measured: this machine is not {target.name} and no device was given; give --host USER@HOST, "
        f"or copy dense.onnx and the artifacts to one and run there: "
        f"mm-edge bench dense.onnx ARTIFACT.onnx --target {target.name}"
    )


def skipped_groups(structure: Structure) -> tuple[SkippedGroup, ...]:
    """Return what keeps its full width and why."""
    return tuple(SkippedGroup(item.id, item.tensors, item.reason) for item in structure.pinned)


def check_request(request: Request, data: DataSplits | None, target: Target, measured: bool) -> None:
    """Refuse what cannot be done before any work is.

    Raises:
        UsageError: a constraint needs data or a device that is not there, or the target gains nothing from a request.
    """
    check_precisions(request.precisions, target, data is not None and len(data.calibration) > 0)
    if "n:m" in request.kinds:
        require_support(target, PATTERN)
    if request.accuracy_on == "device" and not measured:
        raise UsageError("--accuracy-on device needs a device, and nothing is measured here; give --host USER@HOST")
    if request.accuracy_on == "device" and (data is None or not len(data.validation)):
        raise UsageError("--accuracy-on device needs validation images, and there are none; give --data PATH")
    if request.recover == "finetune" and (data is None or data.calibration.places < 2):
        raise UsageError(
            "--recover finetune trains on calibration images, and there are none; give --split a first part"
        )
    limits = request.constraints
    if limits.max_drop is not None and (data is None or not len(data.validation)):
        raise UsageError("--max-drop needs accuracy, and there are no validation images; give --data PATH")
    if request.allocate_by == "latency" and not measured:
        raise UsageError("--allocate-by latency times the network, and nothing is measured here; give --host USER@HOST")
    if limits.latency_ms is not None and not measured:
        raise UsageError("--latency needs a measurement, and nothing is measured here; give --target host or a device")
