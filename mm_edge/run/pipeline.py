"""The whole job, stage by stage.

    networks -> plan -> make -> recover -> convert -> measure -> finish

Every stage is stored under the hash of what it depends on, so that a run that was killed goes on where it stopped and
a changed option repeats only what depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mm_edge.errors import ParityError
from mm_edge.plan.counts import count_parameters
from mm_edge.plan.plans import Plan
from mm_edge.quality.evaluation import interval_of
from mm_edge.records import Candidate, DenseFigures, Latency, MetricValue, Report
from mm_edge.run.convert import convert_front
from mm_edge.run.expected import expected_stages
from mm_edge.run.finish import finish
from mm_edge.run.job import Job
from mm_edge.run.make import MakeSettings, control_file_name, make_candidate, make_control
from mm_edge.run.measure import measure
from mm_edge.run.networks import RECOVERY_IMAGES, Networks, build_networks, labels_of, provenance_of
from mm_edge.run.plan import make_plans
from mm_edge.run.recover import drop_repeated_controls, improve_front, walk_front
from mm_edge.run.reuse import load_or_make, load_or_measure
from mm_edge.runtime import cores


def run_stages(job: Job) -> Report:
    """Run every stage and write report.json and report.md in the job's folder.

    Raises:
        UsageError: something was refused before scoring.
        JobError: the job ran and failed; what was made is kept. When no candidate meets the constraints the report is
            written all the same, with `chosen` null.
    """
    job.stages.expect(expected_stages(job))
    job.note(*job.model.warnings)
    networks = build_networks(job)
    dense = _dense_figures(job, networks)
    plans = make_plans(job, networks)
    by_id = {plan.id: plan for plan in plans}
    settings = _settings(job, networks)
    controls = _make_controls(job, networks, settings)
    candidates = _make_all(job, networks, settings, plans)
    candidates = walk_front(job, networks, settings, by_id, candidates, dense)
    candidates = improve_front(job, networks, settings, by_id, candidates, dense)
    candidates = [*controls, *drop_repeated_controls(job, candidates)]
    candidates += convert_front(job, networks, settings, candidates, dense)
    dense, candidates, environment = measure(job, networks, dense, candidates)
    return finish(job, networks, settings, dense, candidates, environment)


def _settings(job: Job, networks: Networks) -> MakeSettings:
    recovery = job.recovery
    return MakeSettings(
        folder=job.folder,
        # Tuning and fine-tuning start from candidates of the closed form, which are stored under its name.
        recovery=recovery.starts_with or job.request.recover,
        select=job.request.select,
        held_out=recovery.holds_out,
        threads=cores(),
        labels=labels_of(job),
        provenance=provenance_of(job, job.model),
        reference=networks.reference,
    )


def _dense_figures(job: Job, networks: Networks) -> DenseFigures:
    labels = networks.reference.labels
    return DenseFigures(
        accuracy_top1=networks.reference.accuracy,
        latency_ms=Latency(),
        peak_memory_bytes=None,
        file_bytes=job.dense_file.stat().st_size,
        params=count_parameters(networks.dense.raw),
        macs=round(networks.dense.structure.macs()),
        accuracy_ci=None if labels is None else interval_of(networks.reference.accuracy, len(labels)),
        accuracy_images=None if labels is None else len(labels),
        metric=_dense_metric(job, networks),
    )


def _dense_metric(job: Job, networks: Networks) -> MetricValue | None:
    """Return the dense network's figure of merit, the user's own or by the user's labels; None without either.

    Raises:
        UsageError: the user's metric fails; nothing was made yet.
    """
    if job.metric is None:
        return networks.reference.metric
    return load_or_measure(job, job.metric, job.dense_file, "the dense network")


def _make_controls(job: Job, networks: Networks, settings: MakeSettings) -> list[Candidate]:
    """Make the dense network at every other size, where there are images to judge it by."""
    made: list[Candidate] = []
    for network in networks.others:
        if network.images.validation is None or network.data is None:
            continue
        with job.stages.stage("controls"):
            key = job.key(network.model, data=network.data.identity, control=network.side)
            name = f"candidates/{control_file_name(network)}"
            made.append(load_or_make(job, name, key, partial(make_control, network, settings)))
    return made


def _make_all(job: Job, networks: Networks, settings: MakeSettings, plans: Sequence[Plan]) -> list[Candidate]:
    """Make a candidate of every plan; one that fails its parity check is left out and noted.

    Raises:
        ParityError: nothing was made.
    """
    made: list[Candidate] = []
    failures: list[str] = []
    with job.stages.stage("candidates") as advance:
        advance(0, len(plans))
        for index, plan in enumerate(plans):
            key = job.key(
                data=job.data_key,
                plan=plan.digest(),
                recover=settings.recovery,
                select=settings.select,
                images=RECOVERY_IMAGES,
            )
            make = partial(make_candidate, networks.at(plan.side), plan, settings)
            try:
                candidate = load_or_make(job, f"candidates/{plan.file_name}", key, make)
                made.append(replace(candidate, planned_by=plan.planned_by))
            except ParityError as error:
                failures.append(str(error))
            advance(index + 1, len(plans))
    if not made:
        raise ParityError(failures[0] if failures else "no candidate was planned; give at least one strategy and kind")
    job.note(*failures)
    return made
