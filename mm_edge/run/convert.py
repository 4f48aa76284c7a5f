"""Candidates in other precisions: int8 and fp16 versions of finished fp32 candidates.

Precision is reduced after pruning: the int8 version is made from the pruned fp32 artifact. Some calibration images give
its ranges, and the others decide which layers stay in fp32. Like every candidate it is judged on validation images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mm_edge.formats.conversion import CalibrationImages, QuantReport
from mm_edge.formats.precisions import PRECISIONS
from mm_edge.records import Candidate, DenseFigures, candidate_id, file_name
from mm_edge.run.job import IMAGES_PER_BATCH, Job
from mm_edge.run.make import MakeSettings, dense_candidate, judge_artifact
from mm_edge.run.networks import Network, Networks
from mm_edge.run.reuse import load_or_make
from mm_edge.select import mark_pareto
from mm_edge.store import hash_file

CALIBRATION_IMAGES = 100
HELD_BACK_IMAGES = 64


def convert_front(
    job: Job, networks: Networks, settings: MakeSettings, candidates: Sequence[Candidate], dense: DenseFigures
) -> list[Candidate]:
    """Make the versions of the dense network and of the front of accuracy against MACs in every other precision."""
    precisions = [name for name in job.request.precision if name != "fp32"]
    if not precisions:
        return []
    unjudged = networks.dense.images.validation is None
    front = [item for item in mark_pareto(candidates, dense) if item.pareto or unjudged]
    sources = [dense_candidate(networks.dense, settings, job.dense_file, "dense/fp32"), *front]
    made: list[Candidate] = []
    with job.stages.stage("smaller numbers") as advance:
        images = {network.side: _calibration_images(network) for network in networks}
        for index, source in enumerate(sources):
            network = networks.at(source.input_shape[-1])
            made += [_convert(job, network, settings, source, name, images[network.side]) for name in precisions]
            advance(index + 1, len(sources))
    job.note(
        f"{' and '.join(precisions)} versions were made of the dense model and of the {len(front)} rows on the front"
    )
    return made


def _convert(
    job: Job,
    network: Network,
    settings: MakeSettings,
    source: Candidate,
    precision: str,
    images: CalibrationImages | None,
) -> Candidate:
    """Make, save and judge the `precision` version of an fp32 candidate, or return the one that an earlier run stored.

    Parity is left out, because a lower precision is not exact. Agreement with the dense network shows the difference.

    Raises:
        JobError: it cannot be converted.
    """
    artifact = job.artifact(source)
    convert = PRECISIONS[precision].convert
    assert convert is not None

    def make() -> Candidate:
        out = artifact.with_name(f"{_stem(source, network, precision)}{artifact.suffix}")
        report: QuantReport = convert(artifact, out, job.target, images, settings.threads, None)
        return replace(
            source,
            id=candidate_id(source.signal, source.strategy, source.kind, precision, network.side),
            precision=precision,
            file_bytes=out.stat().st_size,
            parity=None,
            artifact=out.relative_to(job.folder).as_posix(),
            recovered_by=_describe(source.recovered_by, report),
            **judge_artifact(network, settings, out),
        )

    name = file_name(source.signal, source.strategy, source.kind, source.precision, network.side)
    key = job.key(data=job.data_key, source=hash_file(artifact), precision=precision, target=job.target)
    found = load_or_make(job, f"candidates/{name}-{precision}", key, make)
    return replace(found, also_named=source.also_named, planned_by=source.planned_by)


def _stem(source: Candidate, network: Network, precision: str) -> str:
    """Return the name of the converted file, without suffix; what a recovery added to the name stays."""
    assert source.artifact is not None
    stem = (source.artifact.rpartition("/")[2]).rpartition(".")[0]
    if source.kind == "dense":
        return f"{stem}-{precision}"
    fields = (source.signal, source.strategy, source.kind)
    added = stem.removeprefix(file_name(*fields, source.precision, network.side))
    return f"{file_name(*fields, precision, network.side)}{added}"


def _calibration_images(network: Network) -> CalibrationImages | None:
    if network.data is None:
        return None
    wanted = network.data.calibration.take(CALIBRATION_IMAGES + HELD_BACK_IMAGES)
    images = np.concatenate([batch for batch, _ in wanted.batches(IMAGES_PER_BATCH)])
    cut = max(1, len(images) * CALIBRATION_IMAGES // (CALIBRATION_IMAGES + HELD_BACK_IMAGES))
    return CalibrationImages(images[:cut], images[cut:] if cut < len(images) else images)


def _describe(before: str | None, report: QuantReport) -> str:
    """Return the recovery of the source with the method, precision and scheme of the conversion."""
    left = f", {len(report.fp32_layers)} layers in fp32" if report.fp32_layers else ""
    scheme = f" {report.scheme}" if report.scheme else ""
    return f"{before + ' + ' if before else ''}{report.method} {report.precision}{scheme}{left}"
