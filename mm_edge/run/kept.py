"""Candidates that an earlier run made: read again where nothing they depend on has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mm_edge.records import Candidate
from mm_edge.run.job import Job


def kept(job: Job, name: str, key: Mapping[str, Any], make: Callable[[], Candidate]) -> Candidate:
    """Return the candidate an earlier run kept under `name` for this `key`; else make it and keep it with its files."""
    found = job.store.load_record(name, key, Candidate)
    if found is None:
        found = make()
        files = [job.folder / path for path in (found.artifact, found.masked_state_dict) if path]
        job.store.save_json(name, key, found, files)
    return found
