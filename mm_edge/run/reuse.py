"""Reuses candidates of an earlier run if nothing they depend on has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mm_edge.records import Candidate
from mm_edge.run.job import Job
from mm_edge.run.metric import measure_candidate


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
