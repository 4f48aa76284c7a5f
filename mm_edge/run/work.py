"""The argument of a recovery's `improve`."""

from __future__ import annotations

from dataclasses import dataclass

from mm_edge.plan.plans import Plan
from mm_edge.progress import Advance
from mm_edge.records import Candidate
from mm_edge.run.job import Job
from mm_edge.run.make import MakeSettings
from mm_edge.run.networks import Networks


@dataclass(frozen=True)
class Work:
    """One candidate that a recovery is to improve.

    Attributes:
        job: the job.
        networks: the networks of the run.
        settings: how candidates are made, written and judged.
        plan: the candidate's plan.
        candidate: the candidate as it was made before.
        start: SHA-256 of the masked weights it starts from, with the input size.
        advance: called with (steps done, of how many).
    """

    job: Job
    networks: Networks
    settings: MakeSettings
    plan: Plan
    candidate: Candidate
    start: str
    advance: Advance
