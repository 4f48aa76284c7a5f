"""The whole job, stage by stage.

    load -> score -> ranges -> strategies -> masks -> structure -> export -> bench -> report

Every stage is stored under the hash of what it depends on, so that a run that was killed goes on where it stopped and
a changed flag redoes only what it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from mm_edge.bench.target import Target
from mm_edge.errors import ConstraintError, ParityError, UsageError
from mm_edge.formats.bundle import write_bundle
from mm_edge.formats.device_files import add_metadata_, write_model
from mm_edge.formats.precisions import CalibrationImages
from mm_edge.formats.registry import FormatContext
from mm_edge.graph.export import deploy
from mm_edge.graph.groups import Structure
from mm_edge.load.data import DataSplits, noise_batches
from mm_edge.plan.counts import count_parameters
from mm_edge.plan.n_m import require_support
from mm_edge.plan.plans import PATTERN, Plan
from mm_edge.progress import Advance
from mm_edge.quality.evaluation import compare_logits, run_onnx
from mm_edge.records import (
    Candidate,
    Chosen,
    DenseRow,
    Latency,
    Report,
    SkippedGroup,
    file_name,
    from_json,
    to_json,
)
from mm_edge.recover.training.finetune import Checkpoints, Settings
from mm_edge.report import write_report
from mm_edge.run.convert import (
    CALIBRATION_IMAGES,
    HELD_BACK_IMAGES,
    check_precisions,
    convert_candidate,
)
from mm_edge.run.finetune import finetune_candidate, worth_training
from mm_edge.run.job import BATCH, FROM_MOMENTS, Job, Place, Request
from mm_edge.run.make import (
    Benches,
    Images,
    Workbench,
    bench_of,
    dense_candidate,
    make_candidate,
    make_control,
)
from mm_edge.run.measure import how_to_measure, judge_on_device, measure_all
from mm_edge.run.networks import export_dense, export_sizes, lay_out_places
from mm_edge.run.plan import make_plans
from mm_edge.run.tune import tune_candidate
from mm_edge.runtime import cores
from mm_edge.select import choose, judge_budget, mark_pareto
from mm_edge.store import hash_file

RECOVERY_IMAGES = 128
PARITY_IMAGES = 8


def prune_export(job: Job) -> Report:
    """Run every stage and write report.json and report.md in the job's folder.

    Raises:
        UsageError: something was refused before scoring.
        JobError: the job ran and failed; what was made is kept. When no candidate meets the constraints the report is
            written all the same, with `chosen` null.
    """
    warnings = [*job.model.warnings]
    with job.stages.stage("export"):
        dense_network = export_dense(job)
    structure = dense_network.structure
    if not structure.groups and "structured" in job.request.kinds:
        warnings.append("no group of this network can lose channels; see 'mm-edge inspect' for the reasons")
    sizes, notes = export_sizes(job, dense_network)
    warnings += notes
    places = lay_out_places(job, dense_network, sizes)
    benches = _set_up_all(places)
    plans, notes = make_plans(job, places)
    warnings += notes
    bench = bench_of(benches, None)
    controls = _make_controls(places, benches)
    candidates, failures = _make_all(job, benches, plans)
    warnings += failures
    dense = _dense_row(job, bench)
    candidates, failures = _walk_front(job, benches, plans, candidates, dense)
    warnings += failures
    candidates, failures = _train_front(job, benches, places, plans, candidates, dense)
    warnings += failures
    again = [row for row in candidates if _is_control_again(row)]
    warnings += [f"{row.id}, the whole network, is the control again: {row.stopped or 'not tuned'}" for row in again]
    candidates = [*controls, *(row for row in candidates if row not in again)]
    smaller, failures = _convert_all(job, benches, places, dense, candidates)
    candidates += smaller
    warnings += failures
    dense, candidates, env, notes = measure_all(job, benches, dense, candidates)
    warnings += notes
    env = {**env, "accuracy_on": job.request.accuracy_on}
    if job.request.accuracy_on == "device":
        dense, candidates, note = judge_on_device(job, benches, dense, candidates, env["fingerprint"])
        warnings.append(note)
    return _finish(job, benches, places, dense, candidates, env, warnings)


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
            name = f"candidates/{file_name('none', 'dense', 'dense', 'fp32', side)}"
            made.append(_kept(job, name, key, partial(make_control, benches[side], side)))
    return made


def _set_up(place: Place) -> Workbench:
    """Save the dense model, take its answers on the validation images, and lay out what candidates share."""
    job, raw = place.job, place.network.raw
    threads = cores()
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
        # What comes before tuning and fine-tuning is the closed form, and is kept as such for the next run.
        recover="closed-form" if job.request.recover in FROM_MOMENTS else job.request.recover,
        folder=job.folder,
        dense_accuracy=accuracy,
        threads=threads,
        spec=job.model.input,
        labels=labels,
        provenance=provenance,
        recovery=place.recovery,
        held_out=job.request.recover == "tune",
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
            bench = bench_of(benches, plan.side)
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
        bench = bench_of(benches, plan.side)
        step = "walk, held out" if bench.held_out else "walk"
        key = job.key(data=job.data_key, plan=plan.digest(), recover=step, select=bench.select, screened=screened)
        return _kept(job, f"walked/{plan.file_name}", key, lambda: make_candidate(bench, plan, walk_again=True))

    with job.stages.stage("walk the front") as advance:
        return _improve(job, candidates, front, by_id, walk, lambda done: advance(done, len(front)))


def _is_control_again(row: Candidate) -> bool:
    """Whether a row is the whole network on smaller pictures, which tuning did not better."""
    return row.is_budget and not row.is_pruned and row.recovered_by != "tune"


def _is_budget(row: Candidate, plan: Plan) -> bool:
    """Whether a row is what a budget asked for: at sizes besides the dense one, the best of them by sensitivity."""
    return row.is_budget and (plan.side is None or row.signal == "sensitivity")


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
        chosen = [row for row in chosen if row.kind == "structured"]
        train = partial(_tune_one, bench_of(benches, None))

    def improve(index: int, row: Candidate, plan: Plan, start: str) -> Candidate:
        own = next(place.job for place in places if place.side == plan.side)
        move = partial(_share, advance, index, len(chosen))
        return train(own, bench_of(benches, plan.side), plan, row, start, move)

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


def _tune_one(
    given: Workbench, job: Job, bench: Workbench, plan: Plan, row: Candidate, start: str, advance: Advance
) -> Candidate:
    """Tune the row whose weights have the digest `start`, or return what an earlier run made."""
    key = job.key(data=job.data_key, plan=plan.digest(), recover="tune", start=start)
    return _kept(
        job, f"tuned/{plan.file_name}", key, lambda: tune_candidate(bench, given, plan, row, job.request.seed, advance)
    )


def _share(advance: Advance, index: int, count: int, done: int, total: int) -> None:
    """Report the steps of one row among `count` rows, in thousandths: rows of other sizes take other steps."""
    advance(1000 * index + 1000 * done // total, 1000 * count)


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
    bench = bench_of(benches, None)
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
            side = source.input_shape[-1]
            for precision in precisions:
                own_side = None if side == bench.spec.shape[-1] else side
                parts = (source.signal, source.strategy, source.kind, source.precision, own_side)
                name = f"candidates/{file_name(*parts)}-{precision}"
                key = job.key(data=job.data_key, source=digest, precision=precision, target=job.target)
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
        warnings.append(how_to_measure(job.target))
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
    asked = {"ort": request.ort, "bake-preprocess": request.bake_preprocess}
    formats = [name for name, wanted in asked.items() if wanted]
    if not (formats or row.kind == "n:m"):
        return
    with job.stages.stage("files for the device"):
        write_bundle(
            job.folder,
            row,
            FormatContext(job.model.input, job.target, bench.images.parity, bench.images.parity_kind),
            formats,
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
