"""Reuses candidates and figures of merit of an earlier run if nothing they depend on has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from mm_edge.errors import JobError, UsageError
from mm_edge.records import Candidate, MetricValue
from mm_edge.run.job import Job
from mm_edge.run.metric import UserMetric
from mm_edge.store import hash_file

# How much of a stage's time a run that is killed may lose at most, where the stage is stored part by part.
KEEP_SECONDS = 10.0

T = TypeVar("T")


def load_or_make(job: Job, name: str, key: Mapping[str, Any], make: Callable[[], Candidate]) -> Candidate:
    """Return the candidate stored under `name` for this `key`; otherwise make it, and store it with its files.

    It carries the user's figure of merit, which is stored on its own.
    """
    found = job.store.load_record(name, key, Candidate)
    if found is None:
        found = make()
        files = [job.folder / path for path in (found.artifact, found.masked_state_dict) if path]
        job.store.save_json(name, key, found, files)
    if job.metric is None:
        return found
    return replace(found, metric=measure_candidate(job, job.metric, job.artifact(found), found.id))


def load_or_measure(job: Job, metric: UserMetric, artifact: Path, what: str) -> MetricValue:
    """Return the figure of an artifact in the run directory, stored under the hashes of the artifact and the metric.

    Data that the metric reads is not part of the key.

    Raises:
        ModelError: ONNX Runtime cannot load the artifact.
        UsageError: the callable raises, or returns no finite number.
    """
    name = f"metric/{artifact.stem}"
    key = {"artifact": hash_file(artifact), "metric": metric.digest, "callable": metric.name}
    found = job.store.load_record(name, key, MetricValue)
    if found is None:
        found = metric.measure(artifact, what)
        job.store.save_json(name, key, found)
    return found


def measure_candidate(job: Job, metric: UserMetric, artifact: Path, what: str) -> MetricValue | None:
    """Return the figure of a candidate; None, with a note in the report, where the metric fails for it."""
    try:
        return load_or_measure(job, metric, artifact, what)
    except (UsageError, JobError) as error:
        job.note(f"{what} has no figure of merit: {error}")
        return None


def now_and_then(save: Callable[[T], None]) -> Callable[[T], None]:
    """Return a function that hands what a stage has so far to `save`, at most once in KEEP_SECONDS."""
    last = time.monotonic()

    def offer(so_far: T) -> None:
        nonlocal last
        if time.monotonic() - last >= KEEP_SECONDS:
            save(so_far)
            last = time.monotonic()

    return offer
