"""The end of a run: mark the front, choose, read the test images once, write the report and the device's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_edge.errors import ConstraintError
from mm_edge.formats.bundle import ARCHIVE, write_bundle
from mm_edge.formats.bundle import FOLDER as BUNDLE
from mm_edge.formats.bundle.contents import Facts, names_of, write_archive, write_contents
from mm_edge.formats.context import FormatContext
from mm_edge.graph.groups import Structure
from mm_edge.plan.strategies import STRATEGIES
from mm_edge.quality.evaluation import compare_logits, compare_outputs, refer_to_outputs, run_onnx, run_outputs
from mm_edge.records import (
    Candidate,
    Chosen,
    DenseFigures,
    Fidelity,
    LayerPicture,
    Report,
    SkippedGroup,
    Sustained,
    candidate_id,
    from_json,
    to_json,
)
from mm_edge.report import REPORT_FILES, write_report
from mm_edge.run.describe import describe_layers, write_command
from mm_edge.run.job import IMAGES_PER_BATCH, Job
from mm_edge.run.make import MakeSettings
from mm_edge.run.measure import how_to_measure
from mm_edge.run.networks import Network, Networks, labels_of, provenance_of
from mm_edge.run.score import channel_signals
from mm_edge.run.shares import add_shares
from mm_edge.run.sustain import sustain
from mm_edge.select import OTHER_SIZES, UNCOMPARABLE, UNCOMPARED, choose, judge_budget, mark_pareto


def finish(
    job: Job,
    networks: Networks,
    settings: MakeSettings,
    dense: DenseFigures,
    candidates: Sequence[Candidate],
    environment: dict[str, Any],
) -> Report:
    """Choose, write the report and return it.

    Raises:
        ConstraintError: no candidate meets the constraints; the report is written all the same, with `chosen` null.
    """
    listed = mark_pareto([_with_all_ids(job, networks, item) for item in candidates], dense)
    job.note(*notes_of_shared_names(candidates))
    missed: ConstraintError | None = None
    layers: tuple[LayerPicture, ...] = ()
    chosen: Chosen | None = None
    sustained: Sustained | None = None
    try:
        chosen = choose(dense, listed, job.request.constraints)
    except ConstraintError as error:
        missed = error
        job.note(str(error))
    if missed is None and chosen is None:
        job.note(_why_uncompared(job, listed))
    if chosen is not None:
        candidate = next(item for item in listed if item.id == chosen.id)
        network = networks.at(candidate.input_shape[-1])
        chosen = _with_test(job, networks, settings, candidate, chosen)
        sustained = sustain(job, candidate, environment)
        layers = add_shares(job, candidate, describe_layers(job, networks.dense, candidate), environment)
        _write_bundle(job, network, candidate, chosen, dense)
    if job.data is not None:
        job.note(*job.data.warnings)
    if job.transport is None:
        job.note(how_to_measure(job.target))
    report = Report(
        model=replace(job.model.info, macs=dense.macs, params=dense.params),
        target=to_json(job.target),
        environment=environment,
        data={} if job.data is None else job.data.describe(),
        dense=dense,
        candidates=listed,
        chosen=chosen,
        constraints=job.request.constraints,
        skipped_groups=skipped_groups(networks.dense.structure),
        warnings=tuple(dict.fromkeys(job.notes)),
        seconds=dict(job.stages.seconds),
        budgets=tuple(judge_budget(dense, listed, budget) for budget in job.budgets),
        sustained=sustained,
        layers=layers,
        command=write_command(job.request, "MODEL"),
    )
    # Return the same types as read_report: lists become tuples, and whole numbers floats.
    report = from_json(Report, to_json(report))
    job.store.claim(*REPORT_FILES)
    write_report(report, job.folder)
    if missed is not None:
        raise missed
    return report


def skipped_groups(structure: Structure) -> tuple[SkippedGroup, ...]:
    """Return the groups that keep their full width, with the reason."""
    return tuple(SkippedGroup(item.id, item.tensors, item.reason) for item in structure.pinned)


def _with_all_ids(job: Job, networks: Networks, candidate: Candidate) -> Candidate:
    """Return the candidate with the ids of all its other names: strategies, and signals that change nothing."""
    side = networks.at(candidate.input_shape[-1]).side
    signals = [candidate.signal]
    if candidate.kind == "structured" and channel_signals(job.request) == (candidate.signal,):
        signals += [name for name in job.request.signals if name != candidate.signal]
    names = (candidate.strategy, *candidate.also_named)
    ids = [candidate_id(s, n, candidate.kind, candidate.precision, side) for s in signals for n in names]
    return replace(candidate, also_ids=tuple(ids[1:]))


def _why_uncompared(job: Job, candidates: Sequence[Candidate]) -> str:
    if job.data is None or not len(job.data.validation):
        return UNCOMPARED
    shape = tuple(job.model.input.shape)
    return UNCOMPARABLE if any(tuple(item.input_shape) == shape for item in candidates) else OTHER_SIZES


def notes_of_shared_names(candidates: Sequence[Candidate]) -> list[str]:
    """Return notes on strategies that coincide by formula, in widths or under a pattern."""
    shared = dict.fromkeys((item.kind, (item.strategy, *item.also_named)) for item in candidates if item.also_named)
    return [
        f"{', '.join(names[:-1])} and {names[-1]} coincide {_why_shared(kind, names)}: "
        f"made, measured and listed once, under {'both' if len(names) == 2 else 'all their'} names"
        for kind, names in shared
    ]


def _why_shared(kind: str, names: Sequence[str]) -> str:
    if kind == "n:m":
        return "under the pattern"
    formulas = {STRATEGIES[name].share for name in names if name in STRATEGIES}
    return "by formula" if len(formulas) == 1 else "in the widths that the target allows"


def _with_test(job: Job, networks: Networks, settings: MakeSettings, candidate: Candidate, chosen: Chosen) -> Chosen:
    """Return the choice with what the test images, which are read here alone, say about it."""
    network = networks.at(candidate.input_shape[-1])
    if job.model.info.num_classes is None:
        return replace(chosen, fidelity_test=_test_fidelity(job, network, networks.dense, settings, candidate))
    return replace(
        chosen,
        accuracy_top1_test=_test_accuracy(job, network, settings, job.artifact(candidate)),
        dense_accuracy_top1_test=_test_accuracy(job, networks.dense, settings, job.dense_file),
    )


def _test_fidelity(
    job: Job, network: Network, dense: Network, settings: MakeSettings, candidate: Candidate
) -> Fidelity | None:
    if network.data is None or dense.data is None or not len(network.data.test):
        return None
    with job.stages.stage("test"):
        outputs = run_outputs(job.dense_file, dense.data.test.batches(IMAGES_PER_BATCH), settings.threads)
        reference = refer_to_outputs(outputs, dense.spec.shape[1:], job.has_masks)
        found = run_outputs(job.artifact(candidate), network.data.test.batches(IMAGES_PER_BATCH), settings.threads)
        return compare_outputs(found, reference)


def _test_accuracy(job: Job, network: Network, settings: MakeSettings, model: Path) -> float | None:
    if network.data is None or not len(network.data.test):
        return None
    with job.stages.stage("test"):
        logits = run_onnx(model, network.data.test.batches(IMAGES_PER_BATCH), settings.threads)
        return compare_logits(logits, network.data.test.labels, None).accuracy_top1


def _write_bundle(job: Job, network: Network, candidate: Candidate, chosen: Chosen, dense: DenseFigures) -> None:
    """Write DIR/bundle, and DIR/bundle.tar.gz where it was asked for; what an earlier run wrote there goes first."""
    images = network.images
    context = FormatContext(network.spec, job.target, images.parity, images.parity_kind)
    facts = Facts(
        model=job.model.info,
        dense=dense,
        labels=labels_of(job),
        reason=chosen.reason,
        accuracy_top1_test=chosen.accuracy_top1_test,
        provenance=provenance_of(job, network.model),
    )
    job.store.remove_owned(BUNDLE)
    job.store.claim(*(f"{BUNDLE}/{name}" for name in names_of(candidate)))
    with job.stages.stage("bundle"):
        formats = write_bundle(job.folder, candidate, context, job.request.formats)
        made = write_contents(job.folder, job.folder / BUNDLE, candidate, context, facts, formats)
        if job.request.archive:
            job.store.claim(ARCHIVE)
            write_archive(job.folder / BUNDLE, job.folder / ARCHIVE, [path.name for path in (*made, *formats)])
