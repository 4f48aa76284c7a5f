"""The chosen candidate and the dense network in turn without pause, as long as --sustained asks."""

from __future__ import annotations

from typing import Any

from mm_edge.bench.sustained import measure_sustained
from mm_edge.records import Candidate, Sustained, from_json
from mm_edge.run.job import Job
from mm_edge.store import hash_file


def sustain(job: Job, candidate: Candidate, environment: dict[str, Any]) -> Sustained | None:
    """Return the curve of a candidate's times and the dense network's; None where none was asked for or measured."""
    minutes = job.request.sustained
    if minutes is None or job.transport is None or job.transport.source == "emulated":
        return None
    artifact = job.artifact(candidate)
    key = {
        "dense": hash_file(job.dense_file),
        "candidate": hash_file(artifact),
        "target": job.target,
        "fingerprint": environment.get("fingerprint"),
        "minutes": minutes,
    }
    name = f"sustained/{artifact.stem}"
    with job.stages.stage("sustained"):
        stored = job.store.load_json(name, key)
        if stored is None:
            points = measure_sustained(job.dense_file, artifact, job.target, transport=job.transport, minutes=minutes)
            stored = Sustained(candidate.id, minutes, points)
            job.store.save_json(name, key, stored)
            return stored
    return from_json(Sustained, stored)
